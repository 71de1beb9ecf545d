"""Attention calibration: the golden numbers and the properties of the maps' losses."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from personalize.models.map_filters import normalised, smoothed
from personalize.training.losses import anchoring, binding, calibration, min_snr_weight, separation, soft_iou

EXACT = 1e-5  # the tolerance of the specification's table; the sums themselves agree to 1e-6
TRUE_HALF = (0.10650698, 0.78698604, 0.10650698)  # a Gaussian of σ = 0.5 as textbooks have it


def box(rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    maps = torch.zeros(16, 16, dtype=torch.float64)
    maps[slice(*rows), slice(*columns)] = 1
    return maps


LEFT, RIGHT = box((0, 16), (0, 8)), box((0, 16), (8, 16))
A, B, C = box((4, 12), (1, 6)), box((4, 12), (10, 15)), box((1, 4), (5, 11))
P, Q = box((4, 12), (2, 8)), box((4, 12), (5, 11))
FLAT = torch.full((16, 16), 0.3, dtype=torch.float64)
GOLDEN = {  # class maps, modifier maps, binding, separation, total
    "G1": ((LEFT, RIGHT), (LEFT, RIGHT), (0.081182, 0.081182), 0.007712, 0.170076),
    "G2": ((A, B), (A, B), (0.373581, 0.373581), 0.015038, 0.762199),
    "G3": ((A, B), (B, A), (0.986745, 0.986745), 0.015038, 1.988528),
    "G4": ((A, A), (A, A), (0.373581, 0.373581), 0.657890, 1.405052),
    "G5": ((FLAT, FLAT), (FLAT, FLAT), (0, 0), 1, 1),
    "G6": ((A, B, C), (A, B, C), (0.373581, 0.373581, 0.510156), (0.015038 + 2 * 0.021899) / 3, 1.276929),
    "G7": ((P, Q), (P, Q), (0.322755, 0.322755), 0.265035, 0.910544),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_disendiff_a_golden_numbers(name: str) -> None:
    classes, modifiers, bound, apart, total = GOLDEN[name]
    classes, modifiers = torch.stack(classes), torch.stack(modifiers)
    expected = torch.tensor(bound, dtype=torch.float64)
    torch.testing.assert_close(binding(classes, modifiers), expected, atol=EXACT, rtol=0)
    assert float(separation(classes)) == pytest.approx(apart, abs=EXACT)
    assert float(calibration(classes, modifiers)) == pytest.approx(total, abs=EXACT)


def test_disendiff_a_order_of_the_cases() -> None:
    total = {name: float(calibration(torch.stack(case[0]), torch.stack(case[1]))) for name, case in GOLDEN.items()}
    assert total["G2"] < total["G7"] < total["G4"] < total["G3"]


def variant(taps: tuple[float, float, float] | None, power: int) -> float:
    """The total of G2 with another filter and another suppression."""
    maps = torch.stack((A, B))
    plain = maps if taps is None else smoothed(normalised(maps), taps)
    classes = plain**power
    return float((1 - soft_iou(classes, plain)).sum() + soft_iou(classes[0], classes[1]))


def test_disendiff_a_without_filter_and_square_only_separation_is_left() -> None:
    assert variant(None, 1) == pytest.approx(1 / 81, abs=EXACT)


def test_disendiff_a_companion_the_textbook_kernel_gives_other_numbers() -> None:
    """Naive: σ = 0.5 as it is named."""
    assert variant(TRUE_HALF, 2) == pytest.approx(0.481887, abs=EXACT)
    assert abs(variant(TRUE_HALF, 2) - GOLDEN["G2"][4]) > 0.2


def test_disendiff_a_companion_summed_pairs_differ_for_three() -> None:
    """Naive: the paper's equation, which sums the pairs."""
    maps = torch.stack((A, B, C))
    summed = float(binding(maps, maps).sum() + 3 * separation(maps))
    assert abs(summed - GOLDEN["G6"][4]) > 0.03


def test_disendiff_b_impulse_shows_the_kernel() -> None:
    maps = torch.zeros(1, 16, 16)
    maps[0, 8, 8] = 1
    kernel = smoothed(maps)[0, 7:10, 7:10]
    expected = torch.tensor([[0.0449, 0.1221, 0.0449], [0.1221, 0.3319, 0.1221], [0.0449, 0.1221, 0.0449]])
    torch.testing.assert_close(kernel, expected, atol=5e-5, rtol=0)  # four digits are given
    assert float(smoothed(maps).sum()) == pytest.approx(1, abs=1e-6)


