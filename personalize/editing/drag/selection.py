"""What a drag moves: the masks of the objects under its handles, as the user's mask and points change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.mask import Cell, connected_parts, dilated, own_parts
from personalize.editing.drag.points import Point
from personalize.editing.drag.reading import DragSource
from personalize.editing.drag.segment import ObjectMask, object_mask
from personalize.errors import UserError

SAME_OBJECT = 0.5  # handles whose masks overlap by more than this share of the smaller one drag one object


@dataclass(frozen=True)
class MaskEdits:
    """A user's changes of the automatic mask; points and lengths are in pixels of the padded picture.

    given: the user's own mask (H, W), which takes its place or, by `DragSettings.user_mask`, is intersected with it.
    add: points on further parts of the objects, each of which joins the mask of the nearest handle.  remove: points on
    things that do not belong to them.
    """

    given: Tensor | None = None
    add: tuple[Point, ...] = ()
    remove: tuple[Point, ...] = ()


UNCHANGED = MaskEdits()


def region_of_points(
    source: DragSource, points: Sequence[Point], settings: DragSettings, edits: MaskEdits
) -> tuple[Tensor, list[ObjectMask]]:
    """The object under the points; where attention finds none, the polygon with these corners."""
    try:
        masks, objects = masks_of(source, points, settings, edits)
        return masks.any(0), objects
    except UserError:
        if edits != UNCHANGED or len(points) < 3:
            raise
        size = (source.frame.pixels.shape[-2], source.frame.pixels.shape[-1])
        return polygon(points, size) & visible_pixels(source), []


def masks_of(
    source: DragSource, handles: Sequence[Point], settings: DragSettings, edits: MaskEdits
) -> tuple[Tensor, list[ObjectMask]]:
    """What each handle moves, (k, H, W), and the automatic masks, of which there are none if the user's is used."""
    visible = visible_pixels(source)
    if edits.given is not None and not bool(edits.given.any()):
        raise UserError("the mask is empty: paint white what may move")
    if edits.given is not None and settings.user_mask == "replace":
        if edits.add or edits.remove:
            raise UserError(
                "points to add to the mask or remove from it change the mask that attention finds, and the given mask "
                "takes its place: paint it as wanted, or choose the user mask intersect"
            )
        own = own_parts(edits.given, [_pixel_at(handle) for handle in handles])
        masks = joined(own, edits.given & ~own.any(0), handles)
        return resized(masks, settings.grow) & visible, []
    pixels, cell = source.frame.pixels[0], cells_of(source)
    rivals = [cell(point) for point in edits.remove]
    size = source.frame.size
    objects = [object_mask(source.attention, pixels, cell(handle), settings, rivals, size) for handle in handles]
    for handle, found in zip(handles, objects, strict=True):
        _refuse_background(source, handle, found, settings)
    masks = torch.stack([found.pixels for found in objects])
    for point in edits.add:
        part = object_mask(source.attention, pixels, cell(point), settings, rivals, size).pixels
        masks = joined(masks, part, handles)
    if edits.given is not None:
        masks = masks & edits.given
        if not bool(masks.flatten(1).any(1).all()):
            raise UserError(
                "the mask has nothing in common with what a handle's attention selects: draw it around every handle"
            )
    return resized(masks, settings.grow) & visible, objects


def joined(masks: Tensor, more: Tensor, handles: Sequence[Point]) -> Tensor:
    """`masks` (k, H, W) with the pixels `more` (H, W): each connected part of them joins the object of one handle.

    That is the handle nearest to it; what joined two objects would be seen at the new places of both.
    """
    groups = objects_of(masks)
    if len(groups) == 1:
        return masks | more
    parts, (rows, columns) = connected_parts(more), np.indices(more.shape)
    apart = np.stack([(rows - y) ** 2 + (columns - x) ** 2 for x, y in handles])
    least = np.full((len(handles), parts.max() + 1), np.inf)
    for number, distances in enumerate(apart):
        np.minimum.at(least[number], parts, distances)
    nearest, wider = torch.from_numpy(least.argmin(0)[parts]), masks.clone()
    for group in groups:
        wider[group] |= more & torch.isin(nearest, torch.tensor(group))
    return wider


def objects_of(masks: Tensor) -> list[list[int]]:
    """Numbers of the handles, grouped by object: handles of one object have masks (k, H, W) that overlap."""
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


def _pixel_at(point: Point) -> Cell:
    """Row and column of a point."""
    return int(point[1]), int(point[0])


def _refuse_background(source: DragSource, handle: Point, found: ObjectMask, settings: DragSettings) -> None:
    """UserError if what was found under `handle` spreads like a background."""
    height, width = source.frame.size
    inside = found.pixels[:height, :width]
    share = float(inside.float().mean())
    edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
    touched = sum(float(edge.float().mean()) > 0.25 for edge in edges)
    if share > settings.mask_most or touched >= 2 or found.threshold > settings.mask_threshold:
        x, y = source.frame.from_scaled(handle)
        raise UserError(
            f"the handle {x:.4g},{y:.4g} lies on the background: what belongs together there covers {share:.0%} of the "
            "picture; put the handle on the thing that is to move, give a mask that replaces what attention finds, or "
            "use the mode region"
        )


def polygon(corners: Sequence[Point], size: tuple[int, int]) -> Tensor:
    """The mask (H, W) of the polygon with `corners` (x, y)."""
    drawn = Image.new("1", (size[1], size[0]))
    ImageDraw.Draw(drawn).polygon([(x, y) for x, y in corners], fill=1)
    return torch.from_numpy(np.asarray(drawn).copy())


def resized(masks: Tensor, grow: int) -> Tensor:
    """`masks` (k, H, W) extended by `grow` pixels, or shrunk where that is negative."""
    if grow == 0:
        return masks
    return torch.stack([grown(mask, grow) if grow > 0 else ~grown(~mask, -grow) for mask in masks])


def grown(mask: Tensor, pixels: int) -> Tensor:
    """`mask` (H, W) extended by `pixels`, which may be 0."""
    return dilated(mask, pixels) if pixels else mask


def visible_pixels(source: DragSource) -> Tensor:
    """The pixels (H, W) that show the picture and no padding."""
    visible = torch.zeros(source.frame.pixels.shape[-2:], dtype=torch.bool)
    visible[: source.frame.size[0], : source.frame.size[1]] = True
    return visible


def cells_of(source: DragSource) -> Callable[[Point], Cell]:
    """A function from a point (x, y) in pixels to its latent cell (row, column)."""
    factor = source.frame.factor
    return lambda point: (int(point[1]) // factor, int(point[0]) // factor)
