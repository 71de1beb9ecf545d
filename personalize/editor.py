"""The front door: load a base and an adapter once, then ask for many pictures.

editor = Editor.load("my-cat")
pictures = editor.edit("a cat on the beach", alpha=0.8, beta=1.2, forget="decoder=0.5", seeds=[0, 1])
best = editor.choose("a cat on the beach", source, budget=16)[0].picture
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from personalize.adapter import Adapter
from personalize.attachment import load_adapters
from personalize.calibrated import text_to_image_guidance
from personalize.captions import aligned
from personalize.choosing import Trial, ranked, search
from personalize.concepts import installed
from personalize.drag import DEFAULTS, DragSettings
from personalize.dragging import DragResult, Point, drag_picture
from personalize.errors import UserError
from personalize.frames import Picture
from personalize.images import to_image
from personalize.lora import without_lora
from personalize.mixing import edit_conditioning
from personalize.model import Conditioning, StableDiffusion
from personalize.photo import PHOTO_DEFAULTS, EditRequest, EditResult, PhotoSettings, edit_photo
from personalize.sampling import Edit, make_schedule, sample
from personalize.scorers import find_scorer
from personalize.scoring import Request, Scorer
from personalize.settings import DEFAULT_SAMPLING, DEFAULT_STRENGTHS, EditStrengths, Sampling, parse_rule_sum
from personalize.text_lora import has_text


class Editor:
    """A base model with one adapter at hand; nothing of the base is changed between calls.

    As a context manager (`with Editor.load("my-cat") as editor:`) the adapter stays in the base for the whole block
    instead of for each call, which spares time on large bases; after the block the base is as before.
    """

    def __init__(self, model: StableDiffusion, adapter: Adapter | None = None) -> None:
        self.model, self.adapter = model, adapter
        self._held: ExitStack | None = None

    def __enter__(self) -> Editor:
        if self._held is not None:
            raise ValueError("this editor is open already")
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.enter_context(self.adapter.apply(self.model))
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()

    @staticmethod
    def load(folder: str | Path | Sequence[str | Path], base: str | Path | None = None, **settings: Any) -> Editor:
        """Load an adapter folder, or a LoRA file of any program, and its base: `base`, or the one it names.

        Several are used at once, as their sum: each learned token is a word of prompts.  `settings` as for
        StableDiffusion.load.

        Raises:
            UserError: no adapter there, it does not belong to this base's family, or two of them share a token.
        """
        adapter = load_adapters(folder)
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
        self, prompt: str, setting: EditStrengths = DEFAULT_STRENGTHS, *, seeds: Sequence[int] = (0,), negative_prompt: str = "",
        sampling: Sampling = DEFAULT_SAMPLING, **strengths: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Pictures of the adapter's subject as `prompt` says, one per seed; `strengths` are fields of `EditStrengths`.

        Raises:
            UserError: an empty prompt, or a forgetting rule that is unknown or selects nothing.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty: say what the picture should show")
        setting = EditStrengths(**(asdict(setting) | strengths))
        size = sampling.size or self.size
        told = edit_conditioning(
            self.model, self._adapter.source, self._encoded(prompt, size, setting.strength),
            alpha=setting.alpha, beta=setting.beta, gamma=setting.gamma,
        )  # fmt: skip
        return self._draw(told, setting, seeds, negative_prompt, sampling)

    def reconstruct(self, *, seeds: Sequence[int] = (0,), sampling: Sampling = DEFAULT_SAMPLING) -> list[Image.Image]:
        """The source as the adapter remembers it: its source embedding (or its caption, if it has none) unedited."""
        return self.edit(self.caption or "a picture", alpha=1.0, beta=0.0, seeds=seeds, sampling=sampling)

    def base(
        self, prompt: str, *, seeds: Sequence[int] = (0,), negative_prompt: str = "", sampling: Sampling = DEFAULT_SAMPLING
    ) -> list[Image.Image]:
        """What the base model draws for `prompt` without the adapter: the control of every comparison."""
        told = self._encoded(prompt, sampling.size or self.size)
        return self._draw(told, None, seeds, negative_prompt, sampling)

    def choose(
        self, prompt: str, source: Image.Image, *, budget: int = 16, seed: int = 0, scorer: Scorer | None = None,
        negative_prompt: str = "", sampling: Sampling = DEFAULT_SAMPLING,
    ) -> list[Trial]:  # fmt: skip
        """Let the strengths be chosen: `budget` pictures of `prompt`, the best first, each with setting and scores.

        `source` is the picture the adapter learned.  See `personalize.choosing`; equal seeds give equal results.

        Raises:
            UserError: an empty prompt, a budget below 1, or no scorer for this base.
        """
        scorer = scorer or find_scorer(self.model.name, device=self.model.device)
        request = Request(self.aligned(prompt), self.caption, source)
        trials = search(
            self, request, scorer, budget=budget, seed=seed, negative_prompt=negative_prompt, sampling=sampling
        )
        return ranked(trials)

    def drag(
        self, points: Sequence[Point], picture: Picture, *, mask: Picture | None = None, prompt: str | None = None,
        settings: DragSettings = DEFAULTS, resolution: int | None = None, paste: bool = False,
    ) -> DragResult:  # fmt: skip
        """Drag what lies at each handle of `points` to its target; works with an adapter and without.

        `points` are (x, y) in pixels of `picture`: handle, target, handle, target, …  See `drag_picture`.
        """
        with self._set_aside():
            return drag_picture(
                self.model, picture, points, mask=mask, prompt=prompt, adapter=self.adapter, settings=settings,
                resolution=resolution, paste=paste,
            )  # fmt: skip

    def aligned(self, prompt: str) -> str:
        """`prompt` with the beginning of the adapter's caption, where a source embedding is edited word by word."""
        return aligned(prompt, self.caption) if self.adapter is not None and self.adapter.source else prompt

    @property
    def caption(self) -> str:
        """What the adapter's picture shows, in the words it was learned with; "" if there are none."""
        return str(self.adapter.info.get("caption", "")) if self.adapter else ""

    def photo(
        self, picture: Picture, source: str, request: EditRequest, settings: PhotoSettings = PHOTO_DEFAULTS, **more: Any
    ) -> EditResult:
        """Edit a photo that shows `source` by text; works with an adapter and without.  See `edit_photo`."""
        with self._set_aside():
            return edit_photo(self.model, picture, source, request, settings, adapter=self.adapter, **more)

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
        setting: EditStrengths | None,
        seeds: Sequence[int],
        negative_prompt: str,
        sampling: Sampling,
    ) -> list[Image.Image]:
        size = sampling.size or self.size
        strength = setting.strength if setting else 0.0
        learned = self.adapter is not None and has_text(self.adapter.lora) and not self.model.zero_null
        negative = self._encoded(negative_prompt, size, strength) if negative_prompt or learned else None
        scale = text_to_image_guidance(self.model.name) if sampling.guidance_scale is None else sampling.guidance_scale
        edit = Edit(told, negative, scale)
        if setting is not None and self._adapter.lora:
            edit = Edit(told, negative, scale, rule=parse_rule_sum(setting.forget), strength=setting.strength)
        steps = make_schedule(self.model, sampling.steps, sampling.scheduler)
        with self._applied(setting is not None):
            latents = sample(self.model, edit, seeds, steps, size)
        return [to_image(row) for row in self.model.decode(latents)]

    def held(self) -> AbstractContextManager[object]:
        """This editor opened for a block, or left as it is if it is open already."""
        return self if self._held is None else nullcontext()

    def _applied(self, wanted: bool) -> AbstractContextManager[None]:
        """The adapter in the base, or not, whether it is held there or not."""
        if self.adapter is None:
            return nullcontext()
        if self._held is None:
            return self.adapter.apply(self.model) if wanted else nullcontext()
        return nullcontext() if wanted else without_lora(self.model.unet)

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Run the body with a held adapter taken out of the base."""
        if self._held is None:
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
