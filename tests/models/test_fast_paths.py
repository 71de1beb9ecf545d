"""The UNet's fast paths: the same answers up to rounding, fewer operators, and no trace afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from personalize.adapters import lora
from personalize.models.attention import AttentionHook
from personalize.models.fast_paths import compiled_blocks, fast_paths, in_precision, shared_guidance_prefix
from personalize.randomness import generator
from personalize.sampling import denoise
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.schedule import make_schedule
from personalize.training.config import SingleImageConfig
from personalize.training.single_image import learn
from tests.support.tiny import NAMES, tiny, tiny_sd1

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
def test_speed_fast_paths_equal_the_unet(name: str, layout: torch.memory_format) -> None:
    unet = tiny(name).unet
    with torch.no_grad():
        plain = answer(unet)
        unet.to(memory_format=layout)
        with fast_paths(unet), fast_paths(unet):  # one inside the other, as when a picture is drawn while learning
            short = answer(unet)
    assert 0 < plain.abs().max() and (short - plain).abs().max() <= ROUNDING * plain.abs().max()


def test_speed_gradients_of_fast_paths_equal() -> None:
    model = tiny_sd1()
    parameters = lora.add_lora(model.unet, lora.module_names(model.unet), 2, 2.0, seed=0)
    with torch.no_grad():
        for b in parameters[1::2]:
            b.copy_(0.1 * drawn(*b.shape))
    plain = torch.autograd.grad(answer(model.unet).square().mean(), parameters)
    with fast_paths(model.unet):
        short = torch.autograd.grad(answer(model.unet).square().mean(), parameters)
    largest = max(float(g.abs().max()) for g in plain)
    assert all((a - b).abs().max() <= ROUNDING * largest for a, b in zip(short, plain, strict=True))


def test_speed_exact_fast_paths_change_no_bit_even_inside_others() -> None:
    unet = tiny_sd1().unet
    with torch.no_grad():
        plain, before = answer(unet), attributes(unet)
        with fast_paths(unet):
            assert not torch.equal(answer(unet), plain)
            inside = attributes(unet)
            with fast_paths(unet, exact=True):
                assert torch.equal(answer(unet), plain)
            assert attributes(unet) == inside
    assert attributes(unet) == before


def test_speed_nothing_is_divided_by_one_and_no_trace_is_left() -> None:
    unet = tiny_sd1().unet
    before = attributes(unet)
    with torch.no_grad(), Operators() as plain:
        answer(unet)
    with torch.no_grad(), fast_paths(unet), Operators() as short:
        answer(unet)
    assert plain.count("div") >= 54 and short.count("div") <= plain.count("div") - 54  # 22 resnets, 32 attentions
    assert attributes(unet) == before
    with pytest.raises(KeyError), fast_paths(unet), shared_guidance_prefix(unet), in_precision(unet, torch.bfloat16):
        raise KeyError
    assert attributes(unet) == before and answer(unet).dtype == torch.float32


def test_speed_what_both_passes_share_is_computed_once() -> None:
    unet = tiny_sd1().unet
    x, text = drawn(1, 4, 16, 16).repeat(2, 1, 1, 1), drawn(2, 77, 32, purpose="text")
    with torch.no_grad(), Operators() as plain:
        expected = unet(x, torch.tensor(300), text).sample
    with torch.no_grad(), shared_guidance_prefix(unet), Operators() as shared:
        found = unet(x, torch.tensor(300), text).sample
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    assert not torch.equal(expected[0], expected[1])  # the text does make a difference

    def on_one_row(operators: Operators) -> int:
        return sum(shape[:1] == (1,) and "attention" in name for name, shape in operators.ran)

    assert (on_one_row(plain), on_one_row(shared)) == (0, 1)  # the first self-attention, and no other


def test_speed_passes_that_differ_from_the_start_share_nothing() -> None:
    unet = tiny("sdxl").unet
    with shared_guidance_prefix(unet):
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
    exact = sample(model, edit, [1, 2], make_schedule(model, 5))
    with monkeypatch.context() as patch:
        patch.setattr(denoise, "_exact", lambda model: False)
        short = sample(model, edit, [1, 2], make_schedule(model, 5))
    monkeypatch.setattr(denoise, "fast_paths", lambda unet, exact: nullcontext())
    monkeypatch.setattr(denoise, "shared_guidance_prefix", lambda unet, wanted: nullcontext())
    plain = sample(model, edit, [1, 2], make_schedule(model, 5))
    assert torch.equal(exact, plain) and not torch.equal(short, plain)
    assert (short - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_speed_weights_in_another_precision_are_put_back() -> None:
    unet = tiny_sd1().unet
    before = [parameter.data_ptr() for parameter in unet.parameters()]
    with in_precision(unet, torch.bfloat16):
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert [parameter.data_ptr() for parameter in unet.parameters()] == before


def test_speed_compiled_blocks_leave_no_trace() -> None:
    """Blocks are compiled when they are first run, so nothing is compiled here."""
    unet = tiny_sd1().unet
    before, limit = attributes(unet), torch._dynamo.config.recompile_limit
    with pytest.raises(KeyError), compiled_blocks(unet):
        compiled = [module for module in unet.modules() if vars(module).get("_compiled_call_impl")]
        assert {type(module).__name__ for module in compiled} == {"BasicTransformerBlock"} and len(compiled) == 16
        inside = attributes(unet)
        with fast_paths(unet), shared_guidance_prefix(unet):  # the compiler does their work itself
            assert attributes(unet) == inside
        raise KeyError
    with compiled_blocks(unet, False):
        assert attributes(unet) == before
    assert attributes(unet) == before and torch._dynamo.config.recompile_limit == limit


@pytest.mark.slow  # compiles five variants of a block, each forwards and backwards
@pytest.mark.timeout(1800)
def test_speed_a_compiled_update_equals_an_eager_one() -> None:
    """Two updates on a tiny base.  AdamW divides each gradient by its own size, so where it is near zero rounding can
    change a whole step: the adapters are compared as a whole.  Measured: 6e-5 of what was learned."""
    model = tiny_sd1()
    config = SingleImageConfig(rank=2, samples_per_update=2, max_train_samples=4)
    pixels = drawn(1, 3, 32, 32).clamp(-1, 1)
    before = attributes(model.unet)
    learned = [learn(model, pixels, "a cat", replace(config, torch_compile=flag)).lora for flag in (False, True)]
    assert attributes(model.unet) == before
    size = sum(float(t.square().sum()) for name, t in learned[0].items() if "lora_B" in name) ** 0.5
    apart = sum(float((t - learned[1][name]).square().sum()) for name, t in learned[0].items()) ** 0.5
    assert 0 < size and apart <= 1e-3 * size
