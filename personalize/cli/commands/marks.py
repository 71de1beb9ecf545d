"""What a command writes into its pictures besides pixels: the options, that a model made them, and a signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import personalize
from personalize.cli.redrawing import NEVER_FROM_A_PICTURE, adapter_name_and_hash, name_and_hash, names_a_file
from personalize.formats.adapter_folders import DIFFUSERS_FILE, MANIFEST, in_several_files
from personalize.formats.adapter_source import fetched
from personalize.formats.integrity import data_hash
from personalize.io.content_credentials import signed
from personalize.io.json_files import read_json
from personalize.io.output_folder import is_tensor_name
from personalize.io.provenance import Provenance, SourceType, photo_exif, picture_bytes

if TYPE_CHECKING:
    from personalize.editing.editor import Editor

NO_PROVENANCE = (
    "Note: --no_provenance: nothing in the pictures says that a model made them; where they are published or sold that "
    "may be required, in the EU by article 50 of the AI Act."
)


class PictureWriter:
    """Turns the pictures of one command into the bytes of PNG files that say how they were made.

    config: the command's options: `metadata`, `provenance`, `c2pa` and, for photos, `keep_exif`.
    photo: the file that was edited; None for pictures made from text.

    It is made before anything is drawn.  UserError if the pictures could not be signed as the options ask.
    """

    def __init__(self, config: Any, photo: Path | None = None) -> None:
        self.config = config
        self.kind: SourceType = "trainedAlgorithmicMedia" if photo is None else "compositeWithTrainedAlgorithmicMedia"
        keeps = photo is not None and getattr(config, "keep_exif", False)
        self.exif = photo_exif(photo) if keeps and photo is not None else None
        if not config.provenance:
            print(NO_PROVENANCE)
        if config.c2pa:  # a certificate and a key that do not belong together are found before a picture is drawn
            self(Image.new("RGB", (8, 8)))

    def __call__(self, picture: Image.Image, details: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of `picture`; `details` as `details_of` returns them, unless the options leave them out."""
        kept = details if self.config.metadata else None
        mark = Provenance(self.kind if self.config.provenance else None, kept, self.exif)
        content = picture_bytes(picture, mark)
        if not self.config.c2pa:
            return content
        certificate, key = self.config.c2pa
        return signed(content, certificate, key, self.kind)


def details_of(
    command: str, config: Any, editor: Editor, adapters: Iterable[Path], *, files: Mapping[str, Path] | None = None,
    **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """The JSON that draws a picture again.

    adapters, files: what the command read, whose names and hashes are kept, and never their paths.
    facts: prompt, seed, size and the like, as A1111's text has them; of these, `options` are added to, or override,
        the options taken from `config`.
    """
    options = kept_options(config) | facts.pop("options", {})
    return {
        **facts, "command": command, "options": options, "version": personalize.__version__,
        "base": _base(editor), "adapters": [_adapter(path) for path in adapters],
        "files": {name: name_and_hash(path) for name, path in (files or {}).items()},
    }  # fmt: skip


def _adapter(path: Path) -> dict[str, str]:
    """Name and hash of an adapter, and the hash by which A1111 knows the LoRA that it loads: of the tensors alone."""
    path = file = fetched(path)
    about = adapter_name_and_hash(path)
    if in_several_files(path):
        return about
    if path.is_dir():
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else {}
        file = path / str(manifest.get("twin") or DIFFUSERS_FILE)
    if not is_tensor_name(file) or not file.is_file():
        return about
    return {**about, "lora_hash": data_hash(file)}


def kept_options(config: Any) -> dict[str, Any]:
    """The options that are not at their defaults and name no file of this machine."""
    given = {}
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in NEVER_FROM_A_PICTURE or value == default or names_a_file(field.name, value):
            continue
        given[field.name] = list(value) if isinstance(value, tuple) else value
    return given


def _base(editor: Editor) -> dict[str, str]:
    return {key: editor.model.identity[key] for key in ("name", "sha256")}
