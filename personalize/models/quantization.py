"""A base UNet in 4 bits: its linear layers become bitsandbytes' `Linear4bit` (NF4), its convolutions stay as they are.

There is no 4-bit convolution, so the memory saved depends on the share of weights in linear layers: 28 % on SD 1.5,
32 % on SD 2.1, 86 % on SDXL.  The linear layers of the time and size embeddings are left as they are too: they are
small, and all blocks depend on them.

References: Dettmers et al., "QLoRA", arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from personalize.errors import UserError

NOT_QUANTIZED = ("time_embedding", "add_embedding", "time_emb_proj")


def quantize(unet: nn.Module) -> tuple[int, int]:
    """Turn the linear layers of `unet` into NF4 with quantized scales, for good; returns its bytes (before, after).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise UserError("load_in_4bit needs the package bitsandbytes: pip install bitsandbytes") from None
    before = weight_bytes(unet)
    for path, layer in [*_linear(unet)]:
        device, dtype = layer.weight.device, layer.weight.dtype
        small: Any = Linear4bit(layer.in_features, layer.out_features, False, dtype, device="meta")
        small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)  # pyright: ignore
        small.bias = layer.bias
        # On some CPUs the layer would repack its weight for good in the first forward pass without gradient, and from
        # then on return no gradient: after the first validation picture nothing would be trained any more, silently.
        small.support_avx512bf16_for_cpu = False
        parent, _, child = path.rpartition(".")
        setattr(unet.get_submodule(parent), child, small.to(device).eval())
        layer.weight = None  # pyright: ignore  # frees it now: the list of layers would keep it until the end
    unet.is_loaded_in_4bit = True  # pyright: ignore  # peft reads this attribute
    return before, weight_bytes(unet)


def saved_by_quantizing(unet: nn.Module, width: int | None = None) -> int:
    """The bytes that `quantize` would save: of NF4 remain 4 bits a weight, and 8 bits for every 64 of them.

    width: bytes of a weight before; those that it has if not given.
    """
    layers = [layer.weight for _, layer in _linear(unet)]
    return sum(round(weight.numel() * ((width or weight.element_size()) - 0.5 - 1 / 64)) for weight in layers)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights and buffers of `module`, including the scales of 4-bit weights."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(module))


def _linear(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers to quantize, by path: those of the base, not of an adapter."""
    for path, layer in unet.named_modules():
        if type(layer) is nn.Linear and not any(part in path for part in NOT_QUANTIZED) and ".lora_" not in path:
            yield path, layer


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (part for part in (state.absmax, state.code, state.offset) if isinstance(part, Tensor))
            state = state.state2
