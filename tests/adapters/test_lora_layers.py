"""The LoRA layers: peft's results and gradients, whatever the layer, layout, scale and precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from personalize.adapters import lora, lora_layers
from personalize.adapters.lora_layers import LoraConv2d, LoraLinear, batched_adapters
from personalize.randomness import generator
from personalize.training.loop import adamw
from tests.support.tiny import tiny, tiny_sd1

CLOSE = 1e-6  # fp32: the same products, summed in another order


def drawn(*shape: int, purpose: str = "x", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose), dtype=dtype)


LAYERS = {
    "linear": lambda: (nn.Linear(24, 40), drawn(2, 6, 24)),
    "linear without bias": lambda: (nn.Linear(24, 16, bias=False), drawn(3, 24)),
    "3x3": lambda: (nn.Conv2d(8, 12, 3, padding=1), drawn(2, 8, 6, 5)),
    "stride 2": lambda: (nn.Conv2d(8, 12, 3, 2, 1), drawn(2, 8, 7, 6)),
    "1x1": lambda: (nn.Conv2d(8, 12, 1), drawn(2, 8, 4, 4)),
    "channels last": lambda: (
        nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last),  # pyright: ignore
        drawn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last),
    ),
}


def adapted(base: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """The layer as an adapter's."""
    root = nn.Module()
    root.layer = base.requires_grad_(False).to(dtype)
    lora.add_lora(root, ["layer"], rank=3, alpha=2.0, seed=1)
    layer = lora.lora_layers(root)["layer"]
    with torch.no_grad():
        b = lora._pair(layer)[1]
        b.copy_(drawn(*b.shape, purpose="b"))
    return layer


@contextmanager
def pefts_own() -> Iterator[None]:
    """Run the body on peft's forward functions."""
    before = LoraLinear.forward, LoraConv2d.forward
    LoraLinear.forward, LoraConv2d.forward = Linear.forward, Conv2d.forward  # pyright: ignore
    try:
        yield
    finally:
        LoraLinear.forward, LoraConv2d.forward = before


