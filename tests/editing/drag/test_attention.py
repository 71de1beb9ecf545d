"""Hooks that record and carry over, and rows of attention without the map."""

from __future__ import annotations

import pytest
import torch

from personalize.editing.drag.attention import (
    AttentionRows,
    KeyValueInjection,
    PointTracker,
    QKVRecorder,
    neighbourhood,
    self_attention_sites,
    site_positions,
)
from personalize.models.attention import AttentionHook, attention_sites
from personalize.sampling.denoise import Edit, denoise, initial_latents
from personalize.sampling.schedule import make_schedule
from tests.support.tiny import NAMES, tiny, tiny_sd1

SIZE = (16, 16)


def run(model, *hooks, steps=2, inverse=False):
    edit = Edit(model.prompts(["a cat"], (64, 64)), guidance_scale=1, hooks=hooks)
    return denoise(model, initial_latents(model, [0], (64, 64)), edit, make_schedule(model, steps, inverse=inverse))


def names(sites):
    return [site.name for site in sites]


@pytest.mark.parametrize("name", NAMES)
def test_the_finest_levels_are_counted_where_there_is_self_attention(name):
    sites = attention_sites(tiny(name).unet, SIZE)
    two, every = self_attention_sites(sites, ("up",), (0, 1)), self_attention_sites(sites, ("up",), None)
    sides = sorted({site.height for site in every}, reverse=True)
    assert {site.height for site in two} == set(sides[:2]) and not any(site.cross for site in two)
    assert {site.place for site in every} == {"up"} and self_attention_sites(sites, ("mid",), (0,))
    if name == "sd1":
        assert len(every) == 9 and len(two) == 6


class Full(AttentionHook):
    """The whole map of one site at the last step, by explicit softmax."""

    def __init__(self, name):
        self.name = name

    def wants(self, site):
        return site.name == self.name

    def probs(self, p, site):
        self.map = p
        return p


@pytest.mark.parametrize("level", [0, 1])
def test_attentiondrag_d1_rows_equal_those_of_the_whole_map(level):
    """1e-5: fp32 softmax of the same projections; finer sites only, where a row needs no resizing."""
    model = tiny_sd1()
    site = self_attention_sites(attention_sites(model.unet, SIZE), ("up",), (level,))[0]
    reading, full = QKVRecorder([site.name], "qk", (0, 500)), Full(site.name)
    run(model, reading, full)
    assert [t for _, t in reading.kept] == [1]
    size = (site.height, site.width)
    cells = torch.tensor([[0, 0], [3, 5], [size[0] - 1, size[1] - 1]])
    attention = AttentionRows(reading.kept, [site], size)
    rows = attention.rows(cells)
    torch.testing.assert_close(attention.mean_row(cells), rows.mean(0))
    mask = torch.zeros(size, dtype=torch.bool)
    mask[1:3] = True
    torch.testing.assert_close(attention.mass(cells, mask), rows[:, mask].sum(1))
    expected = full.map[0].mean(0)[cells @ torch.tensor([size[1], 1])].unflatten(-1, size)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)


def test_rows_are_means_over_sites_that_sum_to_one():
    """1e-2: spreading a coarse map over a finer grid by bilinear weights loses a little at the border."""
    model = tiny_sd1()
    sites = self_attention_sites(attention_sites(model.unet, SIZE), ("up",), (0, 1))
    reading = QKVRecorder(names(sites), "qk")
    run(model, reading)
    rows = AttentionRows(reading.kept, sites, SIZE).rows(torch.tensor([[2, 2], [9, 12]]))
    assert rows.shape == (2, 16, 16) and rows.min() >= 0
    torch.testing.assert_close(rows.sum((1, 2)), torch.ones(2), atol=1e-2, rtol=0)


def test_handles_average_their_window():
    model = tiny_sd1()
    sites = self_attention_sites(attention_sites(model.unet, SIZE), ("up",), (0,))
    reading = QKVRecorder(names(sites), "qk")
    run(model, reading)
    correlation = AttentionRows(reading.kept, sites, SIZE)
    torch.testing.assert_close(
        correlation.around((0, 5), 3),
        correlation.rows(torch.cartesian_prod(torch.arange(2), torch.arange(4, 7))).mean(0),
    )
    assert neighbourhood((5, 5), 1, SIZE).tolist() == [[5, 5]]


def test_cells_find_their_place_on_coarse_and_odd_grids():
    sites = attention_sites(tiny_sd1().unet, (9, 16))
    coarse = next(site for site in sites.values() if (site.height, site.width) == (5, 8))
    cells = torch.tensor([[0, 0], [8, 15], [1, 2], [2, 2]])
    assert site_positions(cells, coarse, (9, 16)).tolist() == [0, 4 * 8 + 7, 1, 1 * 8 + 1]


def test_attentiondrag_d7_one_record_for_each_decoder_layer_and_step():
    model = tiny_sd1()
    sites = self_attention_sites(attention_sites(model.unet, SIZE), ("up",), None)
    carrying = QKVRecorder(names(sites), "kv")
    run(model, carrying, steps=3, inverse=True)
    plan = make_schedule(model, 3, inverse=True)
    assert len(carrying.kept) == 9 * 3
    assert set(carrying.kept) == {(name, move.timestep) for name in names(sites) for move in plan}
    assert {move.timestep for move in plan} == {move.timestep for move in make_schedule(model, 3)}, "same in sampling"
    assert all(len(parts) == 2 and parts[0].device.type == "cpu" for parts in carrying.kept.values())


def test_carrying_its_own_keys_and_values_changes_nothing():
    model = tiny_sd1()
    carrying = QKVRecorder(names(self_attention_sites(attention_sites(model.unet, SIZE), ("up",), None)), "kv")
    plain = run(model, carrying)
    assert torch.equal(run(model, KeyValueInjection(carrying.kept)), plain)
    # every key twice: the same mean, in another order of sums
    doubled = run(model, KeyValueInjection(carrying.kept, "concat"))
    torch.testing.assert_close(doubled, plain, atol=1e-4, rtol=1e-4)


def test_another_runs_keys_and_values_change_the_result_from_the_step_asked_for():
    model = tiny_sd1()
    carrying = QKVRecorder(names(self_attention_sites(attention_sites(model.unet, SIZE), ("up",), None)), "kv")
    run(model, carrying, inverse=True)
    plain = run(model)
    results = [run(model, KeyValueInjection(carrying.kept, mode, start)) for mode, start in (
               ("replace", 0), ("replace", 1), ("concat", 0), ("replace", 2))]  # fmt: skip
    assert all((result - plain).abs().max() > 1e-3 for result in results[:3])
    assert torch.equal(results[3], plain), "there is no third step"


def test_arrivals_find_an_unchanged_picture_where_it_was():
    model = tiny_sd1()
    sites = self_attention_sites(attention_sites(model.unet, SIZE), ("up",), (0,))
    reading = QKVRecorder(names(sites), "qk")
    plain = run(model, reading)
    handles = [(3, 4), (12, 9)]
    arrivals = PointTracker(reading.kept, sites, SIZE, handles, 1)
    assert torch.equal(run(model, arrivals), plain), "it only looks"
    assert arrivals.cells(torch.ones(SIZE, dtype=torch.bool)) == handles
    within = torch.zeros(SIZE, dtype=torch.bool)
    within[0, :5] = True
    assert all(row == 0 and column < 5 for row, column in arrivals.cells(within))
