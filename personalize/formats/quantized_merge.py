"""How much of a LoRA survives when a program merges it into a base whose weights are quantized.

    W = Q(W₀)      what a quantized base holds
    D = Q(W + ΔW) − W      what is left of ΔW after the sum has been rounded again

    kept = ⟨D, ΔW⟩ / ‖ΔW‖²      1: all of it; 0: nothing, for ΔW is smaller than half a step
    error = ‖D − ΔW‖ / ‖ΔW‖      1: as much noise as adapter

A trainer that keeps the LoRA beside the base shows all of ΔW, which is why its pictures can be better than those of a
program that merges.  Q rounds to the nearest; ComfyUI rounds fp8 up or down at random, which keeps ΔW on average and
makes the error larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from personalize.formats.coverage import block_of, kind_of
from personalize.formats.lora_keys import with_text_model
from personalize.formats.reader_keys import Factors
from personalize.io.progress import ticked
from personalize.models.empty import adaptable_layers, parts_of
from personalize.models.rounding import LINEAR_ALONE, ROUNDINGS

STRENGTHS = (1, 2, 4, 8, 16, 32, 64)
LARGEST_ERROR = 0.5  # of ‖ΔW‖: twice as much adapter as noise counts as survived
POWER_STEPS = 8  # of the power iteration for the largest singular value
ABOVE = 1.05  # times the noise's largest singular value, which the power iteration finds up to some per cent too low
SHOWN = 12  # modules in the text, those with the largest error


@dataclass(frozen=True)
class Survival:
    """What a merge into a quantized base leaves of one module's ΔW.

    kept, error: see above.  strength: the lowest of STRENGTHS at which the error is at most LARGEST_ERROR, None if
    there is none.  rank: how many of the module's components are above the noise: those whose singular value is larger
    than the largest of D − ΔW.  components: how many there are.
    """

    module: str
    kept: float
    error: float
    strength: int | None
    rank: int
    components: int


def survivals(factors: Factors, weights: Mapping[str, Tensor], base: str) -> list[Survival]:
    """What merging leaves of every module, in the order of the file.

    Args:
        factors: A, B and alpha / r by module.
        weights: the base's weights W₀ by module, not quantized.
        base: "fp8", "nf4" or "int8".
    """
    found = []
    for module, (a, b, scaling) in ticked(factors.items(), "Merging"):
        weight = weights[module].detach().float().cpu()
        untouched = base in LINEAR_ALONE and weight.ndim == 4
        found.append(survival(module, a, b * scaling, weight, (lambda same: same) if untouched else ROUNDINGS[base]))
    return found


def survival(module: str, a: Tensor, b: Tensor, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Survival:
    """What `rounded` leaves of ΔW = B A on a weight (out, in[, k, k]); a ΔW of zero is kept whole."""
    down, up = a.detach().float().flatten(1), b.detach().float().flatten(1)
    update, base = up @ down, rounded(weight.float()).flatten(1)
    size = float(update.norm())
    if not size:
        return Survival(module, 1.0, 0.0, 1, 0, 0)

    def left(strength: float) -> Tensor:
        return rounded((base + strength * update).view_as(weight)).flatten(1) - base

    noise = left(1) - update
    kept = float((left(1) * update).sum()) / size**2
    enough = (s for s in STRENGTHS if float((left(s) - s * update).norm()) <= LARGEST_ERROR * s * size)
    values = torch.linalg.svdvals(torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T)
    values = values[values > 1e-6 * values[0]]
    rank = int((values > ABOVE * _largest_singular_value(noise)).sum())
    return Survival(module, kept, float(noise.norm()) / size, next(enough, None), rank, len(values))


def _largest_singular_value(matrix: Tensor) -> float:
    """‖matrix‖₂, by power iteration from a fixed start."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(POWER_STEPS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp_min(1e-30)
    return float((matrix @ vector).norm())


def base_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a base's layers by canonical module name; of LoRA layers, the weights below them."""
    weights = {}
    for part, module in parts_of(model).items():
        for path, layer in adaptable_layers(module):
            weights[with_text_model(part, path)] = layer.weight
    return weights


def survival_text(found: list[Survival], base: str) -> str:
    """The result for a terminal: the whole adapter, then the modules that suffer most."""
    kept, error = _mean([one.kept for one in found]), _mean([one.error for one in found])
    low = [one for one in found if one.error > LARGEST_ERROR]
    lines = [f"merged into a base in {base}: {kept:.0%} of ΔW is kept, with {error:.0%} of its size as noise (means of "
             f"{len(found)} modules); {len(low)} module(s) are more than {LARGEST_ERROR:.0%} noise"]  # fmt: skip
    if low:
        lines += [_advice(low), f"{'kept':>6} {'noise':>6} {'strength':>9} {'rank':>7}  module"]
    for one in sorted(low, key=lambda one: -one.error)[:SHOWN]:
        strength = "> 64" if one.strength is None else str(one.strength)
        lines.append(
            f"{one.kept:>6.0%} {one.error:>6.0%} {strength:>9} {one.rank:>3} of {one.components:<2} {one.module}"
        )
    return "\n".join([*lines, *([f"and {len(low) - SHOWN} more: --json has all"] if len(low) > SHOWN else [])])


def _advice(low: list[Survival]) -> str:
    """What would survive: a strength, or the components that are above the noise, or neither."""
    strengths = [one.strength for one in low]
    if None not in strengths and strengths:
        text = f"all would survive at a strength of {max(s for s in strengths if s is not None)}"
    else:
        text = f"{strengths.count(None)} of them would not survive at a strength of {STRENGTHS[-1]} either"
    whole = sum(one.rank for one in low)
    return f"{text}; {whole} of their {sum(one.components for one in low)} components are above the noise: keep the "\
           "LoRA beside the base where the program can"  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def survival_cells(found: list[Survival]) -> dict[tuple[str, str], tuple[float, str]]:
    """For a picture: by block and kind of module, the mean share that is kept, as a number and as text."""
    groups: dict[tuple[str, str], list[float]] = {}
    for one in found:
        groups.setdefault((block_of(one.module), kind_of(one.module)), []).append(min(1.0, max(0.0, one.kept)))
    return {place: (_mean(values), f"{_mean(values):.0%}") for place, values in groups.items()}
