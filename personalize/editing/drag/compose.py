"""A drag in pixels: what moves, where it arrives, and the void that it leaves, without any sampling.

    picture → masks of the handles' objects → warped layers over the picture without them → void U

All is in pixels of the padded picture that the model sees; `preview` and `image` translate from and to the user's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.drag.background import cloned, smoothly_filled
from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.mask import Cell, dilated, masks_per_handle
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
from personalize.editing.drag.segment import ObjectMask, object_mask
from personalize.editing.drag.warp import displacement_field, stretch_factors
from personalize.errors import UserError

SAME_OBJECT = 0.5  # handles whose masks overlap by more than this share of the smaller one drag one object


@dataclass(frozen=True)
class MaskEdits:
    """A user's changes of the automatic mask; points and lengths are in pixels of the padded picture.

    given: a mask (H, W) that takes its place.  add: points on further parts of the object.  remove: points on things
    that do not belong to it.
    """

    given: Tensor | None = None
    add: tuple[Point, ...] = ()
    remove: tuple[Point, ...] = ()


@dataclass(frozen=True)
class WarpedPicture:
    """A dragged picture before its void is filled.

    pixels: (3, H, W), with something smooth in the void.  mask: what moves.  covered: where it arrives.  void: what is
    to be filled; all masks are (H, W).  arrived: where the warp takes each handle.  objects: the automatic masks.
    """

    pixels: Tensor
    mask: Tensor
    covered: Tensor
    void: Tensor
    arrived: tuple[Point, ...]
    objects: tuple[ObjectMask, ...]


@dataclass(frozen=True)
class _Layer:
    """One object: its mask (H, W), the warp s (H, W, 2), and the scale of that map."""

    mask: Tensor
    sources: Tensor
    scale: float = 1.0


def warp_picture(
    source: DragSource, handles: Sequence[Shape], targets: Sequence[Shape], settings: DragSettings,
    edits: MaskEdits = MaskEdits(),
) -> WarpedPicture:  # fmt: skip
    """Drag each of `handles` to the target with the same index.

    Raises:
        UserError: a handle lies on the background, the mask is empty or covers the whole picture, or regions do not
            determine a map.
    """
    build = _region_layers if settings.mode == "region" else _point_layers
    layers, arrived, objects = build(source, handles, targets, settings, edits)
    mask = torch.stack([layer.mask for layer in layers]).any(0)
    if not bool(mask.any()):
        raise UserError("the mask is empty: paint white what may move, or shrink it less")
    pixels, visible = source.frame.pixels[0], _visible(source)
    if all(_stays(layer.sources) for layer in layers):
        nothing = torch.zeros_like(mask)
        return WarpedPicture(pixels, mask, mask, nothing, tuple(arrived), tuple(objects))
    moved = [warped_layer(pixels, layer.mask, layer.sources, layer.scale) for layer in layers]
    opacity = torch.stack([one for _, one in moved]).amax(0)
    reach = round(settings.clearance * source.frame.factor)
    left = mask & (opacity < 0.5) if settings.mode == "deform" else mask
    old = _grown(left, reach) & visible
    known = ~_grown(mask, reach) & (opacity <= 0) & visible
    bare = old & (opacity < 1)  # what shows, in whole or in part, through the objects at their new places
    fill = cloned(pixels, bare, known) if settings.first_fill == "clone" else smoothly_filled(pixels, known)
    composed = torch.where(bare, fill, pixels)
    for layer, alpha in moved:
        composed = composed * (1 - alpha) + layer * alpha
    covered = opacity >= 0.5
    return WarpedPicture(composed, mask, covered, old & ~covered, tuple(arrived), tuple(objects))


def _point_layers(
    source: DragSource, handles: Sequence[Shape], targets: Sequence[Shape], settings: DragSettings, edits: MaskEdits
) -> tuple[list[_Layer], list[Point], list[ObjectMask]]:
    """`move` and `deform`: one layer for the handles of each object."""
    starts, ends = [shape[0] for shape in handles], [shape[0] for shape in targets]
    masks, objects = _masks(source, starts, settings, edits)
    vectors = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(starts, ends, strict=True)]
    layers, arrived = [], dict[int, Point]()
    for group in _groups(masks):
        mask = masks[group].any(0)
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
        mask, objects = _region_of_points(source, starts, settings, edits)
        return [_mapped_layer(mask, matrix)], [mapped(matrix, start) for start in starts], objects
    layers, arrived = [], []
    for handle, target in zip(handles, targets, strict=True):
        if len(handle) != len(target) or len(handle) < 3:
            raise UserError(
                f"a region of {len(handle)} corners and its target of {len(target)}: give boxes, or polygons "
                "of equally many corners in the same order"
            )
        matrix = least_squares_map(handle, target, settings.region_map)
        layers.append(_mapped_layer(_polygon(handle, size) & _visible(source), matrix))
        arrived.append(mapped(matrix, middle(handle)))
    return layers, arrived, []


def _stays(sources: Tensor) -> bool:
    """Whether a warp moves nothing by as much as a hundredth of a pixel."""
    return bool((sources - whole_places((sources.shape[0], sources.shape[1]))).abs().max() < 0.01)


def _mapped_layer(mask: Tensor, matrix: Tensor) -> _Layer:
    scale = math.sqrt(abs(float(torch.linalg.det(matrix[:, :2]))))
    return _Layer(mask, affine_sources(matrix, (mask.shape[0], mask.shape[1])), scale)


def _region_of_points(
    source: DragSource, points: Sequence[Point], settings: DragSettings, edits: MaskEdits
) -> tuple[Tensor, list[ObjectMask]]:
    """The object under the points; where attention finds none, the polygon with these corners."""
    try:
        masks, objects = _masks(source, points, settings, edits)
        return masks.any(0), objects
    except UserError:
        if edits.given is not None or len(points) < 3:
            raise
        return _polygon(points, (source.frame.pixels.shape[-2], source.frame.pixels.shape[-1])) & _visible(source), []


def _masks(
    source: DragSource, handles: Sequence[Point], settings: DragSettings, edits: MaskEdits
) -> tuple[Tensor, list[ObjectMask]]:
    """What each handle moves, (k, H, W), and the automatic masks, of which there are none if the user's is used."""
    visible = _visible(source)
    if edits.given is not None and not bool(edits.given.any()):
        raise UserError("the mask is empty: paint white what may move")
    if edits.given is not None and settings.user_mask == "replace":
        cells = [(int(y), int(x)) for x, y in handles]
        return _resized_mask(masks_per_handle(edits.given, cells), settings.grow) & visible, []
    pixels, cell = source.frame.pixels[0], _cell_of(source)
    rivals = [cell(point) for point in edits.remove]
    objects = [object_mask(source.attention, pixels, cell(handle), settings, rivals) for handle in handles]
    for handle, found in zip(handles, objects, strict=True):
        _refuse_background(source, handle, found, settings)
    masks = torch.stack([found.pixels for found in objects])
    for point in edits.add:
        masks = masks | object_mask(source.attention, pixels, cell(point), settings, rivals).pixels
    if edits.given is not None:
        masks = masks & edits.given
        if not bool(masks.any()):
            raise UserError(
                "the mask has nothing in common with what the handles' attention selects: draw it around them"
            )
    return _resized_mask(masks, settings.grow) & visible, objects


