"""Vector projection and subtraction of a whole conditioning: token embeddings of each text encoder and pooled ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from personalize.embeddings import project, subtract
from personalize.errors import UserError
from personalize.model import Conditioning, StableDiffusion


def edit_conditioning(
    model: StableDiffusion,
    source: Mapping[str, Tensor] | None,
    target: Conditioning,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float | None = None,
) -> Conditioning:
    """The learned `source` embedding edited towards `target` (b rows), as a conditioning.

    Vector projection with `alpha` and `beta`, or vector subtraction if `gamma` is given. With SDXL the slices of the
    two text encoders are projected separately, and the pooled embeddings are edited like one more row. For an adapter
    without a source embedding (trained with `--standalone`) the result is `target`.

    Raises:
        UserError: the source embedding has another shape than this base model's prompts.
    """
    if source is None:
        return target
    learned = {key: tensor.to(target.embeds) for key, tensor in source.items()}
    if learned["embeds"].shape[1:] != target.embeds.shape[1:]:
        raise UserError(
            f"the adapter's source embedding is {tuple(learned['embeds'].shape)}, this base's prompts are "
            f"{tuple(target.embeds.shape)}: the adapter was trained on another base model"
        )
    if gamma is not None:
        embeds = subtract(learned["embeds"], target.embeds, gamma)
    else:
        embeds = project(learned["embeds"], target.embeds, alpha, beta, widths=widths(model))
    pooled = target.pooled
    if pooled is not None and "pooled" in learned:
        rows = learned["pooled"], pooled
        pooled = subtract(*rows, gamma) if gamma is not None else project(*rows, alpha, beta)
    return Conditioning(embeds, pooled, target.time_ids)


def widths(model: StableDiffusion) -> list[int]:
    """The width of each text encoder's slice of d."""
    return [encoder.config.hidden_size for encoder in model.text_encoders]
