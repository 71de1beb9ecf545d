"""Masks on the latent grid: thresholds with limits, one part for each handle, masks of the user's shared out."""

from __future__ import annotations

import pytest
import torch

from personalize.editing.drag.mask import (
    closed,
    connected_component,
    connected_parts,
    dilated,
    masks_per_handle,
    ratio_mask,
    without_holes,
)
from personalize.editing.drag.selection import joined
from personalize.errors import UserError

LIMITS = {"fewest": 9, "most": 0.4}


def bump(row: float, column: float, width: float = 3.0, size: int = 24) -> torch.Tensor:
    """A smooth ratio map (size, size): 1 at its centre, falling like a bell."""
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing="ij")
    return torch.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))


def drawn(*rows: str) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


def test_attentiondrag_d5_the_mask_is_where_the_ratio_exceeds_the_threshold():
    """Exact: a disc is closed, in one piece and without holes, so that cleaning changes nothing."""
    ratio = bump(10, 12)
    for threshold in (0.2, 0.3, 0.6):
        mask, taken = ratio_mask(ratio, (10, 12), threshold, **LIMITS)
        assert taken == threshold and torch.equal(mask, ratio > threshold)


def test_attentiondrag_d5_contains_the_handle_in_one_part_and_shrinks_with_the_threshold():
    noise = torch.rand(24, 24, generator=torch.Generator().manual_seed(3))
    ratio = 0.7 * bump(6, 6, 4.0) + 0.5 * noise
    before = torch.ones(24, 24, dtype=torch.bool)
    for threshold in torch.linspace(0, 1, 11).tolist():
        mask, _ = ratio_mask(ratio, (6, 6), threshold, **LIMITS)
        assert mask[6, 6] and torch.equal(connected_component(mask, (6, 6)), mask)
        assert 9 <= mask.sum() <= int(0.4 * mask.numel())
        assert not (mask & ~before).any(), "a higher threshold gave cells that a lower one had not"
        before = mask


def test_two_identical_objects_only_the_one_with_the_handle():
    ratio = torch.maximum(bump(6, 6, 2.0), bump(6, 18, 2.0))
    mask, _ = ratio_mask(ratio, (6, 6), 0.3, **LIMITS)
    assert torch.equal(mask, bump(6, 6, 2.0) > 0.3) and not mask[:, 12:].any()


def test_a_handle_on_the_background_gets_a_mask_of_limited_size():
    """The sky resembles the sky: nine tenths of the picture exceed 0.3, so the threshold rises."""
    noise = torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    ratio = 0.5 + 0.5 * bump(4, 4, 6.0) + 0.001 * noise
    ratio[18:, 18:] = 0.1
    mask, taken = ratio_mask(ratio, (4, 4), 0.3, **LIMITS)
    assert taken > 0.5 and mask.sum() <= 0.4 * 576
    assert ratio_mask(ratio, (4, 4), taken - 1e-3, **LIMITS)[0].sum() > mask.sum() or mask.sum() > 0.35 * 576


def test_a_mask_that_shrinks_to_a_dot_is_widened():
    mask, taken = ratio_mask(bump(10, 10, 0.5), (10, 10), 0.3, **LIMITS)
    assert taken < 0.3 and 9 <= mask.sum() <= 13  # the next ring of a bell has four cells more


def test_ratios_above_one_still_find_a_threshold():
    ratio = 1 + bump(12, 12, 8.0)
    mask, taken = ratio_mask(ratio, (12, 12), 0.3, **LIMITS)
    assert 1 < taken < 2 and mask.sum() <= 0.4 * 576


def test_attention_that_is_the_same_everywhere_is_no_guide():
    with pytest.raises(UserError, match="handle at cell .x 3, y 2. apart.*give a mask"):
        ratio_mask(torch.ones(12, 12), (2, 3), 0.3, **LIMITS)


