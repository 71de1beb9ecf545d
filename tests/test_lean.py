"""The lean UNet: the same answers up to rounding, fewer passes, and no trace afterwards."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from personalize import lean as lean_room
from personalize import lora, sampling
from personalize.attention import AttentionHook
from personalize.lean import halves_alike, in_precision, lean
from personalize.moves import moves
from personalize.randomness import generator
from personalize.sampling import Edit, sample
from tests.tiny import NAMES, tiny, tiny_sd1

ROUNDING = 1e-5  # of the largest value: fp32 products summed in another order, 70 layers deep


def drawn(*shape: int, purpose: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose))


def answer(unet, rows: int = 2) -> Tensor:
    x, text = drawn(rows, 4, 16, 16), drawn(rows, 77, unet.config.cross_attention_dim, purpose="text")
    extra = {"text_embeds": drawn(rows, 40), "time_ids": torch.ones(rows, 6)}
    return unet(x, torch.tensor([300] * rows), text, added_cond_kwargs=extra).sample


class Operators(TorchDispatchMode):
    """Names of all operators that ran, with the sizes of their first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = next((tuple(arg.shape) for arg in args if isinstance(arg, Tensor)), ())
        self.ran.append((str(func).removeprefix("aten."), first))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(ran.startswith(name) for ran, _ in self.ran)


