"""Command lines, and how they are carried out on the one base model that is loaded.

Every button makes a command line.  It is read by the parser of `personalize` itself and carried out by the function
that the command calls, so that what the page shows is what it did.  Nothing heavy is imported before the first job.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personalize.cli import launch
from personalize.cli.main import SCRIPT_FOLDERS, check
from personalize.cli.options import COMMANDS, resolve_command
from personalize.cli.parser import parse
from personalize.formats.adapter_folders import MANIFEST
from personalize.io.progress import listening
from personalize.studio.jobs import Job

Words = list[str]


def option(name: str, *values: Any) -> Words:
    """`--name=value`, for each value that is given: one that begins with dashes is still a value."""
    return [f"--{name}={value}" for value in values if value is not None and value != ""]


def command_line(words: Sequence[str]) -> str:
    """What to type in a terminal."""
    shown = []
    for word in words:
        name, equals, value = word.partition("=")
        shown.append(f"{name}={shlex.quote(value)}" if name.startswith("--") and equals else shlex.quote(word))
    return " ".join(["personalize", *shown])


def read(words: Sequence[str]) -> tuple[Any, Any]:
    """The checked options of a command line and the function that carries them out.  UserError as in a terminal."""
    command, *rest = words
    if command in SCRIPT_FOLDERS:
        name, *rest = rest
        script = launch.load_script(launch.scripts(command)[name])
        options = parse(script.Config, rest, prog=f"personalize {command} {name}", presets=launch.presets(name))
        check(options)
        return options, script.main
    config, target = COMMANDS[resolve_command(command, rest)]
    options = parse(config, rest, prog=f"personalize {command}")
    check(options)
    module, _, function = target.partition(":")
    return options, getattr(importlib.import_module(module), function)


class Workbench:
    """The one base model in memory, and the editor that was used last; only the queue's thread may use them.

    base: the base model that the studio was started with; None is the adapter's own, or the package's.
    """

    def __init__(self, base: str | None = None) -> None:
        self.base = base
        self._model: tuple[str | None, str | None, Any] | None = None  # name, prediction type that was given, model
        self._editor: tuple[Any, Any] | None = None

    def model(
        self, name: str | None, *, prediction_type: str | None = None, local_files_only: bool = False,
        inpainting: bool = False,
    ) -> Any:  # fmt: skip
        """The base model `name`, which predicts `prediction_type`, by default what it says itself.

        Another one leaves the memory first.  UserError for an inpainting model unless `inpainting`.
        """
        from personalize.models.config import check_channels

        for given in (None, prediction_type):  # it need not be loaded again for what it says itself
            if self._model is None or not self._is(name, prediction_type):
                from personalize.models.stable_diffusion import StableDiffusion

                self.forget()
                about: Any = {"prediction_type": given, "local_files_only": local_files_only, "inpainting": True}
                self._model = name, given, StableDiffusion.load(name, **about)
        model = self._model[2]
        check_channels(model.unet.config.in_channels, model.name, inpainting=inpainting)
        return model

    def _is(self, name: str | None, prediction_type: str | None) -> bool:
        """Is the model in memory that of this name, with this prediction type?"""
        if self._model is None or self._model[0] != name:
            return False
        _, given, model = self._model
        return given is None if prediction_type is None else model.prediction_type == prediction_type

    def editor(self, base: str | None, adapters: Sequence[Path], *, inpainting: bool = False) -> Any:
        """The editor of a base, by default that of the adapters, and adapters; the last one if nothing has changed."""
        from personalize.adapters.apply import load_adapters
        from personalize.editing.adapter_base import notice_other_prediction, trained_prediction
        from personalize.editing.editor import Editor
        from personalize.models.known_bases import find_base

        files = tuple((str(path), _changed(path)) for path in adapters)
        if self._editor is None or self._editor[0] != (base, files, inpainting):
            adapter = load_adapters(adapters) if adapters else None
            named = base or (find_base(adapter.base) if adapter else None)
            name = None if named in ("", "embedded") else named
            about: Any = {"local_files_only": not base, "inpainting": inpainting}
            model = self._model[2] if self._model and self._model[0] == name else self.model(name, **about)
            trained = trained_prediction(adapter, model) if adapter is not None else None
            model = self.model(name, prediction_type=trained, **about)
            if adapter is not None:
                notice_other_prediction(adapter, model)
            self._editor = (base, files, inpainting), Editor(model, adapter)
        return self._editor[1]

    def editor_of(self, options: Any) -> Any:
        """The editor of a command's options."""
        return self.editor(options.pretrained_model_name_or_path, options.adapters, inpainting=options.inpainting)

    def forget(self) -> None:
        """Drop the model, as before a training, which loads its base in the precision it needs."""
        self._model = self._editor = None

    def base_words(self, chosen: str | None = None) -> Words:
        """The option that names the base model, unless it is the one that is used without."""
        named = chosen or self.base
        return option("pretrained_model_name_or_path", None if named in (None, "", "embedded") else named)


def carry_out(words: Sequence[str], bench: Workbench, job: Job) -> Any:
    """Carry out a command line that draws pictures, with its progress in `job`."""
    options, function = read(words)
    with listening(job.part):
        return function(options, bench.editor_of(options))


def _changed(path: Path) -> float:
    """When a file, or the manifest of an adapter folder, was written."""
    file = path / MANIFEST if path.is_dir() else path
    return file.stat().st_mtime if file.exists() else 0.0
