"""The same UNet with less work: nothing is divided by one, laid out anew or given back for nothing; fewer products.

    with lean(unet):        # trace-free; results differ by rounding alone; so for the encoder of a VAE
        unet(...)

Layers are changed by attributes of their own that shadow those of their class, and that are gone afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from diffusers import Transformer2DModel
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, linear

from personalize.pages import kept_pages
from personalize.winograd import Workspace, convolution

WIDE, LARGE = 256, 16 * 16  # channels and cells from which fewer products repay two more passes over the picture
_DIVISORS = ("output_scale_factor", "rescale_output_factor")


class _One:
    """Divides tensors by one without touching them."""

    def __rtruediv__(self, tensor: Tensor) -> Tensor:
        return tensor


@contextmanager
def lean(unet: nn.Module, *, exact: bool = False) -> Iterator[None]:
    """Run the body with the short ways open, if `exact` only those that change no bit; contexts may be nested."""
    done: list[tuple[dict[str, Any], str, Any]] = []
    first, workspace = cast(Tensor, unet.get_submodule("conv_in").weight), Workspace()
    flowing = first.is_contiguous(memory_format=torch.channels_last)
    try:
        for module in unet.modules():
            for name, value in _shorter(module, flowing, exact, workspace):
                own = vars(module)
                done.append((own, name, own.get(name, _ABSENT)))
                own.pop(name) if value is _ABSENT else own.update({name: value})
        with kept_pages() if first.device.type == "cpu" else nullcontext():
            yield
    finally:
        for own, name, before in reversed(done):
            own.pop(name) if before is _ABSENT else own.update({name: before})


_ABSENT = object()


@contextmanager
def in_precision(unet: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the body with every weight of `unet` as a copy in `dtype`; then they are the very same tensors again."""
    before = [] if dtype is None else [(p, p.data) for p in unet.parameters() if p.is_floating_point()]
    try:
        for parameter, values in before:
            parameter.data = values.to(dtype)
        yield
    finally:
        for parameter, values in before:
            parameter.data = values


def _shorter(module: nn.Module, flowing: bool, exact: bool, workspace: Workspace) -> Iterator[tuple[str, Any]]:
    """Attributes of `module` that spare a pass, by name; `flowing`: pictures are laid out channels last."""
    own = vars(module)
    yield from ((name, _One()) for name in _DIVISORS if type(own.get(name)) in (int, float) and own[name] == 1)
    if exact:
        if getattr(own.get("forward"), "func", None) in (_gated, _convolved):  # opened by a context around this one
            yield "forward", _ABSENT
        return
    if type(module) is GEGLU and "forward" not in own and next(module.parameters()).device.type == "cpu":
        yield "forward", partial(_gated, module)
    if type(module) is nn.Conv2d and "forward" not in own and _tileable(module):
        yield "forward", partial(_convolved, module, workspace)
    if flowing and type(module) is Transformer2DModel and module.is_input_continuous:
        yield "_get_output_for_continuous_inputs", partial(_output, module)


def _gated(module: Any, x: Tensor) -> Tensor:
    """W₁x · gelu(W₂x), of two products: the CPU's fast GELU wants its input in one piece."""
    if type(module.proj) is nn.Linear and module.proj.bias is not None and not module.proj._forward_hooks:
        (w, v), (b, c) = module.proj.weight.chunk(2), module.proj.bias.chunk(2)
        values, gates = linear(x, w, b), gelu(linear(x, v, c))
    else:
        values, gates = module.proj(x).chunk(2, -1)
        gates = gelu(gates.contiguous())
    return values * gates if gates.requires_grad else gates.mul_(values)


def _tileable(module: nn.Conv2d) -> bool:
    """Whether `module` is a wide 3×3 convolution on the CPU that keeps the picture's size."""
    weight = module.weight
    usual = module.stride == module.padding == module.dilation == (1, 1) and module.padding_mode == "zeros"
    dense = module.groups == 1 and weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= WIDE
    return usual and dense and weight.is_contiguous() and weight.device.type == "cpu"


def _convolved(module: nn.Conv2d, workspace: Workspace, x: Tensor) -> Tensor:
    """The convolution, by Winograd where that is faster: in fp32, frozen, of pictures large enough."""
    weight, (height, width) = module.weight, x.shape[-2:]
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if fp32 and not (weight.requires_grad or height % 2 or width % 2) and height * width >= LARGE:
        return convolution(x, weight, module.bias, workspace)
    return conv2d(x, weight, module.bias, padding=1)


def _output(module: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int,
            inner_dim: int) -> Tensor:  # fmt: skip
    """Back to (b, c, h, w) in whatever layout the tokens are in."""

    def picture(tokens: Tensor) -> Tensor:
        return tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)

    if module.use_linear_projection:
        return picture(module.proj_out(hidden_states)) + residual
    return module.proj_out(picture(hidden_states)) + residual


@contextmanager
def halves_alike(unet: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Run the body, in which both halves of every batch are the same latents, computing once what they share.

    Null and conditional pass differ from the first text attention on: all before it is done for one half and repeated.
    SDXL's passes differ from the start, by their pooled embeddings; so do those of a UNet with hooked attention.
    """
    done = []
    try:
        for module in _before_text(unet) if wanted else ():
            if "forward" not in vars(module):
                done.append(vars(module))
                vars(module)["forward"] = partial(_once, module.forward)
        yield
    finally:
        for own in done:
            del own["forward"]


def _before_text(unet: Any) -> list[nn.Module]:
    """The modules that a UNet without pooled embeddings runs before its first text attention."""
    block = unet.down_blocks[0]
    if unet.config.addition_embed_type is not None or unet.config.class_embed_type is not None:
        return []
    if not getattr(block, "attentions", None):
        return []
    first = block.attentions[0]
    return [unet.conv_in, block.resnets[0], first.norm, first.proj_in, *_self_attention(first.transformer_blocks[0])]


def _self_attention(block: Any) -> list[nn.Module]:
    return [block.norm1, block.attn1] if type(block.norm1) is nn.LayerNorm and not block.only_cross_attention else []


def _once(forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`forward` of the first half of all rows, twice."""
    rows = len(x)

    def half(value: Any) -> Any:
        return value[: rows // 2] if isinstance(value, Tensor) and len(value) == rows else value

    out = forward(half(x), *map(half, args), **{name: half(value) for name, value in kwargs.items()})
    return torch.cat([out, out])
