"""A LoRA of lower rank, the nearest one, and the error that this makes.

    ΔW = B A ≈ U_k S_k V_kᵀ      the nearest matrix of rank k (Eckart–Young)

Convolutions count as matrices (out, in·k·k).  Strengths are multiplied into the factors.

Reference: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.io.progress import ticked

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By module: A (r, in[, k, k]) and B (out, r[, 1, 1])."""


@dataclass(frozen=True)
class RankReduction:
    """A LoRA of lower rank and its relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius norm).

    pairs, rank: the LoRA, with alpha = rank.  error: over all modules together.  errors: of each module.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    rank: int
    error: float
    errors: dict[str, float]

    @property
    def state(self) -> dict[str, Tensor]:
        """The LoRA in PEFT's names."""
        return peft_state(self.pairs)

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"rank {self.rank}: relative error of the weight change {self.error:.2%}, "
            f"largest {self.errors[worst]:.2%} in {worst}"
        )


def reduced_pairs(modules: Pairs, strength: float, rank: int) -> RankReduction:
    """The nearest LoRA of the given `rank` to ΔW = strength · B A, found for each module by itself, and its errors.

    Raises:
        UserError: `rank` is below 1, or there is no module.
    """
    if rank < 1:
        raise UserError(f"the rank must be a whole number from 1, got {rank}")
    if not modules:
        raise UserError("the adapter holds no LoRA module: there is nothing to reduce")
    nearest, errors, lost, whole = {}, {}, 0.0, 0.0
    for module, (a, b) in ticked(modules.items(), "Reducing the rank"):
        nearest[module], values = _nearest(a, b, strength, rank)
        tail, total = float(values[rank:].square().sum()), float(values.square().sum())
        errors[module] = math.sqrt(tail / total) if total else 0.0
        lost, whole = lost + tail, whole + total
    return RankReduction(nearest, rank, math.sqrt(lost / whole) if whole else 0.0, errors)


def lowered_pairs(modules: Pairs, strength: float, rank: int) -> RankReduction:
    """`reduced_pairs`; also UserError unless `rank` is below the rank that the LoRA has."""
    present = max((len(a) for a, _ in modules.values()), default=0)
    if modules and rank >= present:
        raise UserError(f"the adapter has rank {present}: --rank must be lower, got {rank}")
    return reduced_pairs(modules, strength, rank)


def _nearest(a: Tensor, b: Tensor, strength: float, rank: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Factors (A, B) of the nearest matrix of `rank`, each multiplied by √S, and all singular values S.

    With the QR decompositions B = Q_b R_b and Aᵀ = Q_a R_a, only the small matrix R_b R_aᵀ needs an SVD.
    """
    q_b, r_b = torch.linalg.qr(b.flatten(1).double() * strength)
    q_a, r_a = torch.linalg.qr(a.flatten(1).double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    count = min(rank, len(values))
    root = values[:count].sqrt()
    up, down = (q_b @ u[:, :count]) * root, (q_a @ v[:count].T * root).T
    ones = (1,) * (b.ndim - 2)
    return zero_padded(
        down.float().reshape(count, *a.shape[1:]), up.float().reshape(len(b), count, *ones), rank
    ), values


def zero_padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B padded with zeros to `rank`, which leaves ΔW as it is."""
    missing = rank - len(a)
    return torch.cat([a, a.new_zeros(missing, *a.shape[1:])]), torch.cat(
        [b, b.new_zeros(len(b), missing, *b.shape[2:])], 1
    )


def peft_state(modules: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Tensors in PEFT's names of the pairs (A, B) by module."""
    return {
        f"{module}.lora_{side}.weight": tensor.contiguous()
        for module, pair in modules.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
