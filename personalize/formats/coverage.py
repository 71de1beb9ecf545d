"""Coverage of an adapter: how many modules of each block of the model it changes, and how strongly.

`coverage_table` computes it, `coverage_text` prints it, `coverage_picture` draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from personalize.models.config import TEXT_ENCODERS
from personalize.models.empty import adaptable_layers, empty_unet

KINDS = ("attention", "self-attention", "cross-attention", "feed-forward", "modulation", "projection", "resnet",
         "sampler", "other")  # fmt: skip
TEXT_LAYERS = {"sd1": (12,), "sd2": (23,), "sdxl": (12, 32)}  # layers of each text encoder
INK, PAPER, EMPTY, FULL = (32, 32, 36), (255, 255, 255), (238, 240, 243), (47, 111, 171)  # RGB
CELL, LINE, LEFT = (112, 30), 30, 132  # px: a cell's width and height, a text line, the column of block names at least


@dataclass(frozen=True)
class BlockCoverage:
    """The coverage of one block.

    `counts` gives for each kind of module how many the adapter changes, and how many the block has.  `norm` is the
    Frobenius norm of the block's ΔW, all modules together, or None if that of a module is not known.
    """

    block: str
    counts: dict[str, tuple[int, int]]
    norm: float | None

    @property
    def changed(self) -> int:
        return sum(changed for changed, _ in self.counts.values())


def coverage_table(modules: Mapping[str, float | None], family: str | None) -> list[BlockCoverage]:
    """The coverage of every block, in the order of the model.

    Args:
        modules: for each module that the adapter changes, by canonical name, the norm of its ΔW, or None if unknown.
        family: the model family whose modules are counted; if None, only the changed modules are counted.
    """
    components = {module.split(".")[0] for module in modules}
    existing = [f"unet.{path}" for path, _ in adaptable_layers(empty_unet(family))] if family else []
    existing += [module for module in _text_modules(family) if module.split(".")[0] in components]
    known = set(existing)
    counts: dict[str, dict[str, list[int]]] = {}
    for module in [*existing, *(module for module in sorted(modules) if module not in known)]:
        count = counts.setdefault(block_of(module), {}).setdefault(kind_of(module), [0, 0])
        count[0] += module in modules
        count[1] += 1
    return [
        BlockCoverage(block, {kind: (changed, all_) for kind, (changed, all_) in kinds.items()}, _norm(block, modules))
        for block, kinds in sorted(counts.items(), key=lambda item: _order(item[0]))
    ]


def block_of(module: str) -> str:
    """The block of a module: "down_blocks.1", "mid_block", "up_blocks.0", "other", or the name of a text encoder."""
    component, _, path = module.partition(".")
    if component != "unet":
        return component
    first, _, rest = path.partition(".")
    if first in ("down_blocks", "up_blocks"):
        return f"{first}.{rest.partition('.')[0]}"
    return first if first == "mid_block" else "other"


def kind_of(module: str) -> str:
    """The kind of a module (one of KINDS), by its name."""
    kinds = {
        ".attn1.": "self-attention", ".self_attn.": "self-attention", ".attn2.": "cross-attention",
        ".ff.": "feed-forward", ".mlp.": "feed-forward", ".proj_in": "projection", ".proj_out": "projection",
        ".resnets.": "resnet", "samplers.": "sampler",
    }  # fmt: skip
    return next((kind for name, kind in kinds.items() if name in module), "other")


def _text_modules(family: str | None) -> list[str]:
    """Canonical names of all modules of the family's text encoders that can have a LoRA."""
    parts = [f"self_attn.{side}_proj" for side in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    encoders = zip(TEXT_ENCODERS, TEXT_LAYERS.get(family or "", ()), strict=False)
    return [
        f"{name}.text_model.encoder.layers.{number}.{part}"
        for name, layers in encoders
        for number in range(layers)
        for part in parts
    ]


def _order(block: str) -> tuple[int, str]:
    """Sort key that puts blocks into the order of the model."""
    places = ("other", "down_blocks", "mid_block", "up_blocks", "text_encoder", "text_encoder_2")
    first = block.partition(".")[0]
    return (places.index(first) if first in places else len(places), block)


def _norm(block: str, modules: Mapping[str, float | None]) -> float | None:
    """√Σ‖ΔW‖² over the modules of a block; None if it has none or the norm of one is unknown."""
    norms = [norm for module, norm in modules.items() if block_of(module) == block]
    known = [norm for norm in norms if norm is not None]
    return sum(norm**2 for norm in known) ** 0.5 if known and len(known) == len(norms) else None


def norm_of(a: Tensor, b: Tensor, scaling: float) -> float:
    """The Frobenius norm ‖scaling · B A‖, from the Gram matrices BᵀB and AAᵀ (r, r) without computing the product.

    A rank above one side of the product, where the Gram matrices would be the larger, is multiplied out instead.
    """
    if not a.numel() or not b.numel():
        return 0.0
    down, up = a.double().flatten(1), b.double().flatten(1)
    if len(down) > min(len(up), down.shape[1]):
        return scaling * float((up @ down).norm())
    return scaling * float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0)) ** 0.5


