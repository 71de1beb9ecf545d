"""The front door: load a base and an adapter once, then ask for many pictures.

editor = Editor.load("my-cat")
pictures = editor.edit("a cat on the beach", alpha=0.8, beta=1.2, forget="decoder=0.5", seeds=[0, 1])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from personalize.adapter import Adapter
from personalize.attachment import loaded, parsed
from personalize.concepts import installed
from personalize.drag import DEFAULTS, DragSettings
from personalize.dragging import Dragged, Point, drag_picture
from personalize.errors import UserError
from personalize.files import write_folder
from personalize.frames import Picture
from personalize.images import to_image
from personalize.mixing import mixed
from personalize.model import Conditioning, StableDiffusion
from personalize.photo import PHOTO_DEFAULTS, Edited, PhotoSettings, Wish, edit_photo
from personalize.pictures import grid, png
from personalize.sampling import Edit, moves, sample
from personalize.text_lora import has_text

if TYPE_CHECKING:
    from personalize.commands import EditConfig


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: `steps` of `scheduler`, guidance (1 is off), size (H, W) in pixels."""

    steps: int = 50
    scheduler: str = "ddim"
    guidance_scale: float = 7.5
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Setting:
    """The strengths of one edit; `gamma` given means subtraction, otherwise projection with `alpha` and `beta`."""

    alpha: float = 0.8
    beta: float = 1.2
    gamma: float | None = None
    forget: str = "none"
    strength: float = 1.0

    def __str__(self) -> str:
        mix = f"α {self.alpha:g}  β {self.beta:g}" if self.gamma is None else f"γ {self.gamma:g}"
        forgotten = "" if self.forget == "none" else f"  forget {self.forget}"
        return mix + forgotten + ("" if self.strength == 1 else f"  strength {self.strength:g}")


