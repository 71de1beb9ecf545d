"""Arithmetic of whole LoRAs: several into one, exactly, and one into a narrower one, by SVD.

    Σ wᵢ ΔWᵢ = [w₁s₁B₁ … wₙsₙBₙ] [A₁; …; Aₙ]        s = alpha / rank: ranks add up, nothing is lost
    ΔW = B A ≈ U_k S_k V_kᵀ                            the nearest matrix of rank k (Eckart–Young)

A LoRA is in the house's names ("<component>.<path>.lora_A.weight" …) with one rank, as `formats.factor_pairs` reads it.
Convolutions are taken as matrices (out, in·k·k).  Results have alpha = rank: all strength is inside B.

Reference: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats import factor_pairs

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class WeightedLora:
    """One LoRA of a sum: its tensors, its alpha / rank, and its weight in the sum."""

    state: State
    strength: float
    weight: float = 1.0


@dataclass(frozen=True)
class RankReduction:
    """A LoRA of lower rank, and what that cost: ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius) over all, and of each module."""

    state: dict[str, Tensor]
    rank: int
    error: float
    errors: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"rank {self.rank}: relative error of the weight change {self.error:.2%}, "
            f"largest {self.errors[worst]:.2%} in {worst}"
        )


def concatenated(parts: Sequence[WeightedLora]) -> tuple[dict[str, Tensor], int]:
    """Σ weight · ΔW of all `parts` as one LoRA, exactly, and its rank; modules of any part are in it.

    Where a module is not in all parts, its factors are filled up with zeros to the one rank.

    Raises:
        UserError: no part, a weight that is not finite, or one module of two different shapes.
    """
    if not parts or not all(math.isfinite(part.weight) for part in parts):
        raise UserError(f"weights of a sum of adapters must be numbers, got {[part.weight for part in parts]}")
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in parts:
        for module, (a, b) in factor_pairs(part.state).items():
            found.setdefault(module, []).append((a.float(), b.float() * (part.strength * part.weight)))
    for module, factors in found.items():
        shapes = {(*b.shape[:1], *a.shape[1:]) for a, b in factors}
        if len(shapes) > 1:
            raise UserError(f"module {module} has shapes {sorted(shapes)}: the adapters are of different base models")
    joined = {m: (torch.cat([a for a, _ in f]), torch.cat([b for _, b in f], 1)) for m, f in found.items()}
    rank = max(len(a) for a, _ in joined.values())
    return _state({module: _widened(a, b, rank) for module, (a, b) in joined.items()}), rank


def reduced(state: State, strength: float, rank: int) -> RankReduction:
    """The nearest LoRA of `rank` to ΔW = strength · B A, module by module, and the relative errors.

    Raises:
        UserError: `rank` below 1, or no module.
    """
    if rank < 1:
        raise UserError(f"the rank must be a whole number from 1, got {rank}")
    modules = factor_pairs(state)
    if not modules:
        raise UserError("the adapter holds no LoRA module: there is nothing to reduce")
    found, errors, lost, whole = {}, {}, 0.0, 0.0
    for module, (a, b) in modules.items():
        found[module], kept = _nearest(a, b, strength, rank)
        tail, total = float(kept[rank:].square().sum()), float(kept.square().sum())
        errors[module] = math.sqrt(tail / total) if total else 0.0
        lost, whole = lost + tail, whole + total
    return RankReduction(_state(found), rank, math.sqrt(lost / whole) if whole else 0.0, errors)


def _nearest(a: Tensor, b: Tensor, strength: float, rank: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Factors of the nearest matrix of `rank`, and all singular values; both factors carry √S.

    With B = Q_b R_b and Aᵀ = Q_a R_a only the small matrix R_b R_aᵀ needs a decomposition.
    """
    q_b, r_b = torch.linalg.qr(b.flatten(1).double() * strength)
    q_a, r_a = torch.linalg.qr(a.flatten(1).double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    count = min(rank, len(values))
    root = values[:count].sqrt()
    up, down = (q_b @ u[:, :count]) * root, (q_a @ v[:count].T * root).T
    ones = (1,) * (b.ndim - 2)
    return _widened(down.float().reshape(count, *a.shape[1:]), up.float().reshape(len(b), count, *ones), rank), values


def _widened(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair with zeros added up to `rank`, which changes no ΔW."""
    missing = rank - len(a)
    return torch.cat([a, a.new_zeros(missing, *a.shape[1:])]), torch.cat(
        [b, b.new_zeros(len(b), missing, *b.shape[2:])], 1
    )


def _state(modules: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{module}.lora_{side}.weight": tensor.contiguous()
        for module, pair in modules.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
