"""The object under a handle as a mask of pixels: attention says which latent cells it covers, colour where it ends.

1.  The attention ratio of the handle gives the mask M₁ of cells that surely belong to the object.
2.  The mean attention of the cells of M₁ gives a second ratio r, and M₂ where it exceeds τ/2. It also finds parts that
    the handle alone misses.  Cells beside M₂ may be of parts that others hardly look at, such as the leaf of an apple,
    but which look at the object themselves: r rises there to

        b[p] = Σ_{x∈M₂} A[p, x] / mean of the same over M₁

    A thing like the object, which attention finds as well, stands apart from it in r > τ. Where background between them
    with r > τ/2 joins the two, the cells of M₂ that are nearer to the other thing are left out.

3.  Every pixel p near the cells with r > τ/2 gets the log odds

        u[p] = a ln(r[p] / τ₂) + ln(H₁(c[p]) / H₀(c[p]))

    with colour histograms H₁ of the object and H₀ of its surroundings, and the probability P of being of the object,
    for which neighbours of similar colour c are drawn to the same side:

        P[p] = σ(u[p] + Σ_{p′ next to p} λ exp(−β ‖c[p] − c[p′]‖²) (2 P[p′] − 1))

    H₁, H₀ and P are computed in turns, P by a few mean-field updates.
4.  The mask is P > 1/2, closed by a pixel: its connected part that contains the handle, without holes.

References: Rother et al., "GrabCut", SIGGRAPH 2004; Krähenbühl and Koltun, arXiv 1210.5644, for mean-field updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv3d, interpolate, pad

from personalize.editing.drag.attention import AttentionRows
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.mask import (
    Cell,
    box,
    closed,
    connected_component,
    connected_parts,
    dilated,
    ratio_mask,
    without_holes,
)
from personalize.editing.drag.warp import attention_ratio

# chosen by trial on 18 scenes of tests/bench/drag, half of them with textured backgrounds
ATTENTION_WEIGHT = 1.5  # a
PIXEL_THRESHOLD = 0.25  # τ₂
COLOUR_LIMIT = 3.0  # largest |ln(H₁ / H₀)|, so that colour cannot overrule clear attention
PAIR_WEIGHT = 0.6  # λ
BINS = 16  # of a colour histogram, for each channel
FLOOR = 2e-4  # added to histograms, which have 16³ bins that sum to one
REACH, SURROUNDINGS = 2, 6  # cells around the mask of cells: pixels that may be of the object, and those of H₀
TURNS, UPDATES = 4, 6  # histograms are computed four times, with six mean-field updates each
FINEST = 4  # pixels per latent cell at which colours are compared; larger pictures are scaled down to that
ASKED = 64  # most cells of M₁ whose attention is averaged
REFERENCES = 8  # cells of M₁ that b is relative to, about
ATTENDS = 0.3  # least b that raises r
ALIKE, COMPARABLE = 0.6, 0.25  # least mean r, and least size relative to the object, of a part that is another thing
BESIDE, NOTICED = 3, 2.5  # b is asked of cells so near to M₂ whose r exceeds that of the surroundings so many times
OBJECT = 0.15  # least r of another object, which also exceeds that of the surroundings `NOTICED` times


@dataclass(frozen=True)
class ObjectMask:
    """The object under one handle.

    pixels: the mask (H, W).  ratio: its attention ratio r (h, w).  cells: r > τ/2 after cleaning, (h, w).
    threshold: τ that was used for M₁.
    """

    pixels: Tensor
    ratio: Tensor
    cells: Tensor
    threshold: float


def object_mask(
    attention: AttentionRows, pixels: Tensor, handle: Cell, settings: DragSettings, without: Sequence[Cell] = (),
    picture_size: tuple[int, int] | None = None,
) -> ObjectMask:  # fmt: skip
    """Find the object under `handle` in the picture `pixels` (3, H, W) in [−1, 1].

    Args:
        picture_size: rows and columns of `pixels` that show the picture, before padding; all if not given.
        without: cells of things that do not belong to the object; each cell of the grid that gets more attention from
            one of them than from the handle is left out.

    Raises:
        UserError: attention does not set the handle apart from the rest of the picture.
    """
    limits = {"fewest": settings.mask_fewest, "most": settings.mask_most}
    ratio = attention_ratio(attention.around(handle, settings.window), handle, settings.window)
    lost = _rivals(attention, ratio, handle, without, settings)
    ratio = ratio.masked_fill(lost, 0.0)
    core, threshold = ratio_mask(ratio, handle, settings.mask_threshold, **limits)
    if not settings.refine:
        return ObjectMask(_enlarged(core, pixels), ratio, core, threshold)
    ratio = second_ratio(attention, ratio, core).masked_fill(lost, 0.0)
    cells, low = ratio_mask(ratio, handle, settings.mask_threshold / 2, **limits)
    others = joined_lookalikes(ratio, core, cells, settings.mask_threshold)
    if bool(others.any()):
        lost, ratio = lost | others, ratio.masked_fill(others, 0.0)
        cells, low = ratio_mask(ratio, handle, settings.mask_threshold / 2, **limits)
    if low == settings.mask_threshold / 2:
        ratio = with_residue(attention, ratio, core, cells).masked_fill(lost, 0.0)
        cells, _ = ratio_mask(ratio, handle, settings.mask_threshold / 2, **limits)
    size = picture_size or (pixels.shape[-2], pixels.shape[-1])
    return ObjectMask(pixel_mask(pixels, ratio, cells, handle, size), ratio, cells, threshold)


def second_ratio(attention: AttentionRows, ratio: Tensor, core: Tensor) -> Tensor:
    """The mean attention of the cells of `core` (h, w) with the highest `ratio`, relative to its mean inside `core`."""
    cells = core.nonzero()
    strongest = ratio[core].argsort(descending=True)[:ASKED]
    return _relative_row(attention, cells[strongest], core)


def _relative_row(attention: AttentionRows, cells: Tensor, inside: Tensor) -> Tensor:
    """The mean attention (h, w) of `cells` (m, 2), relative to its mean where `inside` (h, w)."""
    row = attention.mean_row(cells)
    return row / row[inside].mean().clamp(min=1e-12)


def joined_lookalikes(ratio: Tensor, core: Tensor, cells: Tensor, threshold: float) -> Tensor:
    """The cells of the mask `cells` (h, w) that belong to another object just like the one that is looked for.

    Attention finds objects alike, and background between them can join them in `cells`, which is r > τ/2.  A connected
    part of r > τ without any of M₁, but with a mean r and a size like the object's own, is taken for another one; it
    gets the cells that are nearer to it along paths within `cells`.  What is no part of `cells` is not looked at.
    """
    parts = torch.from_numpy(connected_parts(closed(ratio > threshold) & cells))
    inside = torch.isin(parts, parts[core & (parts > 0)])
    own, other = inside | core, torch.zeros_like(core)
    for number in parts[~inside & (parts > 0)].unique():
        part = parts == number
        if int(part.sum()) >= COMPARABLE * int(own.sum()) and float(ratio[part].mean()) >= ALIKE:
            other |= part
    reached = -1
    while bool(other.any()) and (count := int(own.sum()) + int(other.sum())) > reached:
        reached = count
        own |= dilated(own) & cells & ~other
        other |= dilated(other) & cells & ~own
    return other


def unmoved_objects(attention: AttentionRows, mask: Tensor) -> Tensor:
    """The pixels (H, W) of other objects than that of the finished `mask` (H, W), alike or not, and a cell around each.

    An object's cells attend to every object more than to background: other objects are where r, the mean attention of
    the mask's cells relative to its mean inside, exceeds `OBJECT` and `NOTICED` times its median far from the mask.
    Cells within `REACH` of the mask are left out, for its own shadow may be there.
    """
    cells = interpolate(mask[None, None].float(), attention.size, mode="area")[0, 0]
    inside, far = (cells > 0) & (cells >= min(0.5, float(cells.max()))), ~dilated(cells > 0, REACH)
    if not bool(inside.any()) or not bool(far.any()):
        return torch.zeros_like(mask)
    places = inside.nonzero()
    ratio = _relative_row(attention, places[:: -(-len(places) // ASKED)], inside)
    return _enlarged(dilated(closed(ratio > max(OBJECT, NOTICED * float(ratio[far].median()))) & far), mask)


def with_residue(attention: AttentionRows, ratio: Tensor, core: Tensor, cells: Tensor) -> Tensor:
    """`ratio` (h, w), raised to b at the cells beside the mask `cells` that attend to it themselves."""
    near = dilated(cells, BESIDE)
    if bool(near.all()):
        return ratio
    beside = near & ~cells & (ratio > NOTICED * ratio[~near].median())
    if not bool(beside.any()):
        return ratio
    inside = core.nonzero()[:: max(1, int(core.sum()) // REFERENCES)]
    mass = attention.mass(torch.cat([beside.nonzero(), inside]), cells)
    count = int(beside.sum())
    back, raised = mass[:count] / mass[count:].mean().clamp(min=1e-12), ratio.clone()
    raised[beside] = torch.where(back > ATTENDS, torch.maximum(ratio[beside], back), ratio[beside])
    return raised


def pixel_mask(pixels: Tensor, ratio: Tensor, cells: Tensor, handle: Cell, picture_size: tuple[int, int]) -> Tensor:
    """The mask (H, W) of steps 3 and 4, from `pixels` (3, H, W), r (h, w) and the mask of cells (h, w).

    picture_size: rows and columns of `pixels` that show the picture; what pads them mirrors it, the object too, and is
        not counted among the surroundings.
    """
    height, width = pixels.shape[-2:]
    finest = (min(height, FINEST * cells.shape[0]), min(width, FINEST * cells.shape[1]))
    colours = (pixels if finest == (height, width) else interpolate(pixels[None], finest, mode="area")[0]) / 2 + 0.5
    rows, columns = _box(dilated(cells, SURROUNDINGS), finest)
    near = _enlarged(dilated(cells, REACH), colours)[rows, columns]
    around = _enlarged(dilated(cells, SURROUNDINGS), colours)[rows, columns]
    around[max(0, -(-picture_size[0] * finest[0] // height) - rows.start) :] = False
    around[:, max(0, -(-picture_size[1] * finest[1] // width) - columns.start) :] = False
    odds = interpolate(ratio[None, None], finest, mode="bilinear")[0, 0][rows, columns]
    prior = ATTENTION_WEIGHT * ((odds + 1e-3) / PIXEL_THRESHOLD).log().clamp(-4, 4)
    share = _probabilities(colours[:, rows, columns], prior.masked_fill(~near, -20.0), around)
    row, column = (int((at + 0.5) * side / grid) for at, side, grid in zip(handle, finest, cells.shape, strict=True))
    whole = torch.zeros(finest)
    whole[rows, columns] = _cleaned(share > 0.5, (row - rows.start, column - columns.start)).float()
    return interpolate(whole[None, None], (height, width), mode="bilinear")[0, 0] >= 0.5


def _probabilities(colours: Tensor, prior: Tensor, around: Tensor) -> Tensor:
    """P (H, W) of pixels with `colours` (3, H, W) in [0, 1] and log odds `prior` from attention."""
    scaled = (colours.clamp(0, 1 - 1e-6) * BINS).long()
    index = ((scaled[0] * BINS + scaled[1]) * BINS + scaled[2]).flatten()
    difference = sum((_neighbours(channel) - channel) ** 2 for channel in colours)
    assert isinstance(difference, Tensor)
    pull = PAIR_WEIGHT * (-difference / (2 * difference.mean().clamp(min=1e-6))).exp()
    share = prior.sigmoid()
    for _ in range(TURNS):
        inside, outside = (_histogram(index, part.flatten()) for part in (share, (1 - share) * around))
        colour = ((inside[index] + FLOOR) / (outside[index] + FLOOR)).log().clamp(-COLOUR_LIMIT, COLOUR_LIMIT)
        odds = prior + colour.view_as(prior)
        for _ in range(UPDATES):
            share = (odds + (pull * (2 * _neighbours(share) - 1)).sum(0)).sigmoid()
    return share


def _histogram(index: Tensor, weights: Tensor) -> Tensor:
    """The weighted histogram (16³,) of flat bin numbers, smoothed over neighbouring bins; it sums to one."""
    counts = torch.zeros(BINS**3).index_add_(0, index, weights).view(1, 1, BINS, BINS, BINS)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    for shape in ((1, 1, 3, 1, 1), (1, 1, 1, 3, 1), (1, 1, 1, 1, 3)):
        counts = conv3d(counts, kernel.view(shape), padding=tuple((side - 1) // 2 for side in shape[2:]))
    return counts.flatten() / counts.sum().clamp(min=1e-9)


def _neighbours(values: Tensor) -> Tensor:
    """The eight neighbours (8, H, W) of every pixel of `values` (H, W); the border repeats itself."""
    height, width = values.shape
    padded = pad(values[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    steps = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    return torch.stack([padded[row : row + height, column : column + width] for row, column in steps])


def _cleaned(found: Tensor, at: Cell) -> Tensor:
    """Step 4: the part of `found` (H, W) around the pixel `at`, which with its neighbours always counts."""
    row, column = at
    found = found.clone()
    found[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = True
    return without_holes(connected_component(closed(found), at))


def _rivals(
    attention: AttentionRows, ratio: Tensor, handle: Cell, without: Sequence[Cell], settings: DragSettings
) -> Tensor:
    """The cells (h, w) that get more attention from one of the cells `without` than from the handle.

    Each attention is relative to what that cell gives itself.
    """
    lost = torch.zeros_like(ratio, dtype=torch.bool)
    for cell in without:
        lost |= attention_ratio(attention.around(cell, settings.window), cell, settings.window) > ratio
    lost[handle] = False
    return lost


def _enlarged(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of cells (h, w) as a mask of the pixels of `like` (…, H, W)."""
    return interpolate(mask[None, None].float(), like.shape[-2:], mode="nearest")[0, 0] > 0


def _box(mask: Tensor, size: tuple[int, int]) -> tuple[slice, slice]:
    """The smallest rectangle of a picture of `size` that contains the cells of `mask`."""
    parts = zip(box(mask), size, mask.shape, strict=True)
    rows, columns = (slice(side * at.start // cells, -(-side * at.stop // cells)) for at, side, cells in parts)
    return rows, columns