def test_a_users_mask_is_shared_among_handles():
    mask = drawn("##..#", "##..#", ".....", "#....")
    first, second = masks_per_handle(mask, [(0, 0), (1, 4)])
    assert torch.equal(first, drawn("##...", "##...", ".....", "#...."))
    assert torch.equal(second, drawn("....#", "....#", ".....", "#...."))
    everything = masks_per_handle(mask, [(2, 2)])[0]
    assert torch.equal(everything, mask), "a handle outside the mask moves all of it"


def test_shapes():
    ring = drawn("......", ".####.", ".#..#.", ".####.", "......")
    assert torch.equal(without_holes(ring), drawn("......", ".####.", ".####.", ".####.", "......"))
    leaky = drawn(".##", "#..", ".##")
    assert torch.equal(without_holes(leaky), leaky)
    assert torch.equal(connected_component(drawn("#..#", ".#..", "...#"), (0, 0)), drawn("#...", ".#..", "...."))
    assert not connected_component(drawn("#.", ".."), (1, 1)).any()
    assert torch.equal(closed(drawn("#.#", "...", "#.#")), drawn("###", "###", "###"))
    assert torch.equal(closed(drawn("#...", "....", "....")), drawn("#...", "....", "...."))
    assert torch.equal(dilated(drawn(".....", ".....", "..#.."), 2), drawn("#####", "#####", "#####"))
    assert torch.equal(dilated(leaky, 0), leaky)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.8])
def test_parts_and_holes_are_those_found_cell_by_cell(share):
    """Growing by whole runs along rows and columns ends where growing by single neighbours does, on any pattern."""
    rng = torch.Generator().manual_seed(int(10 * share))
    for height, width in ((1, 1), (1, 9), (7, 1), (12, 17), (31, 20)):
        mask = torch.rand(height, width, generator=rng) < share
        start = (height // 2, width // 3)
        around = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
        assert torch.equal(connected_component(mask, start), walked(mask, [start], around))
        edge = [(row, column) for row in range(height) for column in range(width)
                if row in (0, height - 1) or column in (0, width - 1)]  # fmt: skip
        outside = walked(~mask, edge, [(0, 1), (1, 0), (0, -1), (-1, 0)])
        assert torch.equal(without_holes(mask), ~outside)


def walked(mask, starts, steps):
    """The cells of `mask` that paths of `steps` reach from `starts`, one cell at a time."""
    found, waiting = torch.zeros_like(mask), [at for at in starts if mask[at]]
    while waiting:
        row, column = waiting.pop()
        if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column] and not found[row, column]:
            found[row, column] = True
            waiting += [(row + down, column + right) for down, right in steps]
    return found


@pytest.mark.parametrize("cells", [0, 1, 2, 5, 9, 40])
def test_dilation_reaches_as_far_as_asked_and_no_farther(cells):
    rows, columns = torch.meshgrid(torch.arange(23), torch.arange(31), indexing="ij")
    mask = torch.zeros(23, 31, dtype=torch.bool)
    mask[4, 6] = mask[20, 30] = True
    near = [torch.maximum((rows - row).abs(), (columns - column).abs()) <= cells for row, column in ((4, 6), (20, 30))]
    assert torch.equal(dilated(mask, cells), near[0] | near[1])


def test_connected_parts_have_numbers_of_their_own():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[0, :3] = mask[1, 3] = mask[4:, 5:] = mask[5, 0] = True
    parts = connected_parts(mask)
    assert ((parts > 0) == mask.numpy()).all() and len(set(parts[parts > 0].tolist())) == 3
    assert parts[0, 0] == parts[1, 3] and parts[4, 5] == parts[5, 7]


def test_what_is_added_joins_one_object_and_there_every_handle():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :2, :4] = masks[1, :2, :4] = masks[2, 6:, 4:] = True
    more = torch.zeros(8, 8, dtype=torch.bool)
    more[3, 0] = more[4, 7] = True
    wider = joined(masks, more, [(0, 0), (3, 1), (7, 7)])
    assert wider[:, 3, 0].tolist() == [True, True, False] and wider[:, 4, 7].tolist() == [False, False, True]
    assert torch.equal(wider & ~more, masks)
