"""How large the layers of each family are: what an adapter file may make of one is checked before it is computed.

The factors of a few bytes can multiply out to terabytes: A (0, n) and B (n, 0) hold nothing and make ΔW (n, n).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from personalize.errors import UserError
from personalize.formats.lora_keys import with_text_model
from personalize.models.config import FAMILIES
from personalize.models.empty import adaptable_layers, empty_model, parts_of

INPUT_CHANNELS = 12  # the first convolution of models for inpainting or instructions reads up to 9 for SD's 4
SMALL = 2**22  # numbers; no layer's limit is below this, so that a factor of any usual rank fits a narrow layer
TWO_SIDED = (  # the roles of the two factors whose outer sides are the layer's (out, in)
    ("B", "A"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("b1.weight", "b2.weight"),
)  # fmt: skip


@cache
def layer_sides(family: str) -> dict[str, tuple[int, int]]:
    """By module, its weight's sides (out, in·k·k) in the family's released model."""
    sides = {}
    for part, module in parts_of(empty_model(family)).items():
        for path, layer in adaptable_layers(module):
            sides[with_text_model(part, path)] = (len(layer.weight), layer.weight[0].numel())
    out, read = sides["unet.conv_in"]
    return sides | {"unet.conv_in": (out, read // 4 * INPUT_CHANNELS)}


@cache
def sides_of(module: str, family: str | None = None) -> tuple[int, int]:
    """The largest (out, in·k·k) of a module in the `family`'s model, or in any; of one in none, the largest of all."""
    tables = [layer_sides(name) for name in ([family] if family in FAMILIES else FAMILIES)]
    found = [table[module] for table in tables if module in table]
    found = found or [sides for name in FAMILIES for sides in layer_sides(name).values()]
    return max(out for out, _ in found), max(read for _, read in found)


def most_numbers(module: str, family: str | None = None) -> int:
    """The numbers that a factor of the module, or its ΔW, can have at most."""
    return max(SMALL, math.prod(sides_of(module, family)))


def require_fitting(path: str | Path, modules: Mapping[str, Mapping[str, Tensor]], family: str | None = None) -> None:
    """UserError unless each module's factors multiply out to no more than its layer; nothing is allocated.

    Args:
        path: the file, for the message.
        modules: tensors by module and role (see `weight_changes`).
        family: of the base model, if it is known.
    """
    for module, parts in modules.items():
        if empty := [role for role, tensor in parts.items() if 0 in tensor.shape]:
            raise UserError(
                f"{path}: module {module} has a side of 0 in {empty[0]} {tuple(parts[empty[0]].shape)}, numbers were "
                "expected: the file is damaged or made to harm"
            )
        limits = sides_of(module, family)
        for what, sides in products(parts):
            if any(side > limit for side, limit in zip(sides, limits, strict=True)):
                raise UserError(
                    f"{path}: module {module} makes a change of {sides[0]}×{sides[1]} of {what}, its layer has at "
                    f"most {limits[0]}×{limits[1]}: it is for no model of this family"
                )


def products(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The sides (out, in·k·k) of what each kind of factors in `parts` multiplies out to."""
    shapes = {role: tuple(tensor.shape) for role, tensor in parts.items() if tensor.ndim > 1}
    for up, down in TWO_SIDED:
        if up in shapes and down in shapes:
            core = next((shapes[name] for name in (f"hada_t{up[6:7]}", "mid") if name in shapes), ())
            out = shapes[up][-1] if core and up.startswith("hada") else shapes[up][0]
            yield f"{up} and {down}", (out, math.prod(shapes[down][1:]) * math.prod(core[2:]))
    if "diff" in shapes:
        yield "diff", (shapes["diff"][0], math.prod(shapes["diff"][1:]))
    first, second = (_kronecker_side(shapes, number) for number in "12")
    if first and second:
        yield "its Kronecker factors", (first[0] * second[0], first[1] * second[1])


def _kronecker_side(shapes: Mapping[str, tuple[int, ...]], number: str) -> tuple[int, int] | None:
    """The sides of one factor of a LoKr; None if it is not there."""
    whole, a, b = (shapes.get(f"lokr_w{number}{end}") for end in ("", "_a", "_b"))
    core = shapes.get("lokr_t2", ()) if number == "2" else ()
    if whole is not None:
        return whole[0], math.prod(whole[1:])
    if a is None or b is None:
        return None
    return a[-1] if core else a[0], math.prod(b[1:]) * math.prod(core[2:])