def coverage_text(rows: list[BlockCoverage]) -> str:
    """The table as text: "3/8" means that 3 of 8 modules are changed, "-" that the block has none of that kind."""
    kinds = [kind for kind in KINDS if any(kind in row.counts for row in rows)]
    lines = [["block", *kinds, "|ΔW|"]]
    for row in rows:
        cells = [f"{row.counts[kind][0]}/{row.counts[kind][1]}" if kind in row.counts else "-" for kind in kinds]
        lines.append([row.block, *cells, "-" if row.norm is None else f"{row.norm:.3g}"])
    return aligned_columns(lines)


def aligned_columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def coverage_picture(rows: list[BlockCoverage], title: str) -> Image.Image:
    """The table as a picture: the darker a cell, the larger the share of changed modules, or the norm of ΔW."""
    kinds = [kind for kind in KINDS if any(kind in row.counts for row in rows)]
    largest_norm = max((row.norm or 0 for row in rows), default=0) or 1.0
    cells = {(row.block, kind): (done / there, f"{done} / {there}")
             for row in rows for kind, (done, there) in row.counts.items()}  # fmt: skip
    norms = {(row.block, "|dW|"): (row.norm / largest_norm, f"{row.norm:.3g}") for row in rows if row.norm is not None}
    return table_picture([row.block for row in rows], [*kinds, "|dW|"], cells | norms, title)  # no Greek in the font


def table_picture(
    blocks: list[str], columns: list[str], cells: Mapping[tuple[str, str], tuple[float, str]], title: str
) -> Image.Image:
    """A table as a picture: `cells` gives by block and column how dark the cell is, from 0 to 1, and its text."""
    (width, height), font = CELL, ImageFont.load_default(13)
    left = max([LEFT, *(round(font.getlength(block)) + 16 for block in blocks)])
    sheet = Image.new("RGB", (left + len(columns) * width + 8, 2 * LINE + len(blocks) * height + 8), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), title[:120], INK, font)
    for number, column in enumerate(columns):
        pen.text((left + number * width + 6, LINE + 8), column, INK, font)
    for row, block in enumerate(blocks):
        top = 2 * LINE + row * height
        pen.text((8, top + 7), block, INK, font)
        for number, column in enumerate(columns):
            if (block, column) in cells:
                _cell(pen, (left + number * width, top), *cells[block, column], font)
    return sheet


def ordered_blocks(blocks: set[str]) -> list[str]:
    """Names of blocks in the order of the model."""
    return sorted(blocks, key=_order)


def _cell(pen: ImageDraw.ImageDraw, at: tuple[int, int], share: float, text: str, font: object) -> None:
    """Draw one cell with its top left corner `at` (x, y), coloured from EMPTY (share 0) to FULL (share 1)."""
    x, y = at
    colour = tuple(round(e + min(1.0, share) * (f - e)) for e, f in zip(EMPTY, FULL, strict=True))
    pen.rectangle((x + 1, y + 1, x + CELL[0] - 2, y + CELL[1] - 2), colour)
    pen.text((x + 8, y + 7), text, PAPER if share > 0.5 else INK, font)  # pyright: ignore[reportArgumentType]
