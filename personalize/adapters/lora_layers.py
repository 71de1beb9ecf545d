"""LoRA layers with peft's names, state and results that make fewer passes over memory than peft's.

    y = W x + s · B A x            gu = s · Bᵀ gy,   gB = s · gy uᵀ,   gA = gu xᵀ,   gx = Wᵀ gy + Aᵀ gu       (u = A x)

With a mask m(t) of the rank components (`timestep_mask`) u and gu are multiplied by it.  In a layer of an orthogonal
start (`orthogonal_start`) the two halves of the components are computed alike, so that they cancel to the bit while
they are equal.  The sums are accumulated in place by the matrix products themselves.  A and B stay fp32 and are
multiplied as copies in the base's precision.  For anything else (merged weights, dropout, several active adapters, a
quantized base) the layers call peft's own `forward`.  They compile under `torch.compile` as one graph.

References: Hu et al., "LoRA", arXiv 2106.09685, eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from personalize.adapters.rank_mask import RankMask, masked_components
from personalize.errors import UserError


def lora_config(targets: str, rank: int, alpha: float) -> LoraConfig:
    """peft's configuration of an adapter on the modules whose names match `targets`, with this file's layers."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)  # pyright: ignore
    config._register_custom_module({nn.Linear: _linear, nn.Conv2d: _conv})  # pyright: ignore
    return config


def _linear(target: nn.Module, adapter: str, **kwargs: Any) -> Linear | None:
    """Our LoRA layer for `target`, or None for other classes: peft has its own layers for quantized ones."""
    return LoraLinear(target, adapter, **kwargs) if type(target) is nn.Linear else None


def _conv(target: nn.Module, adapter: str, **kwargs: Any) -> Conv2d | None:
    """As `_linear`, for convolutions."""
    return LoraConv2d(target, adapter, **kwargs) if type(target) is nn.Conv2d else None


