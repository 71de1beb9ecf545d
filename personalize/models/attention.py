"""Reading and changing the UNet's attention by hooks, which `hooked` installs for the body of a `with` statement.

    p = softmax(Q Kᵀ / √d),   output = p V          Q (b, n, q, d), K and V (b, n, l, d), p (b, n, q, l)

with b batch, n heads, q image positions, l text tokens (image positions in self-attention), d the width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from personalize.errors import UserError
from personalize.models.blocks import block_roles
from personalize.models.supported import latent_size

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

PLACES = {"encoder": "down", "middle": "mid", "decoder": "up"}


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer of the UNet, and in which pass of which denoising step it is called.

    `level` is how often the latents were halved before it; `height` × `width` is the size of its map, in image
    positions.  `step` is the `Step` of `denoise` and `branch` is "null" or "cond"; both are None outside the denoising
    loop, as in training.
    """

    name: str
    place: str  # "down", "mid" or "up"
    level: int
    cross: bool
    heads: int
    height: int
    width: int
    step: Any = None
    branch: str | None = None

    @property
    def side(self) -> int:
        """Side of the map, or if it is not square, of the square of the same area, rounded."""
        return round((self.height * self.width) ** 0.5)


class AttentionHook:
    """Base class of attention hooks: every method returns its input unless overridden.

    A hook that overrides `probs` makes the layers it wants compute an explicit softmax instead of the fused attention.
    In the denoising loop a hook is called for the null and the conditional pass separately, with b rows each: row 0 is
    the source, rows 1 … are the targets.
    """

    def wants(self, site: AttentionSite) -> bool:
        """Whether the hook applies to this layer; called once per size of the latents, without step and branch."""
        return True

    def active(self, site: AttentionSite) -> bool:
        """Whether the hook applies at this call, by step and branch; called before every call of a wanted layer."""
        return True

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        """Change queries q (b, n, q, d), keys k and values v (b, n, l, d); l may change if it is the same in both."""
        return q, k, v

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        """Read or change the attention weights p (b, n, q, l) after the softmax: fp32, rows summing to one."""
        return p


@contextmanager
def hooked(
    unet: UNet2DConditionModel,
    hooks: Sequence[AttentionHook],
    *,
    step: Any = None,
    branches: Sequence[str | None] = (None,),
) -> Iterator[None]:
    """Run the body with `hooks` in `unet`'s attention, called in their order; then restore the attention processors.

    Args:
        step: the denoising step, which the hooks see as `site.step`.
        branches: the batch consists of as many equal parts, one for each branch, in this order.

    Under gradient checkpointing the hooks also apply to the recomputation, even if `backward` is called after the
    context has ended.

    Raises:
        UserError: at the first prediction, if a hook wants no layer of this UNet; or if an adapter has put processors
            of its own into the attention (IP-Adapter).
        ValueError: nested contexts.
    """
    if not hooks:
        yield
        return
    hooking = _Hooking(unet, hooks, step, branches)
    handle = unet.register_forward_pre_hook(hooking.measure, with_kwargs=True)
    try:
        with hooking.installed(), hooking.checkpointed():
            yield
    finally:
        handle.remove()


