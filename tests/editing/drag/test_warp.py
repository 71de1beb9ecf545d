"""Displacements and the warps they make, by hand-computed numbers."""

from __future__ import annotations

import pytest
import torch

from personalize.editing.drag.drag import DragSettings, warp
from personalize.editing.drag.warp import (
    attention_ratio,
    backward_warp,
    displacement_field,
    forward_warp,
    stretch_factors,
    warped,
)

SIDE = 24


def disc(row: float, column: float, radius: float, side: int = SIDE) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def centroid(mass: torch.Tensor) -> torch.Tensor:
    cells = torch.cartesian_prod(torch.arange(mass.shape[0]), torch.arange(mass.shape[1])).float()
    return (cells * mass.flatten()[:, None]).sum(0) / mass.sum()


def carried(mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Where the mass of a binary object lies after the warp, (h, w)."""
    return warped(mask.float()[None, None], source)[0, 0]


def rigid(mask, vector, **settings):
    ratios, vectors = torch.ones(1, *mask.shape), torch.tensor([vector])
    cell = tuple(mask.nonzero()[len(mask.nonzero()) // 2].tolist())
    return warp(ratios, mask[None], [cell], vectors, DragSettings(**settings))


def test_attentiondrag_d2_stretch_factors_of_a_5_by_5_mask():
    """The table of §3, to its three digits."""
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[2:7, 2:7] = True
    found = stretch_factors(mask, (4, 4))
    expected = {(4, 4): 1.0, (4, 5): 0.646, (5, 5): 0.5, (4, 6): 0.293, (5, 6): 0.209, (6, 6): 0.0}
    for cell, value in expected.items():
        assert float(found[cell]) == pytest.approx(value, abs=1e-3)
    assert float(found[mask].mean()) == pytest.approx(0.337, abs=1e-3)
    assert not found.isnan().any() and not found[~mask].any()


@pytest.mark.parametrize("handle", [(4, 4), (2, 2), (6, 3), (0, 0), (8, 4)])
def test_attentiondrag_d2_no_nan_wherever_the_handle_is(handle):
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[2:7, 2:7] = True
    found = stretch_factors(mask, handle)
    assert found.isfinite().all() and 0 <= found.min() and found.max() <= 1
    if mask[handle]:
        assert found[handle] == 1
    single = torch.zeros(9, 9, dtype=torch.bool)
    single[3, 3] = True
    assert stretch_factors(single, (3, 3))[3, 3] == 1


@pytest.mark.parametrize("mapping", ["forward", "backward"])
@pytest.mark.parametrize("vector", [(0.0, 8.0), (-3.0, 5.0), (2.5, -1.5), (0.49, 3.51), (-2.5, 0.5)])
def test_attentiondrag_d3_move_shifts_the_centroid_by_the_vector_and_keeps_the_mass(mapping, vector):
    """Exact: a rigid shift goes by whole cells, the vector rounded, halves upwards."""
    mask = disc(11, 10, 4)
    after = carried(mask, rigid(mask, vector, mapping=mapping))
    assert after.sum() == mask.sum()
    whole = torch.tensor([float(torch.floor(torch.tensor(part + 0.5))) for part in vector])
    torch.testing.assert_close(centroid(after) - centroid(mask.float()), whole, atol=1e-4, rtol=0)  # fp32 means


@pytest.mark.parametrize("mapping", ["forward", "backward"])
def test_attentiondrag_d3_what_leaves_the_frame_is_dropped(mapping):
    mask = disc(11, 19, 4)
    after = carried(mask, rigid(mask, (0.0, 6.0), mapping=mapping))
    inside = torch.zeros_like(mask)
    inside[:, 6:] = mask[:, :-6]
    assert torch.equal(after > 0, inside) and after.sum() < mask.sum()


def test_cells_that_moved_away_are_empty_and_others_stay():
    mask = disc(11, 8, 4)
    source = rigid(mask, (0.0, 6.0))
    shifted = torch.zeros_like(mask)
    shifted[:, 6:] = mask[:, :-6]
    assert torch.equal(source < 0, mask & ~shifted)
    still = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    assert torch.equal(source[~mask & ~shifted], still[~mask & ~shifted])


def test_the_strongest_claim_wins_and_equals_go_by_raster_order():
    field = torch.zeros(1, 5, 2)
    field[0, 0, 1], field[0, 1, 1], field[0, 2, 1] = 3.0, 2.0, 1.0  # all three arrive at cell 3
    mask = torch.tensor([[True, True, True, False, False]])
    for claims, winner in (([0.2, 0.9, 0.5], 1), ([0.2, 0.3, 0.5], 2), ([0.4, 0.4, 0.4], 0)):
        source = forward_warp(field, mask, torch.tensor([[*claims, 0.0, 0.0]]))
        assert source.tolist() == [[-1, -1, -1, winner, 4]]


def test_deform_moves_each_cell_by_its_ratio():
    """Centroid displacement = mean ratio × |V|, before rounding: exact in fp32, 1e-5."""
    mask, vector = disc(11, 10, 4), torch.tensor([[0.0, 8.0]])
    ratios = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    field = displacement_field(ratios, mask[None], [(11, 10)], vector, "distance")
    torch.testing.assert_close(field[mask].mean(0), torch.tensor([0.0, 8 * float(ratios[0][mask].mean())]))
    assert not field[~mask].any()


@pytest.mark.parametrize("mapping", ["forward", "backward"])
def test_attentiondrag_d11_deform_takes_the_handle_all_the_way_and_the_rest_part_of_it(mapping):
    """On the latent grid; ratios fall from 1 at the handle, so the object is drawn out, not shifted."""
    mask = disc(11, 8, 4)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    ratios = (1 - 0.2 * ((y - 11.0) ** 2 + (x - 8.0) ** 2).sqrt()).clamp(0, 1)[None]
    settings = DragSettings(mode="deform", mapping=mapping)
    source = warp(ratios, mask[None], [(11, 8)], torch.tensor([[0.0, 6.0]]), settings)
    after = carried(mask, source)
    if mapping == "forward":
        assert source[11, 14] == 11 * SIDE + 8, "the handle's cell is at the target"
    shift = (centroid(after) - centroid(mask.float()))[1]
    assert 0.5 < float(shift) < 5.5


def test_fastdrags_stretch_stops_short():
    """A disc of radius ρ in a circle of radius R goes 1 − 2ρ / 3R of the way; 0.02 for a disc made of cells."""
    thing, mask = disc(24, 20, 5, 48), disc(24, 20, 10, 48)
    for around, circle in ((mask, 10 * 2**0.5), (thing, 5 * 2**0.5)):  # half the diagonal of the bounding box
        found = stretch_factors(around, (24, 20))[thing].mean()
        assert float(found) == pytest.approx(1 - 2 * 5 / (3 * circle), abs=0.02)


def test_mapping_backwards_leaves_no_hole_where_pushing_tears():
    """A field that spreads: pushed cells lie apart; asked backwards, only what was revealed behind is empty."""
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[8:16, 4:12] = True
    field = torch.zeros(SIDE, SIDE, 2)
    field[..., 1] = (torch.arange(SIDE) - 4.0).clamp(min=0) * mask  # twice as wide, its left edge fixed
    torn = forward_warp(field, mask, mask.float())
    whole = backward_warp(field, mask)
    assert (torn < 0).sum() == 8 * 4 and (whole < 0).sum() == 0
    assert (carried(mask, whole)[8:16, 4:19] == 1).all()


def test_several_pairs_mix_by_distance_ratio_or_the_nearest():
    masks = torch.ones(2, 1, 5, dtype=torch.bool)
    handles, vectors = [(0, 0), (0, 4)], torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    ratios = torch.ones(2, 1, 5)
    near = displacement_field(ratios, masks, handles, vectors, "distance")
    torch.testing.assert_close(near[0, 2], torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(near[0, 1], torch.tensor([0.5, 1.5]), atol=1e-3, rtol=0)  # 1e-4 is added to distances
    torch.testing.assert_close(near[0, 0], torch.tensor([0.0, 2.0]), atol=1e-3, rtol=0)
    nearest = displacement_field(ratios, masks, handles, vectors, "winner")
    assert nearest[0, 1].tolist() == [0, 2] and nearest[0, 3].tolist() == [2, 0]
    ratios[1] = 0.5  # weights 2/3 and 1/3, times the ratios
    by_ratio = displacement_field(ratios, masks, handles, vectors, "ratio")
    torch.testing.assert_close(by_ratio[0, 3], torch.tensor([1 / 3, 4 / 3]))
    rigid = displacement_field(torch.ones(2, 1, 5), masks, handles, vectors, "ratio", ratios)  # as in the mode move
    torch.testing.assert_close(rigid[0, 3], torch.tensor([2 / 3, 4 / 3]))


def test_opposite_drags_do_not_cancel():
    masks, ratios = torch.ones(2, 1, 5, dtype=torch.bool), torch.ones(2, 1, 5)
    field = displacement_field(ratios, masks, [(0, 0), (0, 4)], torch.tensor([[0.0, -2.0], [0.0, 2.0]]), "distance")
    assert field[0, :, 1].tolist() == [-2, -2, -2, 2, 2]


def test_each_handle_moves_only_its_own_mask():
    masks = torch.tensor([[[True, True, False, False]], [[False, False, False, True]]])
    field = displacement_field(
        torch.ones(2, 1, 4), masks, [(0, 0), (0, 3)], torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "distance"
    )
    assert field[0].tolist() == [[0, 1], [0, 1], [0, 0], [1, 0]]


def test_ratio_is_one_at_the_handle_and_measured_against_its_surroundings():
    row = torch.full((5, 5), 0.01)
    row[1:4, 1:4] = 0.1
    row[2, 2] = 0.9  # a spike at itself: mean of the square (8 · 0.1 + 0.9) / 9
    found = attention_ratio(row.clone(), (2, 2), 3)
    assert found[2, 2] == 1
    assert float(found[1, 1]) == pytest.approx(0.1 / (1.7 / 9)) and float(found[0, 0]) == pytest.approx(
        0.01 / (1.7 / 9)
    )
    assert float(attention_ratio(row.clone(), (2, 2), 1)[1, 1]) == pytest.approx(1 / 9)