class _FusedSum(LoraLayer):
    """What both layers share: whether the sum can be computed our way, and the tensors it is computed from."""

    _copies: tuple[Any, ...] | None = None  # A and B, their versions, and their copies in the base's precision
    _batched: tuple[Tensor, Tensor] | None = None  # A and B of several adapters, see `batched_adapters`
    _mask: RankMask | None = None  # see `timestep_mask`
    _halves: bool = False  # see `orthogonal_start`

    def _plain(self: Any, x: Tensor, rest: Any) -> str | None:
        """The name of the only active adapter if the output is W x + s · B A x and no more, else None.

        rest: further arguments of the call, which only peft's own `forward` knows.
        """
        base, active = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
        if rest or len(active) != 1 or self.disable_adapters or self.merged or self.lora_variant:
            return None
        if not isinstance(self.lora_dropout[active[0]], nn.Identity) or base.weight.requires_grad:
            return None
        hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
        cast = torch.is_autocast_enabled(x.device.type)
        return None if hooked or not (cast or x.dtype == base.weight.dtype) else active[0]

    def _scale(self: Any) -> float:
        return self.scaling[next(iter(self.lora_A))]

    def _operands(self: Any, x: Tensor, name: str) -> tuple[Any, ...]:
        """x, W, bias, A, B, the copies of A and B in the precision of the product, s, the mask, and whether halves."""
        kind, base = x.device.type, self.base_layer
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        bias = None if base.bias is None else base.bias.to(dtype)
        low, mask = self._low(a, b, dtype), None if self._mask is None else self._mask.value
        return x.to(dtype), base.weight.to(dtype), bias, a, b, *low, self.scaling[name], mask, self._halves

    def _low(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B cast to `dtype`.

        Casts of frozen ones are kept until A or B changes.  Trained ones are cast at every call, since fused AdamW does
        not count its changes in `_version`; so are those of a compiled layer, where the compiler fuses the cast.
        """
        if a.requires_grad or a.dtype == b.dtype == dtype or torch.compiler.is_compiling():
            return a.detach().to(dtype), b.detach().to(dtype)
        kept, version = self._copies, (a._version, b._version, dtype, a.device)
        if kept is None or kept[0] is not a or kept[1] is not b or kept[2] != version:
            self._copies = kept = (a, b, version, a.detach().to(dtype), b.detach().to(dtype))
        return kept[3], kept[4]


@contextmanager
def batched_adapters(layers: Mapping[str, LoraLayer], stacked: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Run the body with n adapters at once: the first nth of every batch goes through the first, and so on.

    Args:
        layers: the UNet's LoRA layers by path; their own A and B are not used meanwhile, their scale is.
        stacked: for each layer A (n, rank, in[, k, k]) and B (n, out, rank[, 1, 1]).

    Raises:
        UserError: a layer that is not one of this file's, as on a base in 4 bits.
    """
    batched: dict[str, Any] = {name: layers[name] for name in stacked}
    if others := [name for name, layer in batched.items() if not isinstance(layer, _FusedSum)]:
        raise UserError(f"several adapters at once need plain layers, {others[0]} is none: leave load_in_4bit out")
    try:
        for name, layer in batched.items():
            layer._batched = stacked[name]
        yield
    finally:
        for layer in batched.values():
            layer._batched = None


class LoraLinear(Linear, _FusedSum):
    """LoRA on a linear layer: x (…, in) → (…, out)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._batched is not None:
            return self._forward_batched(x, *self._batched)
        name = self._plain(x, args or kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)
        return _LinearProduct.apply(*self._operands(x, name))  # pyright: ignore

    def _forward_batched(self: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y, count = self.base_layer(x), len(a)  # under autocast y has another dtype than x
        u = x.to(y.dtype).reshape(count, -1, x.shape[-1]) @ a.to(y.dtype).transpose(1, 2)
        u = u if self._mask is None else self._mask.apply(u)
        y.view(count, -1, y.shape[-1]).baddbmm_(u, b.to(y.dtype).transpose(1, 2), alpha=self._scale())
        return y


class LoraConv2d(Conv2d, _FusedSum):
    """LoRA on a convolution: A is a convolution like the base's with `rank` output channels, B a 1×1 convolution."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._batched is not None:
            return self._forward_batched(x, *self._batched)
        name, base = self._plain(x, args or kwargs), self.base_layer
        if name is None or base.groups != 1 or base.padding_mode != "zeros" or isinstance(base.padding, str):
            return super().forward(x, *args, **kwargs)
        return _ConvProduct.apply(*self._operands(x, name), (base.stride, base.padding, base.dilation))  # pyright: ignore

    def _forward_batched(self: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y, base, count = self.base_layer(x), self.base_layer, len(a)
        pairs = zip(x.chunk(count), a.to(x.dtype), strict=True)
        u = torch.cat([conv2d(part, low, None, base.stride, base.padding, base.dilation) for part, low in pairs])
        u = u if self._mask is None else self._mask.apply(u, channels_first=True)
        rows = b.to(x.dtype).flatten(2).repeat_interleave(len(x) // count, 0)
        return y.add_((rows @ u.flatten(2)).view(y.shape), alpha=self._scale())


class _LinearProduct(torch.autograd.Function):
    """y = W x + b + s · B A x, and the gradients at the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, low_a: Tensor,
                low_b: Tensor, scale: float, mask: Tensor | None, halves: bool) -> Tensor:  # fmt: skip
        y, flat = linear(x, w, bias), x.reshape(-1, x.shape[-1])
        u = torch.cat([flat @ half.t() for half in low_a.chunk(2)], 1) if halves else flat @ low_a.t()
        u = u if mask is None else masked_components(u, mask)
        if halves:
            first, second = (part @ half.t() for part, half in zip(u.chunk(2, 1), low_b.chunk(2, 1), strict=True))
            y.view(-1, y.shape[-1]).add_(first.add_(second), alpha=scale)
        else:
            y.view(-1, y.shape[-1]).addmm_(u, low_b.t(), alpha=scale)
        ctx.save_for_backward(flat, u, w, low_a, low_b, mask)
        ctx.shape, ctx.scale, ctx.dtype = x.shape, scale, a.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore
        x, u, w, low_a, low_b, mask = ctx.saved_tensors
        gy = grads[0].reshape(-1, grads[0].shape[-1])
        gu = (gy @ low_b).mul_(ctx.scale)
        gu = gu if mask is None else masked_components(gu, mask)
        ga, gb = gu.t() @ x, (gy.t() @ u).mul_(ctx.scale)
        gx = (gy @ w).addmm_(gu, low_a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return gx, None, None, ga.to(ctx.dtype), gb.to(ctx.dtype), None, None, None, None, None


class _ConvProduct(torch.autograd.Function):
    """The same for convolutions; `geometry` is their stride, padding and dilation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, low_a: Tensor,
                low_b: Tensor, scale: float, mask: Tensor | None, halves: bool, geometry: Any) -> Tensor:  # fmt: skip
        y = conv2d(x, w, bias, *geometry)
        parts = [conv2d(x, half, None, *geometry) for half in (low_a.chunk(2) if halves else (low_a,))]
        u = torch.cat(parts, 1) if halves else parts[0]
        u = u if mask is None else masked_components(u, mask, channels_first=True)
        low_b = low_b.flatten(1) if scale == 1 else low_b.flatten(1) * scale
        if halves:
            pairs = zip(u.chunk(2, 1), low_b.chunk(2, 1), strict=True)
            first, second = (conv2d(part.contiguous(), half[:, :, None, None].contiguous()) for part, half in pairs)
            y.add_(first.add_(second))
        elif y.is_contiguous():
            y.flatten(2).baddbmm_(low_b.expand(len(y), -1, -1), u.flatten(2))
        else:
            y.add_(conv2d(u, low_b[:, :, None, None]))
        ctx.save_for_backward(x, u, w, low_a, low_b, mask)
        ctx.scale, ctx.geometry, ctx.dtype = scale, geometry, a.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore
        x, u, w, low_a, low_b, mask = ctx.saved_tensors  # low_b was multiplied by s
        gy, wanted = grads[0], ctx.needs_input_grad[0]
        if gy.is_contiguous():  # one product per sample: a product over all samples at once would copy gy
            flat = gy.flatten(2)
            gu = low_b.t().expand(len(gy), -1, -1).bmm(flat).view_as(u)
            gb = flat.bmm(u.flatten(2).transpose(1, 2)).sum(0)
        else:
            flat = gy.permute(0, 2, 3, 1).flatten(0, 2)  # a view if the layout is channels last
            gu = conv2d(gy, low_b.t()[:, :, None, None])
            gb = flat.t() @ u.permute(0, 2, 3, 1).flatten(0, 2)
        gb = gb if ctx.scale == 1 else gb.mul_(ctx.scale)
        gu = gu if mask is None else masked_components(gu, mask, channels_first=True)
        gx, ga, _ = _conv_backward(gu, x, low_a, ctx.geometry, (wanted, True, False))
        if wanted:
            gx = gx.add_(_conv_backward(gy, x, w, ctx.geometry, (True, False, False))[0])
        return gx, None, None, ga.to(ctx.dtype), gb.to(ctx.dtype)[:, :, None, None], *(None,) * 6


def _conv_backward(grad: Tensor, x: Tensor, w: Tensor, geometry: Any, mask: tuple[bool, ...]) -> Any:
    """The gradients of a convolution's input, weight and bias; `mask` says which are computed."""
    return torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, False, [0, 0], 1, mask)
