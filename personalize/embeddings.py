"""Edits of text embeddings: projection and subtraction, row by row.

A learned source embedding s and a target embedding p (both b, l, d) are mixed into e.  Each of the l token rows is
treated by itself; nothing here is ever flattened over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-12  # floor of ‖s_i‖: a zero row of the source leaves the target's row as it is


def project(
    source: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    *,
    widths: Sequence[int] | None = None,
) -> Tensor:
    """Keep `alpha` of the source and add `beta` of what the target says beyond it, separately in every row.

        u_i = s_i / max(‖s_i‖, 1e-12)        edit_i = p_i − (p_i · u_i) u_i        e_i = alpha · s_i + beta · edit_i

    `alpha` = 1, `beta` = 0 gives the source back.  Plain p needs the row values alpha_i = (p_i · s_i) / ‖s_i‖².

    Args:
        source, target: (b, l, d), or SDXL's pooled vector (b, e), which is one more row; b broadcasts.
        alpha, beta: numbers, or one value per row as a tensor (l,) or (b, l); values above 1 extrapolate.
        widths: widths of the text encoders' slices of d, each projected by itself (SDXL: 768, 1280), so that the
            encoder with the larger norm does not decide for both.

    Raises:
        ValueError: the shapes do not fit, or `widths` does not add up to d.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (vector projection).
    """
    _check(source, target)
    widths = [source.shape[-1]] if widths is None else list(widths)
    if sum(widths) != source.shape[-1]:
        raise ValueError(f"slice widths {widths} add up to {sum(widths)}, the embeddings have {source.shape[-1]}")
    parts = [
        _row(alpha) * _wide(s) + _row(beta) * edit_direction(s, p)
        for s, p in zip(source.split(widths, -1), target.split(widths, -1), strict=True)
    ]
    return torch.cat(parts, -1).to(source.dtype)


def edit_direction(source: Tensor, target: Tensor) -> Tensor:
    """The part of each target row orthogonal to the source row,  edit_i = p_i − (p_i · u_i) u_i,  in at least fp32."""
    unit = _wide(source) / torch.linalg.vector_norm(_wide(source), dim=-1, keepdim=True).clamp_min(TINY)
    return _wide(target) - (_wide(target) * unit).sum(-1, keepdim=True) * unit


def subtract(source: Tensor, target: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
    """Go from the source towards the target by `gamma`:  e = gamma · p + (1 − gamma) · s  (0: source, 1: target).

    Args:
        source, target: (b, l, d) or (b, e); b broadcasts.
        gamma: a number, or one value per row as a tensor (l,) or (b, l); above 1 goes past the target.

    Raises:
        ValueError: the shapes do not fit.

    References: Zhang et al., "Forgedit", arXiv 2309.10556 (vector subtraction); Kawar et al., "Imagic",
    arXiv 2210.09276, eq. 3.
    """
    _check(source, target)
    weight = _row(gamma)
    return (weight * _wide(target) + (1 - weight) * _wide(source)).to(source.dtype)


def _wide(rows: Tensor) -> Tensor:
    """At least fp32: half precision loses the small remainder of two nearly equal rows."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _row(value: float | Tensor) -> float | Tensor:
    return value[..., None] if isinstance(value, Tensor) and value.ndim else value


def _check(source: Tensor, target: Tensor) -> None:
    same = source.ndim == target.ndim and source.shape[1:] == target.shape[1:]
    if not same or (source.shape[0] != target.shape[0] and 1 not in (source.shape[0], target.shape[0])):
        raise ValueError(
            f"source embedding {tuple(source.shape)} and target embedding {tuple(target.shape)} differ: "
            "both must be (b, l, d) of the same base model"
        )
