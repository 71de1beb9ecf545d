"""Masks of pixels, from attention that is known and coarse."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d

from personalize.editing.drag.config import DragSettings
from personalize.editing.drag.preview import preview_drag
from personalize.editing.drag.reading import DragSource
from personalize.editing.drag.segment import object_mask, unmoved_objects
from personalize.io.images import to_image, to_pixels
from personalize.models.image_processor import PaddedImage

CELLS, FACTOR = 16, 4


class KnownAttention:
    """Cells attend to cells of their own kind, and `mixed` as much to other objects; blurred over three cells."""

    def __init__(self, kinds, mixed=0.0):
        self.kinds, self.mixed, self.size = kinds, mixed, (CELLS, CELLS)

    def rows(self, cells):
        mine = self.kinds[cells[:, 0], cells[:, 1]][:, None, None]
        same = (mine == self.kinds[None]).float()
        other = ((mine > 0) & (self.kinds[None] > 0)).float() * self.mixed
        blurred = avg_pool2d(torch.maximum(same, other)[:, None], 3, 1, 1, count_include_pad=False)[:, 0] + 1e-3
        return blurred / blurred.sum((1, 2), keepdim=True)

    def mean_row(self, cells):
        return self.rows(cells).mean(0)

    def mass(self, cells, mask):
        return self.rows(cells)[:, mask].sum(1)

    def around(self, handle, window):
        return self.mean_row(torch.tensor([handle]))


@pytest.fixture
def scene():
    """A red disc and a green one on a textured background: pixels, the disc's mask, and the kinds of the cells."""
    side = CELLS * FACTOR
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    red, green = (((rows - 32) ** 2 + (columns - at) ** 2) < 11**2 for at in (20, 42))
    green &= ~red
    noise = torch.rand(side, side, generator=torch.Generator().manual_seed(0)) * 0.4
    picture = torch.stack([noise - 0.2, noise, noise + 0.2])
    for mask, colour in ((red, (0.8, -0.6, -0.6)), (green, (-0.6, 0.7, -0.6))):
        picture = torch.where(mask, torch.tensor(colour)[:, None, None], picture)
    share = [avg_pool2d(mask[None, None].float(), FACTOR)[0, 0] > 0.5 for mask in (red, green)]
    return picture, red, green, share[0].long() + 2 * share[1].long()


def iou(one, other):
    return float((one & other).sum() / (one | other).sum())


def test_the_border_is_found_by_colour(scene):
    """The coarse mask has whole cells; the refined one holds at least 97 % of the disc at an IoU of at least 0.9."""
    picture, red, _, kinds = scene
    found = object_mask(KnownAttention(kinds), picture, (8, 5), DragSettings())
    coarse = object_mask(KnownAttention(kinds), picture, (8, 5), DragSettings(refine=False))
    assert float((found.pixels & red).sum() / red.sum()) >= 0.97 and iou(found.pixels, red) >= 0.9
    assert iou(coarse.pixels, red) < iou(found.pixels, red)


def test_a_point_on_something_else_takes_it_out(scene):
    """Where the discs attend to one another both are found, until a point on the other one is given."""
    picture, red, green, kinds = scene
    attention = KnownAttention(kinds, mixed=0.6)
    together = object_mask(attention, picture, (8, 5), DragSettings())
    assert float((together.pixels & green).sum()) > 0.9 * float(green.sum())
    alone = object_mask(attention, picture, (8, 5), DragSettings(), without=[(8, 11)])
    assert float((alone.pixels & green).sum()) < 0.1 * float(green.sum())
    assert float((alone.pixels & red).sum()) > 0.95 * float(red.sum())


def test_the_handle_belongs_to_its_own_mask(scene):
    picture, _, _, kinds = scene
    assert object_mask(KnownAttention(kinds), picture, (8, 5), DragSettings()).pixels[34, 22]


class OneSided(KnownAttention):
    """Cells of kind 2 attend half to kind 1, whose cells hardly notice them: 0.12, where the rest gets 0.01."""

    def rows(self, cells):
        mine, all_kinds = self.kinds[cells[:, 0], cells[:, 1]][:, None, None], self.kinds[None]
        weights = (mine == all_kinds).float() + 0.12 * ((mine == 1) & (all_kinds == 2)).float()
        weights = weights + 0.5 * ((mine == 2) & (all_kinds == 1)).float() + 1e-2
        return weights / weights.sum((1, 2), keepdim=True)


def test_a_part_that_attends_to_the_object_is_of_it_though_the_object_hardly_attends_to_the_part():
    """As the leaf of an apple: another colour, a third of the attention that decides, but it looks at the apple.

    What does not look at the object stays outside, though it has the leaf's colour."""
    kinds = torch.zeros(CELLS, CELLS, dtype=torch.long)
    kinds[6:11, 4:10], kinds[4:6, 6:8] = 1, 2  # the apple, its leaf
    pixels = torch.full((3, 64, 64), -0.2) + 0.2 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels[:, 24:44, 16:40] = torch.tensor([0.8, -0.6, -0.6])[:, None, None]
    pixels[:, 16:24, 24:32] = torch.tensor([-0.6, 0.7, -0.6])[:, None, None]
    leaf = torch.zeros(64, 64, dtype=torch.bool)
    leaf[16:24, 24:32] = True
    found = object_mask(OneSided(kinds), pixels, (8, 6), DragSettings()).pixels
    assert float((found & leaf).sum() / leaf.sum()) > 0.95
    alone = torch.where(kinds == 2, 3, kinds)  # nothing ties kind 3 to kind 1
    without = object_mask(OneSided(alone), pixels, (8, 6), DragSettings()).pixels
    assert float((without & leaf).sum() / leaf.sum()) < 0.2