def _refuse_background(source: DragSource, handle: Point, found: ObjectMask, settings: DragSettings) -> None:
    """UserError if what was found under `handle` spreads like a background."""
    height, width = source.frame.size
    inside = found.pixels[:height, :width]
    share = float(inside.float().mean())
    edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
    touched = sum(float(edge.float().mean()) > 0.25 for edge in edges)
    if share > settings.mask_most or touched >= 2 or found.threshold > settings.mask_threshold:
        x, y = source.frame.to_point((handle[0] / source.frame.factor, handle[1] / source.frame.factor))
        raise UserError(
            f"the handle {x:.4g},{y:.4g} lies on the background: what belongs together there covers {share:.0%} of the "
            "picture; put the handle on the thing that is to move, give a mask, or use the mode region"
        )


def _groups(masks: Tensor) -> list[list[int]]:
    """Numbers of the handles, grouped by object: handles of one object have masks that overlap."""
    groups: list[list[int]] = []
    for index, mask in enumerate(masks):
        for group in groups:
            other = masks[group].any(0)
            if int((mask & other).sum()) > SAME_OBJECT * min(int(mask.sum()), int(other.sum())):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _field(
    source: DragSource, masks: Tensor, ratios: Sequence[Tensor] | None, handles: Sequence[Point],
    vectors: Sequence[Point], settings: DragSettings,
) -> Tensor:  # fmt: skip
    """The displacement (H, W, 2), as (x, y), of the pixels of one object that several handles drag or deform."""
    factor, cell = source.frame.factor, _cell_of(source)
    cells = [cell(handle) for handle in handles]
    size = source.attention.size
    coarse = interpolate(masks[:, None].float(), size, mode="area")[:, 0] > 0
    if settings.mode == "move":
        factors = torch.ones(coarse.shape)
    elif settings.displacement == "stretch" or ratios is None:
        factors = torch.stack([stretch_factors(one, at) for one, at in zip(coarse, cells, strict=True)])
    else:
        factors = torch.stack(list(ratios)).clamp(0, 1)
    towards = torch.tensor([(dy, dx) for dx, dy in vectors]) / factor
    field = displacement_field(factors, coarse, cells, towards, settings.weights) * factor
    field = torch.where(coarse.any(0)[..., None], field, _nearest(field, coarse.any(0)))
    wide = interpolate(field.permute(2, 0, 1)[None].flip(1), masks.shape[-2:], mode="bilinear")[0]
    return wide.permute(1, 2, 0)


def _nearest(field: Tensor, known: Tensor) -> Tensor:
    """`field` (h, w, 2), continued smoothly beyond the cells `known`, so that the border is not pulled towards zero."""
    return smoothly_filled(field.permute(2, 0, 1), known).permute(1, 2, 0)


def _polygon(corners: Sequence[Point], size: tuple[int, int]) -> Tensor:
    """The mask (H, W) of the polygon with `corners` (x, y)."""
    drawn = Image.new("1", (size[1], size[0]))
    ImageDraw.Draw(drawn).polygon([(x, y) for x, y in corners], fill=1)
    return torch.from_numpy(np.asarray(drawn).copy())


def _resized_mask(masks: Tensor, grow: int) -> Tensor:
    """`masks` (k, H, W) extended by `grow` pixels, or shrunk where that is negative."""
    if grow == 0:
        return masks
    return torch.stack([_grown(mask, grow) if grow > 0 else ~_grown(~mask, -grow) for mask in masks])


def _grown(mask: Tensor, pixels: int) -> Tensor:
    return dilated(mask, pixels) if pixels else mask


def _visible(source: DragSource) -> Tensor:
    """The pixels (H, W) that show the picture and no padding."""
    shown = torch.zeros(source.frame.pixels.shape[-2:], dtype=torch.bool)
    shown[: source.frame.size[0], : source.frame.size[1]] = True
    return shown


def _cell_of(source: DragSource) -> Callable[[Point], Cell]:
    """A function from a point (x, y) in pixels to its latent cell (row, column)."""
    factor = source.frame.factor
    return lambda point: (int(point[1]) // factor, int(point[0]) // factor)
