"""Apply an adapter to a base model, or to a diffusers pipeline of the user (`attach`).

with personalize.attach(pipe, "my-cat") as my_cat:
    image = pipe(prompt_embeds=my_cat.embeds("a cat on the beach", alpha=0.9, beta=1.0)).images[0]
    image = pipe(**my_cat.inputs("a cat on the beach")).images[0]           # SDXL wants pooled rows too
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied, load_adapters
from personalize.adapters.forgetting import ForgettingRule, parse_rules
from personalize.adapters.lora_scales import scaled
from personalize.adapters.merging import require_forgetting
from personalize.editing.adapter_base import notice_other_prediction
from personalize.editing.config import DEFAULT_STRENGTHS
from personalize.editing.vector_projection import edit_conditioning, worded
from personalize.models.conditioning import of_one_length
from personalize.models.stable_diffusion import Conditioning, StableDiffusion


@dataclass(frozen=True)
class Attached:
    """An adapter that is attached to a pipeline; computes prompt embeddings with its learned source embedding."""

    model: StableDiffusion
    adapter: Adapter

    def embeds(
        self,
        prompt: str,
        *,
        alpha: float = DEFAULT_STRENGTHS.alpha,
        beta: float = DEFAULT_STRENGTHS.beta,
        gamma: float | None = DEFAULT_STRENGTHS.gamma,
    ) -> Tensor:
        """The source embedding edited towards `prompt`, (1, l, d), to be passed to the pipeline as `prompt_embeds`.

        If the adapter learned pictures of several captions, it is that of the caption nearest to `prompt`, which is
        made to begin like it, see `align_prompt`.

        With vector projection, `alpha` is the weight of the source and `beta` that of the part of the prompt orthogonal
        to it; the defaults are those of `Editor.edit` and of `personalize edit`. If `gamma` is given, vector
        subtraction is used: 0 is the source, 1 the prompt. See `personalize.editing.vector_projection`.

        Pipelines want negative embeddings of as many tokens, which they make themselves only for prompts of at most 75:
        for longer ones take `inputs`.
        """
        return self._conditioning(prompt, alpha, beta, gamma).embeds

    def inputs(
        self,
        prompt: str,
        *,
        alpha: float = DEFAULT_STRENGTHS.alpha,
        beta: float = DEFAULT_STRENGTHS.beta,
        gamma: float | None = DEFAULT_STRENGTHS.gamma,
        negative_prompt: str = "",
    ) -> dict[str, Tensor]:
        """The pipeline arguments that replace `prompt` and `negative_prompt`, with SDXL's pooled embeddings."""
        conditioning = self._conditioning(prompt, alpha, beta, gamma)
        null = self._encode(negative_prompt) if negative_prompt else self._null()
        conditioning, null = of_one_length([conditioning, null])
        arguments = {"prompt_embeds": conditioning.embeds, "negative_prompt_embeds": null.embeds}
        if conditioning.pooled is not None and null.pooled is not None:
            arguments |= {"pooled_prompt_embeds": conditioning.pooled, "negative_pooled_prompt_embeds": null.pooled}
        return arguments

    def _conditioning(self, prompt: str, alpha: float, beta: float, gamma: float | None) -> Conditioning:
        start = self.adapter.starting_from(prompt=prompt)
        target = self._encode(worded(prompt, start))
        edited = edit_conditioning(self.model, start.source, target, alpha=alpha, beta=beta, gamma=gamma)
        return edited.to(dtype=self.model.dtype)

    @torch.no_grad()
    def _encode(self, prompt: str) -> Conditioning:
        return self.model.prompts([prompt]).to(dtype=self.model.dtype)

    @torch.no_grad()
    def _null(self) -> Conditioning:
        return self.model.null().to(dtype=self.model.dtype)


@contextmanager
def attach(
    pipe: Any,
    folder: str | Path | Sequence[str | Path],
    *,
    forget: str | ForgettingRule | Sequence[str | ForgettingRule] | None = None,
    strength: float = 1.0,
) -> Iterator[Attached]:
    """Apply the adapter in `folder` to the diffusers pipeline `pipe` inside a `with` block; then `pipe` is as before.

    `pipe` is a text-to-image, image-to-image, inpainting or ControlNet pipeline of Stable Diffusion or SDXL, with any
    base of the family that the adapter was trained on (a fine-tuned one gives images in its own style). Inside the
    block the pipeline's tokenizers know the learned tokens, so that ordinary prompts may contain them. Several folders
    are applied as their sum, without their source embeddings.

    Args:
        forget: forgetting rules, e.g. "decoder=0.5", or "decoder=0.5+encoderattn" for both.
        strength: factor on the LoRA: 0 leaves it out, 1 is as trained; `embeds` does not depend on it.

    Raises:
        UserError: `folder` is no adapter, it is of another family, or a rule matches no layer of it or does not scale
            all that it changes.
    """
    adapter = load_adapters(folder)
    model = StableDiffusion.from_pipeline(pipe)
    notice_other_prediction(adapter, model)
    rules = parse_rules(forget)
    if rules:
        require_forgetting(adapter)
    with applied(model, adapter, strength, any_base=True):
        with scaled(model.unet, rules, strength) if adapter.changes_unet else nullcontext():
            with _tokenizers(pipe, model):
                yield Attached(model, adapter)


@contextmanager
def _tokenizers(pipe: Any, model: StableDiffusion) -> Iterator[None]:
    """Run the body with `model`'s tokenizers in `pipe`; afterwards `pipe` has its own ones again."""
    names = [name for name in ("tokenizer", "tokenizer_2") if getattr(pipe, name, None) is not None]
    before = {name: getattr(pipe, name) for name in names}
    try:
        for name, tokenizer in zip(names, model.tokenizers, strict=True):
            setattr(pipe, name, tokenizer)
        yield
    finally:
        for name, tokenizer in before.items():
            setattr(pipe, name, tokenizer)
