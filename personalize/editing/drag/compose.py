"""A drag in pixels: what moves, where it arrives, and the void that it leaves, without any sampling.

    picture → masks of the handles' objects → warped layers over the picture without them → void U

All is in pixels of the padded picture that the model sees; `preview` and `image` translate from and to the user's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.drag.background import cloned, smoothly_filled
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.detail import MovedLayer
from personalize.editing.drag.pixels import (
    affine_sources,
    field_sources,
    least_squares_map,
    mapped,
    translation,
    warped_layer,
    whole_places,
)
from personalize.editing.drag.points import Point, Shape, middle
from personalize.editing.drag.reading import DragSource
from personalize.editing.drag.segment import ObjectMask, unmoved_objects
from personalize.editing.drag.selection import (
    UNCHANGED,
    MaskEdits,
    cells_of,
    grown,
    masks_of,
    objects_of,
    polygon,
    region_of_points,
    resized,
    visible_pixels,
)
from personalize.editing.drag.warp import displacement_field, stretch_factors
from personalize.errors import UserError

MOST = 0.5  # of what the void may be filled from, that other objects may cover


@dataclass(frozen=True)
class WarpedPicture:
    """A dragged picture before its void is filled.

    pixels: (3, H, W), with something smooth in the void.  mask: what moves.  covered: where it arrives.  void: what is
    to be filled; all masks are (H, W).  arrived: where the warp takes each handle.  objects: the automatic masks.
    layers: what was moved and how much of it is seen; empty if nothing has moved.  others: other objects,
    with which the void is not filled.
    """

    pixels: Tensor
    mask: Tensor
    covered: Tensor
    void: Tensor
    arrived: tuple[Point, ...]
    objects: tuple[ObjectMask, ...]
    layers: tuple[MovedLayer, ...]
    others: Tensor


@dataclass(frozen=True)
class _Layer:
    """One object: its mask (H, W), the warp s (H, W, 2), and the scale of that map."""

    mask: Tensor
    sources: Tensor
    scale: float = 1.0


def warp_picture(
    source: DragSource, handles: Sequence[Shape], targets: Sequence[Shape], settings: DragSettings,
    edits: MaskEdits = UNCHANGED,
) -> WarpedPicture:  # fmt: skip
    """Drag each of `handles` to the target with the same index.

    Raises:
        UserError: a handle lies on the background, the mask is empty or covers the whole picture, or regions do not
            determine a map.
    """
    build = _region_layers if settings.mode == "region" else _point_layers
    layers, arrived, objects = build(source, handles, targets, settings, edits)
    if not any(bool(layer.mask.any()) for layer in layers):
        raise UserError("the mask is empty: paint white what may move, or shrink it less")
    mask = torch.stack([layer.mask for layer in layers]).any(0)
    pixels, visible = source.frame.pixels[0], visible_pixels(source)
    moving = [layer.mask for layer in layers if not _stays(layer)]
    if not moving:
        nothing = torch.zeros_like(mask)
        return WarpedPicture(pixels, mask, mask, nothing, tuple(arrived), tuple(objects), (), nothing)
    moved = [warped_layer(pixels, layer.mask, layer.sources, layer.scale) for layer in layers]
    opacity = torch.stack([one for _, one in moved]).amax(0)
    reach = round(settings.clearance * source.frame.factor)
    left = torch.stack(moving).any(0)
    left = left & (opacity < 0.5) if settings.mode == "deform" else left
    old = grown(left, reach) & visible
    known = ~grown(mask, reach) & (opacity <= 0) & visible
    others = torch.stack([unmoved_objects(source.attention, layer.mask) for layer in layers]).any(0) & known
    if int(others.sum()) > MOST * int(known.sum()):  # so much is no object, but background that attention does not tell
        others = torch.zeros_like(known)
    known &= ~others
    bare = old & (opacity < 1)  # what shows, in whole or in part, through the objects at their new places
    fill = cloned(pixels, bare, known) if settings.first_fill == "clone" else smoothly_filled(pixels, known)
    composed = torch.where(bare, fill, pixels)
    for layer, alpha in moved:
        composed = composed * (1 - alpha) + layer * alpha
    covered, seen = opacity >= 0.5, [alpha for _, alpha in moved]
    for above in range(1, len(seen)):
        seen[:above] = [alpha * (1 - moved[above][1]) for alpha in seen[:above]]
    moved_layers = tuple(MovedLayer(one.sources, alpha, one.scale) for one, alpha in zip(layers, seen, strict=True))
    return WarpedPicture(composed, mask, covered, old & ~covered, tuple(arrived), tuple(objects), moved_layers, others)


def _point_layers(
    source: DragSource, handles: Sequence[Shape], targets: Sequence[Shape], settings: DragSettings, edits: MaskEdits
) -> tuple[list[_Layer], list[Point], list[ObjectMask]]:
    """`move` and `deform`: one layer for the handles of each object."""
    starts, ends = [shape[0] for shape in handles], [shape[0] for shape in targets]
    masks, objects = masks_of(source, starts, settings, edits)
    vectors = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(starts, ends, strict=True)]
    layers, arrived = [], dict[int, Point]()
    for group in objects_of(masks):
        mask = masks[group].any(0)
        if not bool(mask.any()):  # a handle beside the user's mask, or a mask that was shrunk to nothing
            arrived |= {index: starts[index] for index in group}
            continue
        if settings.mode == "move" and len(group) == 1:
            matrix = translation(vectors[group[0]])
            layers.append(_Layer(mask, affine_sources(matrix, (mask.shape[0], mask.shape[1]))))
            arrived[group[0]] = mapped(matrix, starts[group[0]])
            continue
        ratios = [objects[index].ratio for index in group] if objects else None
        field = _field(source, masks[group], ratios, [starts[i] for i in group], [vectors[i] for i in group], settings)
        layers.append(_Layer(mask, field_sources(field, mask)))
        for index in group:
            x, y = starts[index]
            dx, dy = field[int(y), int(x)].tolist()
            arrived[index] = (x + dx, y + dy)
    for index, start in enumerate(starts):
        if not bool(masks[index][int(start[1]), int(start[0])]):
            arrived[index] = start  # the user's mask leaves this handle where it is
    return layers, [arrived[index] for index in range(len(starts))], objects


def _region_layers(
    source: DragSource, handles: Sequence[Shape], targets: Sequence[Shape], settings: DragSettings, edits: MaskEdits
) -> tuple[list[_Layer], list[Point], list[ObjectMask]]:
    """`region`: one layer for each pair of boxes or polygons; or one for all points together."""
    size = (source.frame.pixels.shape[-2], source.frame.pixels.shape[-1])
    if all(len(shape) == 1 for shape in handles):
        starts, ends = [shape[0] for shape in handles], [shape[0] for shape in targets]
        matrix = least_squares_map(starts, ends, settings.region_map)
        mask, objects = region_of_points(source, starts, settings, edits)
        return [_mapped_layer(mask, matrix)], [mapped(matrix, start) for start in starts], objects
    if edits.add or edits.remove:
        raise UserError(
            "points to add to the mask or remove from it belong to a mask that attention finds: boxes and polygons say "
            "themselves what moves, draw them around it"
        )
    layers, arrived = [], []
    for handle, target in zip(handles, targets, strict=True):
        if len(handle) != len(target) or len(handle) < 3:
            raise UserError(
                f"a region of {len(handle)} corners and its target of {len(target)}: give boxes, or polygons "
                "of equally many corners in the same order"
            )
        matrix = least_squares_map(handle, target, settings.region_map)
        inside = polygon(handle, size) if edits.given is None else polygon(handle, size) & edits.given
        layers.append(_mapped_layer(resized(inside[None], settings.grow)[0] & visible_pixels(source), matrix))
        arrived.append(mapped(matrix, middle(handle)))
    return layers, arrived, []


def _stays(layer: _Layer) -> bool:
    """Whether a layer moves nothing of its mask by as much as a hundredth of a pixel."""
    size = (layer.mask.shape[0], layer.mask.shape[1])
    return not bool(((layer.sources - whole_places(size))[layer.mask].abs() >= 0.01).any())


def _mapped_layer(mask: Tensor, matrix: Tensor) -> _Layer:
    scale = math.sqrt(abs(float(torch.linalg.det(matrix[:, :2]))))
    return _Layer(mask, affine_sources(matrix, (mask.shape[0], mask.shape[1])), scale)


def _field(
    source: DragSource, masks: Tensor, ratios: Sequence[Tensor] | None, handles: Sequence[Point],
    vectors: Sequence[Point], settings: DragSettings,
) -> Tensor:  # fmt: skip
    """The displacement (H, W, 2), as (x, y), of the pixels of one object that several handles drag or deform."""
    factor, cell = source.frame.factor, cells_of(source)
    cells = [cell(handle) for handle in handles]
    size = source.attention.size
    coarse = interpolate(masks[:, None].float(), size, mode="area")[:, 0] > 0
    if settings.mode == "move":
        factors = torch.ones(coarse.shape)
    elif settings.displacement == "stretch" or ratios is None:
        factors = torch.stack([stretch_factors(one, at) for one, at in zip(coarse, cells, strict=True)])
    else:
        factors = torch.stack(list(ratios)).clamp(0, 1)
    if settings.weights == "ratio" and ratios is None:
        raise UserError(
            "weights by attention need the mask that attention finds: leave the mask out, or choose distance"
        )
    towards = torch.tensor([(dy, dx) for dx, dy in vectors]) / factor
    attention = None if ratios is None else torch.stack(list(ratios)).clamp(0, 1)
    field = displacement_field(factors, coarse, cells, towards, settings.weights, attention) * factor
    field = torch.where(coarse.any(0)[..., None], field, _nearest(field, coarse.any(0)))
    wide = interpolate(field.permute(2, 0, 1)[None].flip(1), masks.shape[-2:], mode="bilinear")[0]
    return wide.permute(1, 2, 0)


def _nearest(field: Tensor, known: Tensor) -> Tensor:
    """`field` (h, w, 2), continued smoothly beyond the cells `known`, so that the border is not pulled towards zero."""
    return smoothly_filled(field.permute(2, 0, 1), known).permute(1, 2, 0)