def attention_sites(unet: UNet2DConditionModel, size: tuple[int, int] | None = None) -> dict[str, AttentionSite]:
    """All attention layers by name, in the UNet's order, for latents of `size` (h, w), by default the base's own."""
    height, width = size or latent_size(unet)
    sites, roles = {}, block_roles(unet)
    for name, attention in _attentions(unet).items():
        role = next(role for block, role in roles.items() if name.startswith(f"{block}."))
        h, w = (-(-side // 2**role.level) for side in (height, width))  # a convolution of stride 2 rounds up
        cross = attention.is_cross_attention
        sites[name] = AttentionSite(name, PLACES[role.side], role.level, cross, attention.heads, h, w)
    return sites


def _attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    from diffusers.models.attention_processor import Attention

    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


class _Hooking:
    """The state of one `hooked` context: its hooks, and a processor for every attention layer."""

    def __init__(
        self, unet: UNet2DConditionModel, hooks: Sequence[AttentionHook], step: Any, branches: Sequence[str | None]
    ) -> None:
        self.unet, self.hooks, self.step, self.branches = unet, tuple(hooks), step, tuple(branches)
        self.attentions = _attentions(unet)
        self.processors = {name: _Processor(attention.processor) for name, attention in self.attentions.items()}
        self.size: tuple[int, int] | None = None
        self.active = False  # are the processors installed?

    def measure(self, unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the UNet: for a new size of the latents, decide which hooks apply to which layer."""
        latents = args[0] if args else kwargs["sample"]
        if self.size == latents.shape[-2:]:
            return
        self.size = latents.shape[-2:]
        sites = attention_sites(unet, self.size)
        wanting = {name: [hook for hook in self.hooks if hook.wants(site)] for name, site in sites.items()}
        for hook in self.hooks:
            if not any(hook is other for chosen in wanting.values() for other in chosen):
                raise UserError(
                    f"attention hook {type(hook).__name__} matches no site of this UNet: it has {_listed(sites)}"
                )
        for name, processor in self.processors.items():
            processor.hooks = wanting[name]
            processor.sites = [replace(sites[name], step=self.step, branch=branch) for branch in self.branches]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run the body with our processors in place of the UNet's."""
        before = {name: attention.processor for name, attention in self.attentions.items()}
        for processor in before.values():
            if isinstance(processor, _Processor):
                raise ValueError("hooked contexts do not go inside one another: give all hooks to one of them")
            if isinstance(processor, nn.Module):
                raise UserError(f"{type(processor).__name__} owns this UNet's attention: unload it before using hooks")
        try:
            for name, processor in self.processors.items():
                self.attentions[name].set_processor(processor)  # pyright: ignore
            self.active = True
            yield
        finally:
            self.active = False
            for name, processor in before.items():
                self.attentions[name].set_processor(processor)

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Let blocks that gradient checkpointing recomputes after the body has ended use the hooks again."""
        every = self.unet.modules() if torch.is_grad_enabled() else ()  # without gradients nothing is recomputed
        modules = [module for module in every if getattr(module, "gradient_checkpointing", False)]
        before = [module._gradient_checkpointing_func for module in modules]
        try:
            for module, checkpoint in zip(modules, before, strict=True):
                module._gradient_checkpointing_func = self._with_hooks(checkpoint)  # pyright: ignore
            yield
        finally:
            for module, checkpoint in zip(modules, before, strict=True):
                module._gradient_checkpointing_func = checkpoint

    def _with_hooks(self, checkpoint: Any) -> Callable[..., Any]:
        """The checkpointing function `checkpoint`, with the hooks in place whenever it calls a block."""

        def checkpoint_block(block: nn.Module, *args: Any) -> Any:
            def call(*inputs: Any) -> Any:
                if self.active:
                    return block(*inputs)
                with self.installed():
                    return block(*inputs)

            return checkpoint(call, *args)

        return checkpoint_block


class _Processor:
    """Attention processor of one layer.

    It calls the original one if no hook applies, and else computes fused attention, or an explicit softmax if a hook
    overrides `probs`.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.hooks: list[AttentionHook] = []
        self.sites: list[AttentionSite] = []

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, *args, **kwargs
    ):
        if not any(hook.active(site) for hook in self.hooks for site in self.sites):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            attention_mask = attention_mask.unflatten(0, (-1, attn.heads))
        projections = ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        heads = [project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project, states in projections]
        count = len(self.sites)
        masks = [None] * count if attention_mask is None else attention_mask.chunk(count)
        branches = zip(*(tensor.chunk(count) for tensor in heads), masks, self.sites, strict=True)
        attended = [self._attend(attn, *branch) for branch in branches]
        output = attn.to_out[0](torch.cat(attended).transpose(1, 2).flatten(2))
        return attn.to_out[1](output) / attn.rescale_output_factor

    def _attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: AttentionSite) -> Tensor:
        """The output (b, n, q, d) of one branch."""
        hooks = [hook for hook in self.hooks if hook.active(site)]
        for hook in hooks:
            q, k, v = hook.qkv(q, k, v, site)
        readers = [hook for hook in hooks if type(hook).probs is not AttentionHook.probs]
        if not readers:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale)
        if attn.upcast_attention:
            q, k = q.float(), k.float()
        scores = (q * attn.scale) @ k.transpose(-1, -2)  # scaled first: in fp16 the unscaled product overflows
        p = (scores if mask is None else scores + mask).float().softmax(-1)
        for hook in readers:
            p = hook.probs(p, site)
        return p.to(v.dtype) @ v


def _listed(sites: dict[str, AttentionSite]) -> str:
    kinds = {f"{'cross' if site.cross else 'self'} {site.height}×{site.width} {site.place}" for site in sites.values()}
    return ", ".join(sorted(kinds))
