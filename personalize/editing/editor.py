"""The `Editor`: a base model and an adapter, loaded once, and every way to make images with them.

editor = Editor.load("my-cat")
pictures = editor.edit("a cat on the beach", alpha=0.8, beta=1.2, forget="decoder=0.5", seeds=[0, 1])
best = editor.choose("a cat on the beach", source, budget=16)[0].picture
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import AdapterCopy, applied_text, load_adapters
from personalize.adapters.forgetting import parse_rule_sum
from personalize.adapters.lora_scales import lora_disabled
from personalize.adapters.merging import require_forgetting, require_scalable
from personalize.adapters.text_encoder_lora import has_text
from personalize.adapters.trained_size import trained_size
from personalize.editing.adapter_base import load_base
from personalize.editing.config import DEFAULT_SAMPLING, DEFAULT_STRENGTHS, EditStrengths, Sampling
from personalize.editing.defaults import largest_dial, text_to_image_guidance
from personalize.editing.drag.config import DEFAULTS as DRAG_DEFAULTS
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.image import DragResult, drag_picture, preview_picture
from personalize.editing.drag.preview import DragPreview
from personalize.editing.drag.reading import SourceCache
from personalize.editing.photo_settings import PHOTO_DEFAULTS, PhotoSettings
from personalize.editing.real_image import EditResult, edit_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.editing.search import Trial, ranked, search
from personalize.editing.vector_projection import edit_conditioning, worded
from personalize.errors import NonFiniteLatents, UserError
from personalize.evaluation.scorers import find_scorer
from personalize.evaluation.scoring import Request, Scorer
from personalize.io.images import to_image
from personalize.models.fast_paths import compiled_blocks
from personalize.models.image_processor import Picture, Point
from personalize.models.ranges import check_number
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.schedule import make_schedule


class Editor:
    """A base model and an adapter that is applied to it during each call; between calls the base is unchanged.

    As a context manager (`with Editor.load("my-cat") as editor:`) the editor applies the adapter once for the whole
    block instead of once for each call, which is faster with large bases; after the block the base is as before.
    """

    def __init__(self, model: StableDiffusion, adapter: Adapter | None = None) -> None:
        self.model, self.adapter = model, adapter
        self._sources = SourceCache()  # the picture that was dragged last, encoded and read
        self._entered: ExitStack | None = None  # removes the adapter at the end of a `with` block
        self._copy = AdapterCopy()

    def __enter__(self) -> Editor:
        if self._entered is not None:
            raise ValueError("this editor is in a `with` block already: leave that one first")
        with ExitStack() as stack:
            if self.adapter is not None:
                stack.enter_context(self._copy.of(self.adapter, self.model.device).apply(self.model))
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.close()

    @staticmethod
    def load(
        folder: str | Path | Sequence[str | Path], base: str | Path | None = None, *, allow_download: bool = False,
        **settings: Any,
    ) -> Editor:  # fmt: skip
        """Load an adapter folder, or a LoRA file of any program, and a base model.

        Args:
            folder: the adapter, or several that are applied together as their sum.
            base: the base model; by default the one that the adapter names.
            allow_download: get the base that the adapter names from the hub, if it was not downloaded before.
            settings: further arguments of `StableDiffusion.load`; see `load_base` for the prediction type.

        Raises:
            UserError: there is no adapter, it was trained on another family of bases, or two adapters share a token.
        """
        adapter = load_adapters(folder)
        return Editor(load_base(adapter, base, allow_download=allow_download, **settings), adapter)

    @staticmethod
    def configured(config: Any, adapters: Sequence[Path] = ()) -> Editor:
        """The editor for a command's options: base, revision, variant, precision, device, and `adapters` if any."""
        dtype = {None: None, "no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
        about = {"dtype": dtype, "device": "cpu" if config.cpu else None, "revision": config.revision,
                 "variant": config.variant, "prediction_type": config.prediction_type,
                 "inpainting": config.inpainting}  # fmt: skip
        base = config.pretrained_model_name_or_path
        if not adapters:
            return Editor(StableDiffusion.load(base, **about))
        return Editor.load(adapters, base, allow_download=config.allow_download, **about)

    def edit(
        self, prompt: str, strengths: EditStrengths = DEFAULT_STRENGTHS, *, seeds: Sequence[int] = (0,),
        negative_prompt: str = "", sampling: Sampling = DEFAULT_SAMPLING, **changes: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Images of the adapter's subject that show `prompt`, one for each seed.

        They start from the source embedding of the caption nearest to `prompt`, if the adapter has several; for another
        one make the editor with `adapter.starting_from(caption)`.  `prompt` is worded like it, see `align_prompt`.

        `changes` are fields of `EditStrengths` that take the place of those of `strengths`, such as alpha=0.8.

        Raises:
            UserError: the prompt is empty, or a forgetting rule is unknown or matches no layer of the adapter.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty: say what the picture should show")
        strengths = replace(strengths, **changes)
        size, start = sampling.size or self.size_for(prompt), self._adapter.starting_from(prompt=prompt)
        with torch.no_grad(), applied_text(self.model, self._adapter, strengths.strength):  # empty chunks of either too
            conditioning = edit_conditioning(
                self.model, start.source, self.model.prompts([worded(prompt, start)], size),
                alpha=strengths.alpha, beta=strengths.beta, gamma=strengths.gamma,
            )  # fmt: skip
        return self._sample(conditioning, size, strengths, seeds, negative_prompt, sampling)

    def reconstruct(self, *, seeds: Sequence[int] = (0,), sampling: Sampling = DEFAULT_SAMPLING) -> list[Image.Image]:
        """Images sampled from the adapter's source embedding without an edit, or from its caption if it has none."""
        return self.edit(self.caption or "a picture", alpha=1.0, beta=0.0, seeds=seeds, sampling=sampling)

    def base(
        self, prompt: str, *, seeds: Sequence[int] = (0,), negative_prompt: str = "",
        sampling: Sampling = DEFAULT_SAMPLING,
    ) -> list[Image.Image]:  # fmt: skip
        """Images of `prompt` by the base model without the adapter, to compare with."""
        size = sampling.size or self.size_for(prompt)
        return self._sample(self._encode(prompt, size), size, None, seeds, negative_prompt, sampling)

    def choose(
        self, prompt: str, source: Image.Image, *, budget: int = 16, seed: int = 0, scorer: Scorer | None = None,
        negative_prompt: str = "", sampling: Sampling = DEFAULT_SAMPLING,
    ) -> list[Trial]:  # fmt: skip
        """Search for the best strengths: `budget` images of `prompt`, the best first, with their strengths and scores.

        `source` is the image the adapter was trained on. `personalize.editing.search` describes the search; equal
        seeds give equal results.

        Raises:
            UserError: the prompt is empty, the budget is below 1, or there is no scorer for this base.
        """
        scorer = scorer or find_scorer(self.model.name, device=self.model.device)
        editor = copy(self)  # in the same `with` block; the prompt as it is worded may be nearer to another caption
        editor.adapter = self._adapter.starting_from(prompt=prompt)
        request = Request(self.align_prompt(prompt), editor.caption, source)
        trials = search(
            editor, request, scorer, budget=budget, seed=seed, negative_prompt=negative_prompt, sampling=sampling
        )
        return ranked(trials)

    def drag(
        self, points: Sequence[Any], picture: Picture, *, mask: Picture | None = None, prompt: str | None = None,
        settings: DragSettings = DRAG_DEFAULTS, resolution: int | None = None, paste: bool = False,
        add: Sequence[Point] = (), remove: Sequence[Point] = (),
    ) -> DragResult:  # fmt: skip
        """Drag the content at each handle point to its target point, with the adapter if there is one.

        `points` are (x, y) in pixels of `picture`: handle, target, handle, target, …  See `drag_picture`.
        """
        with self._adapter_removed():
            return drag_picture(
                self.model, picture, points, mask=mask, prompt=prompt, adapter=self.adapter, settings=settings,
                resolution=resolution, paste=paste, add=add, remove=remove, sources=self._sources,
            )  # fmt: skip

    def drag_preview(
        self, points: Sequence[Any], picture: Picture, *, mask: Picture | None = None, prompt: str | None = None,
        settings: DragSettings = DRAG_DEFAULTS, resolution: int | None = None, add: Sequence[Point] = (),
        remove: Sequence[Point] = (),
    ) -> DragPreview:  # fmt: skip
        """Show what `drag` with the same arguments would move and fill, without sampling.

        The first preview of a picture costs one prediction, which reads its attention; further ones, and the drag
        itself, use what the editor has kept of it.
        """
        with self._adapter_removed():
            return preview_picture(
                self.model, picture, points, mask=mask, prompt=prompt, adapter=self.adapter, settings=settings,
                resolution=resolution, add=add, remove=remove, sources=self._sources,
            )  # fmt: skip

    def align_prompt(self, prompt: str) -> str:
        """`prompt`, made to begin like the adapter's caption if the adapter has a source embedding, see `worded`."""
        return worded(prompt, self.adapter)

    @property
    def caption(self) -> str:
        """The (first) caption the adapter was trained with; "" if there is none."""
        return self.adapter.captions[0] if self.adapter else ""

    def caption_for(self, prompt: str) -> str:
        """The caption whose source embedding an edit to `prompt` starts from; "" if there is none."""
        return self.adapter.starting_from(prompt=prompt).captions[0] if self.adapter else ""

    def photo(
        self, picture: Picture, source: str, request: EditRequest, settings: PhotoSettings = PHOTO_DEFAULTS, **more: Any
    ) -> EditResult:
        """Edit a photo, described by the prompt `source`, with the adapter if there is one; see `edit_photo`."""
        with self._adapter_removed():
            return edit_photo(self.model, picture, source, request, settings, adapter=self.adapter, **more)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels at which the adapter learned its (first) picture, or else those of the base."""
        return self.size_for(self.caption)

    def size_for(self, prompt: str) -> tuple[int, int]:
        """`size` of the pictures with the caption that an edit to `prompt` starts from; UserError as `trained_size`."""
        info = self.adapter.starting_from(prompt=prompt).info if self.adapter else {}
        return trained_size(info.get("size"), self.model.resolution)

    @property
    def _adapter(self) -> Adapter:
        if self.adapter is None:
            raise ValueError("this editor has no adapter: make it with Editor.load(folder) or Editor(model, adapter)")
        return self.adapter

    @torch.no_grad()
    def _encode(self, prompt: str, size: tuple[int, int], strength: float | None = None) -> Conditioning:
        """The conditioning of `prompt`; with a `strength`, with the adapter's tokens and its text encoder LoRA."""
        if self.adapter is None or strength is None:
            return self.model.prompts([prompt], size)
        with applied_text(self.model, self.adapter, strength):
            return self.model.prompts([prompt], size)

    def _sample(
        self, conditioning: Conditioning, size: tuple[int, int], strengths: EditStrengths | None, seeds: Sequence[int],
        negative_prompt: str, sampling: Sampling,
    ) -> list[Image.Image]:  # fmt: skip
        """Sample images of `conditioning`, `size` high and wide; without `strengths`, by the base model alone."""
        if not len(seeds):
            raise UserError("there are no seeds: give one for each picture")
        for seed in seeds:
            check_number("seed", seed, kind=int)
        strength = strengths.strength if strengths else None
        changed = {**self.adapter.lora, **self.adapter.others} if self.adapter is not None else {}
        adapter_changes_null = has_text(changed) and not self.model.zero_null
        encode_negative = bool(negative_prompt) or adapter_changes_null
        negative = self._encode(negative_prompt, size, strength) if encode_negative else None
        scale = text_to_image_guidance(self.model.name) if sampling.guidance_scale is None else sampling.guidance_scale
        edit = Edit(conditioning, negative, scale)
        if strengths is not None:
            if rules := parse_rule_sum(strengths.forget):
                require_forgetting(self._adapter)
            if strengths.strength != 1:
                require_scalable(self._adapter, "a strength")
            if self._adapter.changes_unet:
                edit = replace(edit, rule=rules, strength=strengths.strength)
        schedule = make_schedule(self.model, sampling.steps, sampling.scheduler)
        with self._applied(strengths is not None), compiled_blocks(self.model.unet, sampling.torch_compile):
            latents = sample(self.model, edit, seeds, schedule, size, sampling.cuda_graph)
        try:
            return [to_image(row) for row in self.model.decode(latents)]
        except NonFiniteLatents as error:
            dial = largest_dial(strengths, scale)
            raise NonFiniteLatents(f"the picture would be black: its latents are not finite; lower {dial}") from error

    def applied_throughout(self) -> AbstractContextManager[object]:
        """A context in which the adapter stays applied between calls; also allowed inside a `with` block."""
        return self if self._entered is None else nullcontext()

    def _applied(self, wanted: bool) -> AbstractContextManager[None]:
        """A context in which the adapter's UNet part is applied or not, inside and outside of a `with` block."""
        if self.adapter is None:
            return nullcontext()
        if self._entered is None:
            return self._copy.of(self.adapter, self.model.device).apply(self.model) if wanted else nullcontext()
        if wanted:
            return nullcontext()
        return self._adapter_removed() if self.adapter.others else lora_disabled(self.model.unet)

    @contextmanager
    def _adapter_removed(self) -> Iterator[None]:
        """Run the body without the adapter that a `with` block applied; the callee applies it itself."""
        if self._entered is None:
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()
