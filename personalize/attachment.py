"""An adapter inside a base model, or inside the user's own stock diffusers pipeline.

with personalize.attach(pipe, "my-cat") as my_cat:
    image = pipe(prompt_embeds=my_cat.embeds("a cat on the beach", alpha=0.8, beta=1.2)).images[0]
    image = pipe(**my_cat.inputs("a cat on the beach")).images[0]           # SDXL wants pooled rows too
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.adapter import Adapter
from personalize.concepts import installed
from personalize.exporting import merged
from personalize.forgetting import ForgettingRule, parse_rule
from personalize.lora import scaled
from personalize.mixing import edit_conditioning
from personalize.model import Conditioning, StableDiffusion


@dataclass(frozen=True)
class Attached:
    """What an attached adapter adds to a pipeline: prompts read through its learned source embedding."""

    model: StableDiffusion
    adapter: Adapter

    def embeds(self, prompt: str, *, alpha: float = 1.0, beta: float = 1.0, gamma: float | None = None) -> Tensor:
        """`prompt` mixed with the learned source, (1, l, d), to be passed as `prompt_embeds`.

        `alpha` is how much of the source is kept, `beta` how much of what `prompt` says beyond it is added (vector
        projection); with `gamma` the source goes towards the prompt by that share instead (vector subtraction).
        """
        return self._conditioning(prompt, alpha, beta, gamma).embeds

    def inputs(
        self,
        prompt: str,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float | None = None,
        negative_prompt: str = "",
    ) -> dict[str, Tensor]:
        """Everything a pipeline call takes instead of `prompt` and `negative_prompt`, pooled rows of SDXL included."""
        told = self._conditioning(prompt, alpha, beta, gamma)
        null = self._encoded(negative_prompt) if negative_prompt else self._null()
        given = {"prompt_embeds": told.embeds, "negative_prompt_embeds": null.embeds}
        if told.pooled is not None and null.pooled is not None:
            given |= {"pooled_prompt_embeds": told.pooled, "negative_pooled_prompt_embeds": null.pooled}
        return given

    def _conditioning(self, prompt: str, alpha: float, beta: float, gamma: float | None) -> Conditioning:
        told = edit_conditioning(self.model, self.adapter.source, self._encoded(prompt), alpha=alpha, beta=beta, gamma=gamma)
        return told.to(dtype=self.model.dtype)

    @torch.no_grad()
    def _encoded(self, prompt: str) -> Conditioning:
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
    """Put the adapter in `folder` into `pipe` for the time of the `with` block; afterwards `pipe` is as before.

    Works on stock text-to-image, image-to-image, inpainting and ControlNet pipelines of Stable Diffusion and SDXL, of
    any base of the family the adapter was trained on (a fine-tuned relative draws it in its own manner).  Learned
    tokens are words of the pipeline's tokenizers meanwhile: plain prompts may use them.  Several folders are attached
    as their sum, without source embeddings.

    Args:
        forget: forgetting rules, e.g. "decoder=0.5" or "encoderattn".
        strength: multiplies the whole adapter; 0 is the base model, 1 what was learned.

    Raises:
        UserError: `folder` is no adapter, it is of another family, or a rule selects nothing of it.
    """
    adapter = load_adapters(folder)
    model = StableDiffusion.from_pipeline(pipe)
    with applied(model, adapter, strength, any_base=True), scaled(model.unet, parse_rules(forget), strength):
        with _tokenizers(pipe, model):
            yield Attached(model, adapter)


@contextmanager
def applied(
    model: StableDiffusion, adapter: Adapter | None, text_strength: float = 1.0, *, any_base: bool = False
) -> Iterator[None]:
    """Run the body with all of `adapter` in `model`: LoRA in UNet and text encoders, learned tokens; then as before."""
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(adapter.apply(model, any_base=any_base))
            stack.enter_context(adapter.apply_text(model, text_strength))
            stack.enter_context(installed(model, adapter.concepts))
        yield


def load_adapters(folder: str | Path | Sequence[str | Path]) -> Adapter:
    """The adapter in `folder`, or the sum of those in several folders; UserError if they do not go together."""
    if isinstance(folder, str | Path):
        return Adapter.load(folder)
    found = [Adapter.load(one) for one in folder]
    return found[0] if len(found) == 1 else merged(found, [1.0] * len(found), [str(one) for one in folder])


@contextmanager
def _tokenizers(pipe: Any, model: StableDiffusion) -> Iterator[None]:
    """Run the body with `model`'s tokenizers in `pipe`, and its own ones afterwards."""
    names = [name for name in ("tokenizer", "tokenizer_2") if getattr(pipe, name, None) is not None]
    before = {name: getattr(pipe, name) for name in names}
    try:
        for name, tokenizer in zip(names, model.tokenizers, strict=True):
            setattr(pipe, name, tokenizer)
        yield
    finally:
        for name, tokenizer in before.items():
            setattr(pipe, name, tokenizer)


def parse_rules(forget: str | ForgettingRule | Sequence[str | ForgettingRule] | None) -> list[ForgettingRule]:
    """Forgetting rules however they were given."""
    given = [] if forget is None else [forget] if isinstance(forget, str | ForgettingRule) else forget
    return [rule if isinstance(rule, ForgettingRule) else parse_rule(rule) for rule in given]