def attributes(unet) -> list[tuple[set[str], int]]:
    return [(set(vars(module)), id(vars(module).get("forward"))) for module in unet.modules()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_speed_lean_unet_equals_the_unet(name: str, layout: torch.memory_format) -> None:
    unet = tiny(name).unet
    with torch.no_grad():
        plain = answer(unet)
        unet.to(memory_format=layout)
        with lean(unet), lean(unet):  # one inside the other, as when a picture is drawn while learning
            short = answer(unet)
    assert 0 < plain.abs().max() and (short - plain).abs().max() <= ROUNDING * plain.abs().max()


def test_speed_lean_gradients_equal() -> None:
    model = tiny_sd1()
    parameters = lora.add_lora(model.unet, lora.module_names(model.unet), 2, 2.0, seed=0)
    with torch.no_grad():
        for b in parameters[1::2]:
            b.copy_(0.1 * drawn(*b.shape))
    plain = torch.autograd.grad(answer(model.unet).square().mean(), parameters)
    with lean(model.unet):
        short = torch.autograd.grad(answer(model.unet).square().mean(), parameters)
    largest = max(float(g.abs().max()) for g in plain)
    assert all((a - b).abs().max() <= ROUNDING * largest for a, b in zip(short, plain, strict=True))


def test_speed_wide_convolutions_take_fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every 3×3 convolution of the tiny UNet counting as wide and every picture as large."""
    monkeypatch.setattr(lean_room, "WIDE", 1)
    monkeypatch.setattr(lean_room, "LARGE", 1)
    unet = tiny_sd1().unet.requires_grad_(False)
    same_size = [
        m for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) and m.stride == (1, 1)
    ]
    text = drawn(2, 77, 32, purpose="text")

    def differentiated() -> tuple[Tensor, Tensor, Operators]:
        x = drawn(2, 4, 16, 16).requires_grad_()
        with Operators() as ran:
            y = unet(x, torch.tensor([300, 300]), text).sample
        return y.detach(), torch.autograd.grad(y.square().mean(), x)[0], ran

    (plain, slope, direct), before = differentiated(), attributes(unet)
    with lean(unet):
        short, own, tiled = differentiated()
        with torch.autocast("cpu", torch.bfloat16), Operators() as low:
            answer(unet)
        with lean(unet, exact=True):
            assert torch.equal(differentiated()[0], plain)
    assert (
        direct.count("convolution") - tiled.count("convolution")
        == len(same_size)
        == tiled.count("bmm") - direct.count("bmm")
    )
    assert low.count("convolution") == direct.count("convolution") and attributes(unet) == before
    for found, expected in ((short, plain), (own, slope)):
        assert not torch.equal(found, expected) and (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_speed_lean_encoder_equals_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's latents, with every 3×3 convolution counting as wide and every picture as large."""
    monkeypatch.setattr(lean_room, "WIDE", 1)
    monkeypatch.setattr(lean_room, "LARGE", 1)
    model, pixels = tiny_sd1(), drawn(1, 3, 32, 32).clamp(-1, 1)
    encoder = model.vae.encoder.requires_grad_(False)
    with Operators() as direct:
        plain, before = model.posterior(pixels), attributes(encoder)
    with lean(encoder), Operators() as tiled:
        short = model.posterior(pixels)
    assert tiled.count("convolution") < direct.count("convolution") and attributes(encoder) == before
    for found, expected in zip(short, plain, strict=True):
        assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_speed_nothing_is_divided_by_one_and_no_trace_is_left() -> None:
    unet = tiny_sd1().unet
    before = attributes(unet)
    with torch.no_grad(), Operators() as plain:
        answer(unet)
    with torch.no_grad(), lean(unet), Operators() as short:
        answer(unet)
    assert plain.count("div") >= 54 and short.count("div") <= plain.count("div") - 54  # 22 resnets, 32 attentions
    assert attributes(unet) == before
    with pytest.raises(KeyError), lean(unet), halves_alike(unet), in_precision(unet, torch.bfloat16):
        raise KeyError
    assert attributes(unet) == before and answer(unet).dtype == torch.float32


def test_speed_what_both_passes_share_is_computed_once() -> None:
    unet = tiny_sd1().unet
    x, text = drawn(1, 4, 16, 16).repeat(2, 1, 1, 1), drawn(2, 77, 32, purpose="text")
    with torch.no_grad(), Operators() as plain:
        expected = unet(x, torch.tensor(300), text).sample
    with torch.no_grad(), halves_alike(unet), Operators() as shared:
        found = unet(x, torch.tensor(300), text).sample
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert not torch.equal(expected[0], expected[1])  # the text does make a difference

    def on_one_row(operators: Operators) -> int:
        return sum(shape[:1] == (1,) and "attention" in name for name, shape in operators.ran)

    assert (on_one_row(plain), on_one_row(shared)) == (0, 1)  # the first self-attention, and no other


def test_speed_passes_that_differ_from_the_start_share_nothing() -> None:
    unet = tiny("sdxl").unet
    with halves_alike(unet):
        assert not any("forward" in vars(module) for module in unet.modules())


@pytest.mark.parametrize(
    "hooks",
    [pytest.param((), id="shared"), pytest.param((AttentionHook(),), id="hooked", marks=pytest.mark.slow)],
)
def test_speed_guided_samples_stay_what_they_were(hooks: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 not a bit is changed; the short ways of half precision stay within 1e-4 of it, after five steps, of which
    each multiplies the last one's rounding."""
    model = tiny_sd1()
    with torch.no_grad():
        edit = Edit(model.prompts(["a red cat", "a dog"]), hooks=hooks)
    exact = sample(model, edit, [1, 2], moves(model, 5))
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_exact", lambda model: False)
        short = sample(model, edit, [1, 2], moves(model, 5))
    monkeypatch.setattr(sampling, "lean", lambda unet, exact: nullcontext())
    monkeypatch.setattr(sampling, "halves_alike", lambda unet, wanted: nullcontext())
    plain = sample(model, edit, [1, 2], moves(model, 5))
    assert torch.equal(exact, plain) and not torch.equal(short, plain)
    assert (short - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_speed_weights_in_another_precision_are_put_back() -> None:
    unet = tiny_sd1().unet
    before = [parameter.data_ptr() for parameter in unet.parameters()]
    with in_precision(unet, torch.bfloat16):
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert [parameter.data_ptr() for parameter in unet.parameters()] == before