def random_maps(count: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    classes, modifiers = torch.rand(2, count, 16, 16, dtype=torch.float64, generator=rng)
    return classes, modifiers


def test_disendiff_b_scale_and_shift_change_nothing() -> None:
    classes, modifiers = random_maps()
    moved = calibration(classes * 3e-3 + 0.2, modifiers * 40 - 7)
    assert float(moved) == pytest.approx(float(calibration(classes, modifiers)), abs=EXACT)


def test_disendiff_b_order_of_concepts_changes_nothing() -> None:
    classes, modifiers = random_maps()
    total = float(calibration(classes, modifiers))
    for order in permutations(range(3)):
        assert float(calibration(classes[list(order)], modifiers[list(order)])) == pytest.approx(total, abs=1e-12)


def test_disendiff_b_sign_law_of_the_soft_iou() -> None:
    """∂IoU/∂b is positive exactly where a > (I + 1) / (I + U + 2)."""
    a, b = (maps[0] for maps in random_maps())
    b.requires_grad_()
    soft_iou(a, b).backward()
    both = (a * b.detach()).sum()
    union = (a + b.detach()).sum() - both
    assert b.grad is not None
    assert torch.equal(b.grad > 0, a > (both + 1) / (both + union + 2))


def test_disendiff_b_binding_moves_the_modifier_alone_and_separation_the_classes_alone() -> None:
    classes, modifiers = (maps.requires_grad_() for maps in random_maps())
    binding(classes, modifiers).sum().backward()
    assert classes.grad is None and modifiers.grad is not None and bool(modifiers.grad.any())
    modifiers.grad = None
    separation(classes).backward()
    assert modifiers.grad is None and classes.grad is not None and bool(classes.grad.any())


def test_disendiff_b_companion_without_stop_gradient_the_class_follows_the_modifier() -> None:
    """Naive: both sides of the overlap learn, so that the anchor drifts."""
    classes, modifiers = (maps.requires_grad_() for maps in random_maps())
    (1 - soft_iou(smoothed(normalised(classes)).square(), smoothed(normalised(modifiers)))).sum().backward()
    assert classes.grad is not None and bool(classes.grad.any())


def test_disendiff_b_half_precision_is_finite() -> None:
    flat = torch.full((2, 16, 16), 0.01, dtype=torch.float16)
    assert float(calibration(flat, flat)) == pytest.approx(1, abs=EXACT)
    low, high = flat.amin(), flat.amax()  # companion, naive: stretching in fp16 divides zero by zero
    assert not bool(((flat - low) / (high - low + torch.tensor(1e-8, dtype=torch.float16))).isfinite().any())


def test_one_concept_has_nothing_to_be_separated_from() -> None:
    """Companion, naive: a pair of a map with itself would punish the only concept for being there."""
    classes, modifiers = (maps[:1] for maps in random_maps())
    assert float(separation(classes)) == 0
    assert float(calibration(classes, modifiers)) == float(binding(classes, modifiers).sum())
    assert float(soft_iou(*(smoothed(normalised(classes)).square() for _ in range(2)))) > 0.1


def test_anchoring_prefers_the_right_place() -> None:
    """What calibration cannot see: both pairs of maps changed places."""
    masks, right, wrong = torch.stack((A, B)), torch.stack((A, B)), torch.stack((B, A))
    assert float(calibration(right, right)) == pytest.approx(float(calibration(wrong, wrong)), abs=1e-12)
    assert bool((anchoring(right, masks) < 0.5 * anchoring(wrong, masks)).all())


@pytest.mark.parametrize(("kind", "at_zero"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_are_finite_from_pure_noise_to_none(kind: str, at_zero: float) -> None:
    alphas = torch.tensor([1.0, 0.9, 0.5, 1e-12, 0.0])  # ᾱ = 0: a schedule rescaled to zero terminal SNR
    weights = min_snr_weight(alphas, torch.arange(5), 5.0, kind)
    assert bool(weights.isfinite().all()) and float(weights[-1]) == at_zero
    assert float(weights[1]) == pytest.approx(5 / 9 if kind == "epsilon" else 5 / 10)  # SNR 9 is above γ
    assert float(weights[2]) == pytest.approx(1.0 if kind == "epsilon" else 0.5)  # SNR 1 is below
