"""The layers that each family's models have, with the shapes of their weights, from `skeletons.json`.

The file holds, for each family and each released model of it, patterns of names such as
`transformer.transformer_blocks.{0-18}.attn.to_q` with the shape (out, in[, k, k]) that these layers' weights have.
`make_skeletons` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from personalize.io.json_files import read_json

FILE = Path(__file__).parent / "skeletons.json"
NUMBERS = re.compile(r"\{([\d,-]+)\}")
Shape = tuple[int, ...]


@cache
def models(family: str) -> dict[str, dict[str, Shape]]:
    """For each released model of the family, by its title: the shape of every layer's weight, by its name."""
    return {
        title: {name: tuple(shape) for pattern, shape in patterns.items() for name in expanded(pattern)}
        for title, patterns in read_json(FILE)[family].items()
    }


@cache
def layer_names(family: str) -> frozenset[str]:
    """Every layer that at least one model of the family has."""
    return frozenset(name for layers in models(family).values() for name in layers)


@cache
def shapes_of(family: str, name: str) -> tuple[Shape, ...]:
    """The shapes that the layer's weight has in the family's models, the largest first."""
    shapes = {layers[name] for layers in models(family).values() if name in layers}
    return tuple(sorted(shapes, reverse=True))


def expanded(pattern: str) -> Iterator[str]:
    """ "blocks.{0-2,5}.to_q" → "blocks.0.to_q", "blocks.1.to_q", "blocks.2.to_q", "blocks.5.to_q"."""
    match = NUMBERS.search(pattern)
    if match is None:
        yield pattern
        return
    for span in match[1].split(","):
        first, _, last = span.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield pattern[: match.start()] + str(number) + pattern[match.end() :]


def compressed(names: dict[str, Shape]) -> dict[str, list[int]]:
    """The patterns of `expanded` for names of layers and their shapes, one for all blocks that have the same."""
    blocks: dict[tuple[str, Shape], list[int]] = {}
    for name, shape in names.items():
        match = re.search(r"\.(\d+)\.", name)
        pattern = name if match is None else f"{name[: match.start() + 1]}{{}}{name[match.end() - 1 :]}"
        blocks.setdefault((pattern, shape), []).append(-1 if match is None else int(match[1]))
    return {pattern.replace("{}", "{" + _spans(numbers) + "}"): list(shape)
            for (pattern, shape), numbers in sorted(blocks.items())}  # fmt: skip


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