def run(layer: Any, x: Tensor, call: Any = None) -> list[Tensor]:
    """Output, and the gradients of x, A and B; `call`: in place of the layer itself."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = (layer if call is None else call)(x)
    wanted = [x, *lora._pair(layer)]
    return [y, *torch.autograd.grad((y * drawn(*y.shape, purpose="gy").to(y)).sum(), wanted)]


@pytest.mark.parametrize("name", LAYERS)
def test_speed_lora_layer_equals_pefts(name: str) -> None:
    base, x = LAYERS[name]()
    layer = adapted(base)
    assert isinstance(layer, LoraLinear | LoraConv2d)
    layer.set_scale(lora.ADAPTER, 0.7)
    ours = run(layer, x)
    with pefts_own():
        theirs = run(layer, x)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= CLOSE * max(1.0, float(other.detach().abs().max()) * 10)  # gradients 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_speed_lora_layer_is_traced_whole_by_torch_compile(name: str) -> None:
    """Without code generation: one graph of the same operators, so that only fused ones round otherwise."""
    base, x = LAYERS[name]()
    layer = adapted(base)
    eager = run(layer, x)
    compiled = run(layer, x, torch.compile(layer, backend="aot_eager", fullgraph=True))
    for mine, other in zip(compiled, eager, strict=True):
        assert (mine - other).abs().max() <= CLOSE * max(1.0, float(other.detach().abs().max()))


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_speed_frozen_adapters_in_bf16_and_batched_ones_compile_too(name: str) -> None:
    base, x = LAYERS[name]()
    layer = adapted(base, torch.bfloat16)
    rows = [torch.stack([p.detach(), -p.detach()]) for p in lora._pair(layer)]
    for p in lora._pair(layer):
        p.requires_grad_(False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x.bfloat16()), layer(x.bfloat16()))
        with batched_adapters({"layer": layer}, {"layer": (rows[0], rows[1])}):
            assert torch.equal(compiled(x.bfloat16()), layer(x.bfloat16()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_speed_lora_layer_gradcheck(name: str, masked: bool) -> None:
    base, x = LAYERS[name]()
    layer = adapted(base, torch.float64)
    for part in ("lora_A", "lora_B"):
        getattr(layer, part).double()
    a, b = lora._pair(layer)
    if masked:  # a row for each sample, in two halves computed alike
        layer._mask, layer._halves = lora_layers.RankMask("test"), True
        layer._mask.value = (torch.arange(3) < torch.tensor([[1], [3], [2]])[: len(x)]).double()

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        values = layer._operands(x, lora.ADAPTER)
        if isinstance(layer, LoraLinear):
            return lora_layers._LinearProduct.apply(*values[:3], a, b, a.detach(), b.detach(), *values[7:])
        how = (layer.base_layer.stride, layer.base_layer.padding, layer.base_layer.dilation)
        return lora_layers._ConvProduct.apply(*values[:3], a, b, a.detach(), b.detach(), *values[7:], how)

    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(product, (x, a, b))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_speed_unet_with_our_layers_equals_pefts(name: str) -> None:
    model = tiny(name)
    names = lora.module_names(model.unet)[:: 7 if name == "sdxl" else 1]
    parameters = lora.add_lora(model.unet, names, 4, 2.0, seed=0)
    with torch.no_grad():
        for number, b in enumerate(parameters[1::2]):
            b.copy_(0.1 * drawn(*b.shape, purpose=f"b{number}"))
    extra = {"text_embeds": drawn(2, 40), "time_ids": torch.ones(2, 6)} if name == "sdxl" else {}
    x, text = drawn(2, 4, 16, 16), drawn(2, 77, model.unet.config.cross_attention_dim, purpose="text")

    def results() -> list[Tensor]:
        y = model.unet(x, torch.tensor([10, 700]), text, added_cond_kwargs=extra).sample
        return [y, *torch.autograd.grad(y.square().mean(), parameters)]

    ours = results()
    with pefts_own():
        theirs = results()
    assert (ours[0] - theirs[0]).abs().max() <= 1e-5 * theirs[0].abs().max()  # of 70 layers, each within 1e-6
    largest = max(float(g.abs().max()) for g in theirs[1:])
    assert all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_speed_bf16_base_learns_in_fp32(name: str) -> None:
    """Each product sees the latest A and B, and steps far below bf16's resolution add up."""
    base, x = LAYERS[name]()
    layer = adapted(base, torch.bfloat16)
    a, b = lora._pair(layer)
    assert a.dtype == b.dtype == torch.float32
    optimizer = adamw([{"params": [a, b], "lr": 1e-5}], torch.device("cpu"))
    start = b.detach().clone()
    for _ in range(20):
        low = layer._operands(x.bfloat16(), lora.ADAPTER)[5:7]
        assert all(torch.equal(copy, p.detach().bfloat16()) for copy, p in zip(low, (a, b), strict=True))
        y = layer(x.bfloat16())
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        assert a.grad is not None and a.grad.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
    assert (b - start).abs().median() > 5e-5
    assert (start.bfloat16() + 1e-5 == start.bfloat16()).float().mean() > 0.9  # what a bf16 B would have done


def test_speed_bf16_products_are_near_fp32() -> None:
    base, x = LAYERS["3x3"]()
    layer = adapted(base)
    exact = run(layer, x)
    low = adapted(base, torch.bfloat16)
    for rounded, value in zip(run(low, x.bfloat16()), exact, strict=True):
        assert (rounded.float() - value).norm() <= 0.02 * value.norm()  # 8 bits of mantissa, a few roundings deep


def test_speed_copies_of_a_frozen_adapter_are_kept_until_it_changes() -> None:
    layer = adapted(nn.Linear(24, 16), torch.bfloat16)
    for part in lora._pair(layer):
        part.requires_grad_(False)
    x = drawn(4, 24).bfloat16()
    first, copies = layer(x), layer._copies
    assert torch.equal(layer(x), first) and layer._copies is copies
    with torch.no_grad():
        lora._pair(layer)[1].mul_(2)
    assert not torch.equal(layer(x), first)
    lora._set_pair(layer, *(torch.zeros_like(p) for p in lora._pair(layer)), trainable=False)
    assert torch.equal(layer(x), layer.base_layer(x))


class Counted(TorchDispatchMode):
    """Counts operators whose name has `part`."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.count = part, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.part in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("text_learns", "expected"), [(True, 31), (False, 28)])
def test_speed_no_graph_below_the_first_trainable_layer(text_learns: bool, expected: int) -> None:
    """Of SD 1.x's 32 attentions the first sees nothing that learns; with frozen text, the first 4 do not."""
    model = tiny_sd1()
    parameters = lora.add_lora(model.unet, lora.module_names(model.unet), 2, 2.0, seed=0)
    text = drawn(2, 77, 32, purpose="text").requires_grad_(text_learns)
    y = model.unet(drawn(2, 4, 16, 16), torch.tensor([10, 700]), text).sample
    with Counted("attention_for_cpu_backward") as counted:
        torch.autograd.grad(y.square().mean(), [*parameters, *([text] if text_learns else [])])
    assert counted.count == expected