class ByKind(KnownAttention):
    """Cells of kind 1 attend to each kind by its `weights`; all others to their own kind."""

    def __init__(self, kinds, weights):
        super().__init__(kinds)
        self.weights = torch.tensor(weights)

    def rows(self, cells):
        mine = self.kinds[cells[:, 0], cells[:, 1]][:, None, None]
        weights = torch.where(mine == 1, self.weights[self.kinds][None], (mine == self.kinds[None]).float())
        return weights / weights.sum((1, 2), keepdim=True)


@pytest.mark.parametrize(("second", "stays"), [(0.9, True), (0.45, False)])
def test_a_thing_just_like_the_object_stays_though_a_strip_that_attention_half_finds_joins_them(second, stays):
    """As two owls before the sea: r is 0.2 of the strip between, below τ and above τ/2, so that M₂ joins the owls.

    What attention finds half as well as the object is a part of it, as a panda's other ear, and goes with it.
    """
    kinds = torch.zeros(CELLS, CELLS, dtype=torch.long)
    kinds[7:9] = 2  # the strip
    kinds[5:11, 2:6], kinds[5:11, 10:14] = 1, 3
    pixels = torch.full((3, 64, 64), -0.2) + 0.1 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels[:, 28:36] = torch.tensor([0.7, -0.5, -0.5])[:, None, None]
    for left in (8, 40):
        pixels[:, 20:44, left : left + 16] = torch.tensor([0.8, -0.6, -0.6])[:, None, None]
    found = object_mask(ByKind(kinds, [0.001, 1.0, 0.2, second]), pixels, (8, 3), DragSettings())
    assert bool(found.pixels[20:44, 8:24].all()) and bool(found.cells[5:11, 2:6].all())
    assert float(found.pixels[20:44, 40:56].float().mean()) == (0 if stays else 1)


def test_other_objects_are_found_with_a_cell_around_them_and_background_is_not():
    """Also one of another kind, to which the object attends three times as much as to background."""
    kinds = torch.zeros(CELLS, CELLS, dtype=torch.long)
    kinds[5:11, 2:6], kinds[6:10, 11:14] = 1, 2
    attention = ByKind(kinds, [0.1, 1.0, 0.3])
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[20:44, 8:24] = True
    wanted = torch.zeros(64, 64, dtype=torch.bool)
    wanted[20:44, 40:60] = True
    assert torch.equal(unmoved_objects(attention, mask), wanted)
    assert not unmoved_objects(ByKind(kinds, [0.1, 1.0, 0.2]), mask).any()
    assert not unmoved_objects(attention, ~torch.zeros_like(mask)).any()


def test_what_an_object_leaves_is_not_filled_with_another_one():
    """As with two owls before the sea: around the second one the picture looks just as around the first."""
    ground = torch.rand(3, 64, 32, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2) - 0.8  # the same twice
    kinds = torch.zeros(CELLS, CELLS, dtype=torch.long)
    kinds[8:12, 2:6], kinds[8:12, 10:14] = 1, 3
    pixels = ground.clone()
    for left in (8, 40):
        pixels[:, 32:48, left : left + 16] = torch.tensor([0.9, 0.6, -0.9])[:, None, None]
    picture = to_image(pixels)
    frame = PaddedImage(picture, (64, 64), to_pixels(picture), FACTOR)
    source = DragSource(frame, ByKind(kinds, [0.001, 1.0, 0.0, 0.9]))
    drag = preview_drag(source, [(16, 40), (16, 12)]).drag
    assert bool(drag.mask[32:48, 8:24].all()) and bool(drag.others[32:48, 40:56].all()) and not drag.mask[:, 32:].any()
    yellow = (drag.pixels[0] > 0.7) & (drag.pixels[2] < -0.7)
    assert int(yellow[drag.void].sum()) == 0 and bool(yellow[34:46, 42:54].all())


def test_what_pads_the_picture_is_not_compared_with_the_object():
    """The object stands on the lower border, below which it is mirrored: there its own colour counted as background."""
    kinds = torch.zeros(CELLS, CELLS, dtype=torch.long)
    kinds[5:7, 1:15], kinds[7:9, 1:15], kinds[9:13, 1:15] = 1, 2, 3  # the object, its lower half, and what mirrors it
    pixels = torch.full((3, 64, 64), -0.2) + 0.2 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels[:, 20:52, 4:60] = torch.tensor([0.8, -0.6, -0.6])[:, None, None]
    attention = ByKind(kinds, [0.001, 1.0, 0.16, 0.001])  # colour decides about the lower half
    settings, sizes = DragSettings(mask_most=0.9), ((36, 64), None)
    found = (object_mask(attention, pixels, (5, 7), settings, picture_size=one) for one in sizes)
    told, every = (one.pixels[28:36, 4:60].float().mean() for one in found)
    assert float(told) > 0.95 > float(every)
