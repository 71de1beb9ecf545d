"""Vector projection and vector subtraction: edit a learned source embedding towards the embedding of a prompt.

The source embedding s and the target embedding p, both (b, l, d), give the edited embedding e (b, l, d). Each of the l
token rows is treated separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.editing.config import DEFAULT_STRENGTHS
from personalize.errors import UserError
from personalize.models.prompts import align_prompt
from personalize.models.ranges import check_number
from personalize.models.stable_diffusion import Conditioning, StableDiffusion

TINY = 1e-12  # least ‖s_i‖ in the division: where the source row is zero, the edit is the whole target row


def project(
    source: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    *,
    widths: Sequence[int] | None = None,
) -> Tensor:
    """Vector projection: `alpha` times the source plus `beta` times the target's part orthogonal to it, row by row.

        u_i = s_i / max(‖s_i‖, 1e-12)        edit_i = p_i − (p_i · u_i) u_i        e_i = alpha · s_i + beta · edit_i

    `alpha` = 1, `beta` = 0 returns the source; alpha_i = (p_i · s_i) / ‖s_i‖², `beta` = 1 returns the target.  With the
    defaults, which are not those of an edit (`DEFAULT_STRENGTHS`), nothing is weighted.

    Args:
        source, target: (b, l, d), or SDXL's pooled embeddings (b, e), which count as one row; b broadcasts.
        alpha, beta: numbers, or one value per row as a tensor (l,) or (b, l); values above 1 extrapolate.
        widths: widths of the text encoders' slices of d (SDXL: 768, 1280). Each slice is projected separately, because
            otherwise the encoder with the larger norm would dominate.

    Raises:
        ValueError: the shapes differ, or `widths` does not add up to d.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (vector projection).
    """
    _check(source, target)
    widths = [source.shape[-1]] if widths is None else list(widths)
    if sum(widths) != source.shape[-1]:
        raise ValueError(f"slice widths {widths} add up to {sum(widths)}, the embeddings have {source.shape[-1]}")
    parts = [
        _row(alpha) * _upcast(s) + _row(beta) * edit_direction(s, p)
        for s, p in zip(source.split(widths, -1), target.split(widths, -1), strict=True)
    ]
    return torch.cat(parts, -1).to(source.dtype)


def edit_direction(source: Tensor, target: Tensor) -> Tensor:
    """The part of each target row orthogonal to the source row,  edit_i = p_i − (p_i · u_i) u_i;  at least fp32."""
    unit = _upcast(source) / torch.linalg.vector_norm(_upcast(source), dim=-1, keepdim=True).clamp_min(TINY)
    return _upcast(target) - (_upcast(target) * unit).sum(-1, keepdim=True) * unit


def subtract(source: Tensor, target: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
    """Vector subtraction: interpolate from source to target,  e = s + gamma (p − s);  0: source, 1: target.

    Args:
        source, target: (b, l, d) or (b, e); b broadcasts.
        gamma: a number, or one value per row as a tensor (l,) or (b, l); values above 1 extrapolate.

    Raises:
        ValueError: the shapes differ.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (vector subtraction); Kawar et al., "Imagic",
    arXiv 2210.09276, eq. 3.
    """
    _check(source, target)
    weight = _row(gamma)
    return (weight * _upcast(target) + (1 - weight) * _upcast(source)).to(source.dtype)


def _upcast(rows: Tensor) -> Tensor:
    """`rows` in fp32 or better: in half precision the small difference of two nearly equal rows is lost."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _row(value: float | Tensor) -> float | Tensor:
    """A value per row with an axis for d, to be multiplied with embeddings."""
    return value[..., None] if isinstance(value, Tensor) and value.ndim else value


def _check(source: Tensor, target: Tensor) -> None:
    same = source.ndim == target.ndim and source.shape[1:] == target.shape[1:]
    if not same or (source.shape[0] != target.shape[0] and 1 not in (source.shape[0], target.shape[0])):
        raise ValueError(
            f"source embedding {tuple(source.shape)} and target embedding {tuple(target.shape)} differ: "
            "both must be (b, l, d) of the same base model"
        )


def worded(prompt: str, adapter: Adapter | None) -> str:
    """`prompt` made to begin like the caption whose source embedding it edits, if the adapter has one.

    The embedding is edited token by token, so that words at the same place must correspond; see
    `personalize.models.prompts.align_prompt`.
    """
    if adapter is None or adapter.source is None:
        return prompt
    return align_prompt(prompt, adapter.starting_from(prompt=prompt).captions[0])


def edit_conditioning(
    model: StableDiffusion,
    source: Mapping[str, Tensor] | None,
    target: Conditioning,
    *,
    alpha: float = DEFAULT_STRENGTHS.alpha,
    beta: float = DEFAULT_STRENGTHS.beta,
    gamma: float | None = DEFAULT_STRENGTHS.gamma,
) -> Conditioning:
    """The learned `source` embedding edited towards `target` (b rows), as a conditioning.

    Vector projection with `alpha` and `beta`, or vector subtraction if `gamma` is given. With SDXL the slices of the
    two text encoders are projected separately, and the pooled embeddings are edited like one more row. If source and
    target have different numbers of chunks of 75 tokens, chunks of the empty text are put behind the shorter. For an
    adapter without a source embedding (trained with `--standalone`) the result is `target`.

    Raises:
        UserError: a strength that is no finite number in its range, or a source embedding of another shape than this
            base model's prompts.
    """
    for name, strength in {"alpha": alpha, "beta": beta, "gamma": 0.0 if gamma is None else gamma}.items():
        check_number(name, strength)
    if source is None:
        return target
    learned = {key: tensor.to(target.embeds) for key, tensor in source.items()}
    if learned["embeds"].shape[-1] == target.embeds.shape[-1]:
        target = model.padded(target, learned["embeds"].shape[1])
        learned["embeds"] = model.padded(Conditioning(learned["embeds"]), target.embeds.shape[1]).embeds
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
