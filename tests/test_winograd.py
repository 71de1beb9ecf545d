"""Convolutions with fewer products: the same numbers, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from personalize.randomness import generator
from personalize.winograd import Workspace, convolution


def drawn(*shape: int, purpose: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 5, 8, 6), (3, 4, 4, 10)])
@pytest.mark.parametrize("biased", [True, False])
def test_speed_winograd_equals_the_direct_convolution(shape: tuple[int, ...], biased: bool) -> None:
    """In fp64 nothing but rounding can differ: 1e-12 is 10⁴ of its steps."""
    x, weight = drawn(*shape, purpose="x").requires_grad_(), drawn(7, shape[1], 3, 3, purpose="weight")
    bias = drawn(7, purpose="bias") if biased else None
    expected, found = conv2d(x, weight, bias, padding=1), convolution(x, weight, bias, Workspace())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pull = drawn(*expected.shape, purpose="gradient")
    (slope,), (own,) = torch.autograd.grad(expected, x, pull), torch.autograd.grad(found, x, pull)
    torch.testing.assert_close(own, slope, rtol=1e-12, atol=1e-12)


def test_speed_winograd_is_as_exact_as_the_direct_convolution() -> None:
    """In fp32 both err by some 3e-7 of the norm, of sums of 9 · 320 products; twice the direct one's is allowed."""
    x, weight = drawn(1, 320, 32, 32, purpose="x"), drawn(64, 320, 3, 3, purpose="weight")
    exact = conv2d(x, weight, padding=1)

    def error(y: Tensor) -> float:
        return float((y - exact).norm() / exact.norm())

    direct = conv2d(x.float(), weight.float(), padding=1)
    own = convolution(x.float(), weight.float(), None, Workspace())
    assert 0 < error(own) <= 2 * error(direct) < 1e-6


@pytest.mark.parametrize(("sides", "kernel"), [((5, 4), 3), ((4, 5), 3), ((4, 4), 1)])
def test_speed_winograd_refuses_what_it_cannot_tile(sides: tuple[int, int], kernel: int) -> None:
    with pytest.raises(ValueError, match="expected even sides and 3×3 filters"):
        convolution(torch.zeros(1, 2, *sides), torch.zeros(2, 2, kernel, kernel), None, Workspace())


def test_speed_winograd_calls_share_memory_and_no_result_is_in_it() -> None:
    workspace, weight = Workspace(), drawn(4, 4, 3, 3, purpose="weight")
    with torch.inference_mode():  # as a picture drawn on the way might be
        convolution(drawn(1, 4, 8, 8, purpose="first"), weight, None, workspace)
    held = {name: memory.data_ptr() for name, memory in workspace._held.items()}
    results = []
    for purpose in ("one", "another"):
        x = drawn(1, 4, 8, 8, purpose=purpose).requires_grad_()
        results.append((convolution(x, weight, None, workspace), x))
    assert held and held == {name: memory.data_ptr() for name, memory in workspace._held.items()}
    for y, x in results:
        torch.testing.assert_close(y, conv2d(x, weight, padding=1), rtol=1e-12, atol=1e-12)
