"""Faster ways through a UNet whose results differ by rounding alone: context managers that restore it at the end.

    with fast_paths(unet):      # divisions by one are left out, and GEGLU is computed as two products
        unet(...)

`shared_guidance_prefix` computes once what both passes of classifier-free guidance share, `in_precision` casts the
weights for a while, and `compiled_blocks` has torch compile the blocks that repeat.  Modules are changed by instance
attributes that shadow those of their class and are removed afterwards.  In a compiled UNet the first two change
nothing: the compiler does their work itself.  What each of them gains is in `tests/bench/README.md`, section "Speed".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

_DIVISORS = ("output_scale_factor", "rescale_output_factor")
_ABSENT = object()
_COMPILED = "_compiled_call_impl"  # where `Module.compile` puts the compiled call
VARIANTS = 64  # compiled versions of a transformer block: by width, map size, gradients and adapter


class _One:
    """A divisor of one: `tensor / _One()` is `tensor` itself, not a copy."""

    def __rtruediv__(self, tensor: Tensor) -> Tensor:
        return tensor


@contextmanager
def fast_paths(unet: nn.Module, *, exact: bool = False) -> Iterator[None]:
    """Run the body without the UNet's divisions by one and, unless `exact`, with GEGLU as two products on the CPU.

    With `exact` the results are those of the unchanged UNet bit for bit, also inside another `fast_paths`; without,
    they differ by rounding.  Contexts may be nested.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in () if _is_compiled(unet) else unet.modules():
            for name, value in _replacements(module, exact):
                own = vars(module)
                before.append((own, name, own.get(name, _ABSENT)))
                _put(own, name, value)
        yield
    finally:
        for own, name, value in reversed(before):
            _put(own, name, value)


def _replacements(module: nn.Module, exact: bool) -> Iterator[tuple[str, Any]]:
    """The instance attributes of `module` to be set (or removed: `_ABSENT`), by name."""
    from diffusers.models.activations import GEGLU

    own = vars(module)
    yield from ((name, _One()) for name in _DIVISORS if type(own.get(name)) in (int, float) and own[name] == 1)
    if exact and getattr(own.get("forward"), "func", None) is _geglu:  # set by an enclosing context
        yield "forward", _ABSENT
    if not exact and type(module) is GEGLU and "forward" not in own and _on_cpu(module):
        yield "forward", partial(_geglu, module)


def _on_cpu(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "cpu"


def _put(own: dict[str, Any], name: str, value: Any) -> None:
    """Set the instance attribute `name`, or remove it if `value` is `_ABSENT`."""
    if value is _ABSENT:
        own.pop(name, None)
    else:
        own[name] = value


def _geglu(module: Any, x: Tensor) -> Tensor:
    """W₁x · gelu(W₂x) as two products, for the CPU's vectorised GELU needs contiguous input."""
    if type(module.proj) is nn.Linear and module.proj.bias is not None and not module.proj._forward_hooks:
        (w, v), (b, c) = module.proj.weight.chunk(2), module.proj.bias.chunk(2)
        values, gates = linear(x, w, b), gelu(linear(x, v, c))
    else:
        values, gates = module.proj(x).chunk(2, -1)
        gates = gelu(gates.contiguous())
    return values * gates if gates.requires_grad else gates.mul_(values)


@contextmanager
def in_precision(unet: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the body with every floating-point weight of `unet` cast to `dtype`; None leaves them as they are.

    Afterwards each parameter holds the very tensor it held before, and changes made to the cast copies are lost.
    """
    before = [] if dtype is None else [(p, p.data) for p in unet.parameters() if p.is_floating_point()]
    try:
        for parameter, values in before:
            parameter.data = values.to(dtype)
        yield
    finally:
        for parameter, values in before:
            parameter.data = values


@contextmanager
def compiled_blocks(unet: Any, enabled: bool = True) -> Iterator[None]:
    """Run the body with the UNet's transformer blocks compiled by torch; results differ by rounding.

    diffusers' `compile_repeated_blocks`, whose kernels are shared by blocks of the same shape.  Each shape is compiled
    when it is first run, which takes seconds on a GPU and a minute on a CPU.  Afterwards the blocks are as they were.
    """
    blocks = [vars(module) for module in unet.modules() if type(module).__name__ in unet._repeated_blocks]
    before = [own.get(_COMPILED, _ABSENT) for own in blocks] if enabled else []
    try:
        if enabled:
            unet.compile_repeated_blocks(dynamic=False)
        limit = torch._dynamo.config.patch(cache_size_limit=VARIANTS) if enabled else nullcontext()
        with limit:  # above it torch runs a block eagerly; torch 2.6 knows the limit by this name alone
            yield
    finally:
        for own, value in zip(blocks, before, strict=False):
            _put(own, _COMPILED, value)


def _is_compiled(unet: nn.Module) -> bool:
    return any(vars(module).get(_COMPILED) is not None for module in unet.modules())


@contextmanager
def shared_guidance_prefix(unet: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Run the body computing once what the null and the conditional pass of guidance have in common.

    The two halves of every batch must be the same latents.  They differ from the first text attention on: what comes
    before it is computed for the first half and repeated.  Nothing is shared where the passes differ from the start
    (SDXL, by its pooled embeddings), and `wanted` must be False where attention hooks are at work.
    """
    shared = []
    try:
        for module in _before_text(unet) if wanted and not _is_compiled(unet) else ():
            if "forward" not in vars(module):
                shared.append(vars(module))
                vars(module)["forward"] = partial(_first_half_twice, module.forward)
        yield
    finally:
        for own in shared:
            del own["forward"]


def _before_text(unet: Any) -> list[nn.Module]:
    """The modules that a UNet runs before its first text attention; none if pooled or class embeddings come earlier."""
    block = unet.down_blocks[0]
    if unet.config.addition_embed_type is not None or unet.config.class_embed_type is not None:
        return []
    if not getattr(block, "attentions", None):
        return []
    first = block.attentions[0]
    return [unet.conv_in, block.resnets[0], first.norm, first.proj_in, *_self_attention(first.transformer_blocks[0])]


def _self_attention(block: Any) -> list[nn.Module]:
    return [block.norm1, block.attn1] if type(block.norm1) is nn.LayerNorm and not block.only_cross_attention else []


def _first_half_twice(forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The output of `forward` for the first half of the batch, repeated for the second."""
    rows = len(x)

    def half(value: Any) -> Any:
        return value[: rows // 2] if isinstance(value, Tensor) and len(value) == rows else value

    out = forward(half(x), *map(half, args), **{name: half(value) for name, value in kwargs.items()})
    return torch.cat([out, out])