class Editor:
    """A base model with one adapter at hand; nothing of the base is changed between calls."""

    def __init__(self, model: StableDiffusion, adapter: Adapter | None = None) -> None:
        self.model, self.adapter = model, adapter

    @staticmethod
    def load(folder: str | Path | Sequence[str | Path], base: str | Path | None = None, **settings: Any) -> Editor:
        """Load an adapter folder, or a LoRA file of any program, and its base: `base`, or the one it names.

        Several are used at once, as their sum: each learned token is a word of prompts.  `settings` as for
        StableDiffusion.load.

        Raises:
            UserError: no adapter there, it does not belong to this base's family, or two of them share a token.
        """
        adapter = loaded(folder)
        named = base if base is not None else adapter.info.get("base", {}).get("name")
        return Editor(StableDiffusion.load(None if named in (None, "", "embedded") else named, **settings), adapter)

    @staticmethod
    def configured(config: Any, adapters: Sequence[Path] = ()) -> Editor:
        """What a command's options ask for: base, revision, variant, precision and device; with `adapters` or none."""
        dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
        about = {"dtype": dtype, "device": "cpu" if config.cpu else None, "revision": config.revision,
                 "variant": config.variant}  # fmt: skip
        base = config.pretrained_model_name_or_path
        return Editor.load(adapters, base, **about) if adapters else Editor(StableDiffusion.load(base, **about))

    def edit(
        self, prompt: str, setting: Setting = Setting(), *, seeds: Sequence[int] = (0,), negative_prompt: str = "",
        sampling: Sampling = Sampling(), **strengths: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Pictures of the adapter's subject as `prompt` says, one per seed; `strengths` are fields of `Setting`.

        Raises:
            UserError: an empty prompt, or a forgetting rule that is unknown or selects nothing.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty: say what the picture should show")
        setting = Setting(**(asdict(setting) | strengths))
        size = sampling.size or self.size
        told = mixed(
            self.model, self._adapter.source, self._encoded(prompt, size, setting.strength),
            alpha=setting.alpha, beta=setting.beta, gamma=setting.gamma,
        )  # fmt: skip
        return self._draw(told, setting, seeds, negative_prompt, sampling)

    def reconstruct(self, *, seeds: Sequence[int] = (0,), sampling: Sampling = Sampling()) -> list[Image.Image]:
        """The source as the adapter remembers it: its source embedding (or its caption, if it has none) unedited."""
        caption = str(self._adapter.info.get("caption", ""))
        return self.edit(caption or "a picture", alpha=1.0, beta=0.0, seeds=seeds, sampling=sampling)

    def base(
        self, prompt: str, *, seeds: Sequence[int] = (0,), negative_prompt: str = "", sampling: Sampling = Sampling()
    ) -> list[Image.Image]:
        """What the base model draws for `prompt` without the adapter: the control of every comparison."""
        told = self._encoded(prompt, sampling.size or self.size)
        return self._draw(told, None, seeds, negative_prompt, sampling)

    def drag(
        self, points: Sequence[Point], picture: Picture, *, mask: Picture | None = None, prompt: str | None = None,
        settings: DragSettings = DEFAULTS, resolution: int | None = None, paste: bool = False,
    ) -> Dragged:  # fmt: skip
        """Drag what lies at each handle of `points` to its target; works with an adapter and without.

        `points` are (x, y) in pixels of `picture`: handle, target, handle, target, …  See `drag_picture`.
        """
        return drag_picture(
            self.model, picture, points, mask=mask, prompt=prompt, adapter=self.adapter, settings=settings,
            resolution=resolution, paste=paste,
        )  # fmt: skip

    def photo(
        self, picture: Picture, source: str, wish: Wish, settings: PhotoSettings = PHOTO_DEFAULTS, **more: Any
    ) -> Edited:
        """Edit a photo that shows `source` by text; works with an adapter and without.  See `edit_photo`."""
        return edit_photo(self.model, picture, source, wish, settings, adapter=self.adapter, **more)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the adapter was trained at, else the base's own."""
        height, width = (self.adapter.info if self.adapter else {}).get("size") or (self.model.resolution,) * 2
        return int(height), int(width)

    @property
    def _adapter(self) -> Adapter:
        if self.adapter is None:
            raise ValueError("this editor has no adapter: make it with Editor.load(folder) or Editor(model, adapter)")
        return self.adapter

    @torch.no_grad()
    def _encoded(self, prompt: str, size: tuple[int, int], strength: float = 0.0) -> Conditioning:
        """What the UNet is told of `prompt`, with the adapter's change of the text encoders and its learned tokens."""
        tokens = self.adapter.concepts if self.adapter and strength else {}
        with self.adapter.apply_text(self.model, strength) if self.adapter and strength else nullcontext():
            with installed(self.model, tokens):
                return self.model.prompts([prompt], size)

    def _draw(
        self,
        told: Conditioning,
        setting: Setting | None,
        seeds: Sequence[int],
        negative_prompt: str,
        sampling: Sampling,
    ) -> list[Image.Image]:
        size = sampling.size or self.size
        strength = setting.strength if setting else 0.0
        learned = self.adapter is not None and has_text(self.adapter.lora) and not self.model.zero_null
        negative = self._encoded(negative_prompt, size, strength) if negative_prompt or learned else None
        edit = Edit(told, negative, sampling.guidance_scale)
        if setting is not None and self._adapter.lora:
            edit = Edit(told, negative, sampling.guidance_scale, rule=rules(setting.forget), strength=setting.strength)
        steps = moves(self.model, sampling.steps, sampling.scheduler)
        with self.adapter.apply(self.model) if self.adapter and setting else nullcontext():
            latents = sample(self.model, edit, seeds, steps, size)
        return [to_image(row) for row in self.model.decode(latents)]


def rules(text: str) -> list[Any]:
    """Forgetting rules of "a" or "a+b", where a published name may itself hold a plus."""
    from personalize.forgetting import RULES

    return parsed([text] if text.partition("=")[0] in RULES else text.split("+")) if text != "none" else []


def run_edit(config: EditConfig) -> Path:
    """`personalize edit`: every combination of strengths and seeds as a picture, a labelled grid, and edits.json."""
    settings = list(_settings(config))
    editor = Editor.configured(config, (config.adapter, *config.add))
    seeds = list(config.seeds) or [config.seed + index for index in range(config.num_images)]
    size = (config.height or editor.size[0], config.width or editor.size[1])
    sampling = Sampling(config.num_inference_steps, config.scheduler, config.guidance_scale, size)
    rows = [
        editor.edit(config.prompt, setting, seeds=seeds, negative_prompt=config.negative_prompt, sampling=sampling)
        for setting in settings
    ]
    sheet = grid(
        rows, columns=[f"seed {seed}" for seed in seeds], labels=[str(s) for s in settings], title=config.prompt
    )
    files, found = {"grid.png": png(sheet)}, []
    for setting, row in zip(settings, rows, strict=True):
        for seed, picture in zip(seeds, row, strict=True):
            name = f"edit-{len(found):03d}.png"
            files[name] = png(picture)
            found.append({"file": name, "prompt": config.prompt, "seed": seed, **asdict(setting)})
    files["edits.json"] = json.dumps(found, indent=1).encode()
    write_folder(config.output_dir, files, keep=strangers(config.output_dir, ("edit-", "edits.json", "grid.png")))
    print(f"{len(found)} pictures and grid.png in {config.output_dir}")
    return config.output_dir


def strangers(folder: Path, ours: tuple[str, ...]) -> list[str]:
    """Names in `folder` that do not begin like one of `ours`: somebody else's, not to be touched."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(ours)] if folder.is_dir() else []


def _settings(config: EditConfig) -> list[Setting]:
    """All combinations; `--gamma` switches from projection to subtraction."""
    mixes = [(1.0, 1.0, gamma) for gamma in config.gamma] or [
        (a, b, None) for a, b in product(config.alpha, config.beta)
    ]
    return [Setting(*mix, forget, config.strength) for mix, forget in product(mixes, config.forget)]
