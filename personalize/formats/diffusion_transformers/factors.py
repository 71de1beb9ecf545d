"""One fused projection as several, and several as one, without loss.

    fused, W = [W₁; W₂; …]:   ΔWⱼ = Bⱼ A, with Bⱼ the rows of B that belong to layer j
    split to fused:           B = diag(B₁, B₂, …), A = [A₁; A₂; …], of rank Σ rⱼ; B = [B₁; B₂; …] where all A are equal

Components that a layer does not use are left out: what was fused from layers of rank r is split into rank r again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.rank_reduction import zero_padded

Pair = tuple[Tensor, Tensor]
"""A (r, in[, k, k]) and B (out, r[, 1, 1]) with ΔW = B A."""


def split(pair: Pair, outputs: Sequence[int]) -> list[Pair]:
    """The LoRA of each layer of a fused one, by the number of their outputs; exact.

    A layer that the fused LoRA does not change gets rank 0.
    """
    a, b = pair
    if len(outputs) == 1:
        return [pair]
    parts = []
    for rows in b.split(list(outputs)):
        used = rows.flatten(1).any(0)
        parts.append((a[used], rows[:, used]))
    return parts


def fuse(pairs: Sequence[Pair | None], outputs: Sequence[int]) -> Pair:
    """The LoRA of the fused layer; None stands for a layer that is not changed.

    All blocks get the same rank, for diffusers finds a block-diagonal B again only where they have.
    """
    if len(pairs) == 1 and pairs[0] is not None:
        return pairs[0]
    given = [pair for pair in pairs if pair is not None]
    first = given[0][0]
    if len(given) == len(pairs) and all(torch.equal(a, first) for a, _ in given):
        return first, torch.cat([b for _, b in given])
    rank = max(len(a) for a, _ in given)
    blocks = [zero_padded(*pair, rank) if pair else (first.new_zeros(rank, first.shape[1]), first.new_zeros(out, rank))
              for pair, out in zip(pairs, outputs, strict=True)]  # fmt: skip
    return torch.cat([a for a, _ in blocks]), torch.block_diag(*(b for _, b in blocks))


def halves_swapped(pair: Pair) -> Pair:
    """The two halves of the outputs in the other order, where there are two outputs for each input."""
    a, b = pair
    if len(b) != 2 * a[0].numel():
        return pair
    return a, torch.cat(b.chunk(2)[::-1])


def outputs_of(shapes: Sequence[tuple[int, ...]], inputs: int, total: int | None, name: str) -> list[int]:
    """How the outputs of a fused layer belong to its parts, also in a model of another width than the released one.

    A part that has as many outputs as inputs in the released model (`shapes`, out and in of each part) has as many as
    the layer has inputs here; the rest is shared by the others.

    Raises:
        UserError: the outputs cannot be shared so.
    """
    square = [out == read for out, read, *_ in shapes]
    if total is None:
        return [inputs if same else shape[0] * inputs // shape[1] for same, shape in zip(square, shapes, strict=True)]
    others = square.count(False)
    rest = total - inputs * square.count(True)
    if rest < 0 or (others == 0 and rest) or (others and rest % others):
        raise UserError(f"layer {name}: {total} outputs for {inputs} inputs are not those of {len(shapes)} projections")
    return [inputs if same else rest // others for same in square]


def one_rank(pairs: Mapping[str, Pair]) -> tuple[dict[str, Pair], int]:
    """All layers with the largest rank, for diffusers and PEFT take one for all; and that rank."""
    rank = max(len(a) for a, _ in pairs.values())
    return {name: zero_padded(*pair, rank) for name, pair in pairs.items()}, rank
