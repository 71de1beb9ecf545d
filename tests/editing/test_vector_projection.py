"""Projection and subtraction of embeddings: the algebra of the published method, row by row."""

import pytest
import torch
from torch import Tensor

from personalize.editing.vector_projection import edit_conditioning, edit_direction, project, subtract
from personalize.errors import UserError
from personalize.models.stable_diffusion import Conditioning
from personalize.randomness import generator
from tests.support.tiny import tiny

ROUNDING = 1e-5  # fp32: a few thousand times 2⁻²⁴, for sums of 48 products


def rows(number: int, shape: tuple[int, ...] = (1, 77, 48)) -> Tensor:
    return torch.randn(shape, generator=generator(number, "test rows"))


@pytest.fixture
def s() -> Tensor:
    return rows(0)


@pytest.fixture
def p() -> Tensor:
    return rows(1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a, b, dim=-1).abs()


def flattened_edit(s: Tensor, p: Tensor) -> Tensor:
    """The tempting mistake: one projection of the whole 77·d vector."""
    u = s.flatten() / s.norm()
    return (p.flatten() - (p.flatten() @ u) * u).view_as(p)


def test_by_hand() -> None:
    s, p = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
    assert edit_direction(s, p).tolist() == [[[0.0, 4.0]]]
    assert project(s, p, alpha=0.5, beta=2).tolist() == [[[1.0, 8.0]]]
    assert subtract(s, p, gamma=0.25).tolist() == [[[2.25, 1.0]]]


def test_forgedit_c06_every_row_of_the_edit_is_orthogonal(s: Tensor, p: Tensor) -> None:
    assert cosines(edit_direction(s, p), s).max() <= ROUNDING


def test_forgedit_c07_not_flattened(s: Tensor, p: Tensor) -> None:
    assert cosines(flattened_edit(s, p), s).max() > 1e-2  # the naive variant fails
    assert cosines(edit_direction(s, p), s).max() < 1e-2


def test_forgedit_c08_ends(s: Tensor, p: Tensor) -> None:
    assert torch.equal(subtract(s, p, 0.0), s)
    assert torch.equal(subtract(s, p, 1.0), p)
    assert (project(s, p, 1.0, 0.0) - s).abs().max() <= 1e-6
    r = (p * s).sum(-1) / s.pow(2).sum(-1)  # (b, l)
    assert (project(s, p, r, 1.0) - p).abs().max() <= ROUNDING
    for gamma in (0.3, 1.4):
        coupled = project(s, p, 1 - gamma + gamma * r, gamma)
        assert (subtract(s, p, gamma) - coupled).abs().max() <= ROUNDING


def test_forgedit_c09_norms_parallel_rows_and_zero_rows(s: Tensor, p: Tensor) -> None:
    alpha, beta = 0.7, 1.3
    edit = edit_direction(s, p)
    expected = alpha**2 * s.pow(2).sum(-1) + beta**2 * edit.pow(2).sum(-1)
    assert (project(s, p, alpha, beta).pow(2).sum(-1) / expected - 1).abs().max() <= ROUNDING
    parallel = -2.5 * s
    assert edit_direction(s, parallel).norm() <= ROUNDING * parallel.norm()
    s = s.clone()
    s[:, 5] = 0
    assert torch.equal(edit_direction(s, p)[:, 5], p[:, 5])
    assert project(s, p).isfinite().all()


def test_forgedit_c10_only_the_direction_of_the_source_counts(s: Tensor, p: Tensor) -> None:
    assert (edit_direction(17 * s, p) - edit_direction(s, p)).abs().max() <= ROUNDING


def test_slices_are_projected_by_themselves(s: Tensor, p: Tensor) -> None:
    big = torch.cat([s[..., :20], 30 * s[..., 20:]], -1)  # the second encoder has the larger norm
    e = project(big, p, 0.0, 1.0, widths=(20, 28))
    assert torch.equal(e[..., :20], edit_direction(big[..., :20], p[..., :20]))
    assert cosines(e[..., :20], big[..., :20]).max() <= ROUNDING
    assert cosines(e, big).max() <= ROUNDING  # orthogonal in each slice, so jointly
    joint = project(big, p, 0.0, 1.0)
    assert cosines(joint[..., :20], big[..., :20]).max() > 1e-2  # the naive variant fails


def test_pooled_vector_is_one_more_row() -> None:
    s, p = rows(2, (1, 40)), rows(3, (3, 40))
    e = project(s, p, 0.7, 1.2)
    assert e.shape == (3, 40)
    assert torch.allclose(e[1], project(s[:, None], p[1:2, None], 0.7, 1.2)[0, 0])


def test_half_precision_is_computed_wide(s: Tensor, p: Tensor) -> None:
    half = project(s.half(), p.half(), 0.7, 1.2)
    assert half.dtype == torch.float16
    assert torch.equal(half, project(s.half().float(), p.half().float(), 0.7, 1.2).half())


def test_wrong_shapes_are_refused(s: Tensor, p: Tensor) -> None:
    with pytest.raises(ValueError, match="same base model"):
        project(s, p[..., :40])
    with pytest.raises(ValueError, match="same base model"):
        subtract(s.expand(2, -1, -1), p.expand(3, -1, -1))
    with pytest.raises(ValueError, match="add up to 47"):
        project(s, p, widths=(20, 27))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 10**400, "1", "nan"])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_a_strength_that_is_no_number_in_its_range_is_named(name, value) -> None:
    """NaN gave an embedding of NaN; a text a TypeError without a name."""
    with pytest.raises(UserError, match=f"^{name} is "):
        edit_conditioning(tiny("sd1"), None, Conditioning(torch.zeros(1, 77, 32)), **{name: value})
