"""What fills the empty cells: from where, and with how much noise."""

from __future__ import annotations

import pytest
import torch

from personalize.editing.drag.fill import attention_fill, bnni_fill, raw_attention_fill
from personalize.randomness import generator

SIDE, ALPHA = 32, 0.095  # ᾱ where fifty steps at strength 0.7 arrive
VOID = torch.zeros(SIDE, SIDE, dtype=torch.bool)
VOID[8:20, 6:18] = True
CELLS = VOID.nonzero()


def noisy(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """z and x̂0 (1, 4, SIDE, SIDE): smooth contents under unit noise."""
    y, x = torch.meshgrid(torch.linspace(0, 6, SIDE), torch.linspace(0, 6, SIDE), indexing="ij")
    clean = torch.stack([y.sin(), x.cos(), (x + y).sin(), (x - y).cos()])[None]
    noise = torch.randn(clean.shape, generator=generator(seed, "test/noise"))
    return ALPHA**0.5 * clean + (1 - ALPHA) ** 0.5 * noise, clean


def rows(cells: torch.Tensor) -> torch.Tensor:
    """Attention that falls with distance, softly: a few dozen cells count."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    squares = (y - cells[:, 0, None, None]) ** 2 + (x - cells[:, 1, None, None]) ** 2
    weights = torch.exp(-squares / 50.0)
    return weights / weights.sum((1, 2), keepdim=True)


def noise(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 4, SIDE, SIDE, generator=generator(seed, "test/fill"))


@pytest.mark.parametrize("drawn", [noise(), None], ids=["white", "source"])
def test_attentiondrag_d6_repaired_variance_is_that_of_the_surroundings(drawn):
    """±15 %: 144 cells × 4 channels of white noise estimate a deviation to 3 %; sources that repeat, less well."""
    z, clean = noisy()
    found = attention_fill(z, clean, ALPHA, CELLS, ~VOID, rows, 8, drawn)
    assert found.shape == (4, len(CELLS))
    assert float(found.std() / z[0][:, ~VOID].std()) == pytest.approx(1, abs=0.15)


def test_attentiondrag_d6_without_repair_too_little_is_left():
    """The reason for the repair: clearly below 0.7 of the surroundings, by attention and by neighbours."""
    z, _ = noisy()
    around = z[0][:, ~VOID].std()
    assert float(raw_attention_fill(z, CELLS, ~VOID, rows).std() / around) < 0.7
    assert float(bnni_fill(z * ~VOID, VOID)[0][:, VOID].std() / around) < 0.7


def test_attentiondrag_d6_no_source_lies_in_what_is_excluded():
    """Values there are not finite: one of them would spoil every mean it entered."""
    z, clean = noisy()
    for excluded in (VOID, VOID.roll(2, 1) | VOID):
        spoilt, also = z.clone(), clean.clone()
        spoilt[..., excluded] = also[..., excluded] = 1e30
        assert attention_fill(spoilt, also, ALPHA, CELLS, ~excluded, rows, 8, noise()).abs().max() < 10
        assert attention_fill(spoilt, also, ALPHA, CELLS, ~excluded, rows, 8, None).abs().max() < 10
        assert raw_attention_fill(spoilt, CELLS, ~excluded, rows).abs().max() < 10


def test_attentiondrag_d6_no_cell_is_left_empty():
    z, clean = noisy()
    emptied = z * ~VOID
    assert (bnni_fill(emptied, VOID)[0].abs().sum(0)[VOID] > 0).all()
    assert (attention_fill(z, clean, ALPHA, CELLS, ~VOID, rows, 8, noise()).abs().sum(0) > 0).all()
    assert torch.equal(bnni_fill(emptied, VOID)[0][:, ~VOID], z[0][:, ~VOID]), "full cells stay"


def test_the_clean_part_is_the_mean_of_the_heaviest():
    """One source each: with k = 1 the fill is the nearest cell's estimate under its own noise, so that cell itself."""
    z, clean = noisy()
    found = attention_fill(z, clean, ALPHA, CELLS, ~VOID, rows, 1, None)
    index = (rows(CELLS) * ~VOID).flatten(1).argmax(1)
    torch.testing.assert_close(
        found, z[0].flatten(1)[:, index], atol=1e-5, rtol=1e-5
    )  # √ᾱ x̂0 and noise apart, rejoined


def test_literal_fill_is_the_renormalised_mean():
    z, _ = noisy()
    weights = (rows(CELLS[:3]) * ~VOID).flatten(1)
    expected = z[0].flatten(1) @ (weights / weights.sum(1, keepdim=True)).T
    torch.testing.assert_close(raw_attention_fill(z, CELLS[:3], ~VOID, rows), expected, atol=1e-5, rtol=1e-4)


def test_neighbours_by_hand():
    """0.5 = (1/1 · 2 + 1/2 · 5 − 1/1 · 3 …): left 2 at 1, right 5 at 2, above −3 at 1, below 4 at 1."""
    picture = torch.tensor([[[[0.0, -3, 0, 0], [2, 0, 0, 5], [0, 4, 0, 0]]]])
    void = torch.zeros(3, 4, dtype=torch.bool)
    void[1, 1:3] = True
    found = bnni_fill(picture, void)
    first = (2 / 1 + 5 / 2 - 3 / 1 + 4 / 1) / (1 + 1 / 2 + 1 + 1)
    assert float(found[0, 0, 1, 1]) == pytest.approx(first)
    assert float(found[0, 0, 1, 2]) == pytest.approx((first + 5 + 0 + 0) / 4), "a cell filled before counts"


def test_nothing_empty_is_nothing_to_do():
    z, clean = noisy()
    none = torch.zeros(0, 2, dtype=torch.long)
    assert attention_fill(z, clean, ALPHA, none, ~VOID, rows, 8, noise()).shape == (4, 0)
    assert raw_attention_fill(z, none, ~VOID, rows).shape == (4, 0)
    assert torch.equal(bnni_fill(z, torch.zeros_like(VOID)), z)
