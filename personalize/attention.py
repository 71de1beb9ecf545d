"""Reading and changing attention: hooks that a context manager puts into the UNet and takes out again.

    A = softmax(Q Kᵀ / √d) V          Q (b, n, q, d), K and V (b, n, l, d), A's weights p (b, n, q, l)

with b batch, n heads, q image positions, l text tokens (or image positions, in self-attention), d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from personalize.errors import UserError
from personalize.lora import block_roles

PLACES = {"encoder": "down", "middle": "mid", "decoder": "up"}


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer of the UNet, and the moment at which it is asked.

    `level` says how often the latents were halved before it: `height` × `width` is the map there, in image positions.
    `step` is the loop's `Step`, `branch` is "null" or "cond"; both are None outside the loop, as in training.
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
        """Side of the map: of a square of the same area, if it is no square."""
        return round((self.height * self.width) ** 0.5)


class AttentionHook:
    """Override what you need; all is the identity by default. Only `probs` costs an explicit softmax, where wanted.

    In the loop a hook sees the null and the conditional pass apart: b rows each, 0 the source, 1 … the targets.
    """

    def wants(self, site: AttentionSite) -> bool:
        """Where: asked once for each size of the latents, without step and branch."""
        return True

    def active(self, site: AttentionSite) -> bool:
        """When: asked at every call, with step and branch."""
        return True

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        """Before the product: q (b, n, q, d), k and v (b, n, l, d); l may change, in both alike."""
        return q, k, v

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        """After the softmax: p (b, n, q, l) in fp32, rows summing to one."""
        return p


class MapStore(AttentionHook):
    """Keeps the latest map of each wanted site in `maps`, by name: running a layer again overwrites its map.

    Args:
        cross: text maps (True), self-attention (False) or both (None).
        side: only maps of this side; see `stage_side`.
        place: only "down", "mid" or "up".
        branch: which pass of the loop; training, which has none, is always kept.
        keep_graph: keep the maps' gradients, for losses.
    """

    def __init__(
        self,
        cross: bool | None = True,
        *,
        side: int | None = None,
        place: str | None = None,
        branch: str = "cond",
        keep_graph: bool = False,
    ) -> None:
        self.cross, self.side, self.place, self.branch, self.keep_graph = cross, side, place, branch, keep_graph
        self.maps: dict[str, Tensor] = {}
        self.sites: dict[str, AttentionSite] = {}

    def wants(self, site: AttentionSite) -> bool:
        pairs = ((self.cross, site.cross), (self.side, site.side), (self.place, site.place))
        return all(wish is None or wish == has for wish, has in pairs)

    def active(self, site: AttentionSite) -> bool:
        return site.branch in (None, self.branch)

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        self.maps[site.name] = p if self.keep_graph else p.detach()
        self.sites[site.name] = site
        return p

    def grid(self, name: str) -> Tensor:
        """One site's map as pictures, (b, n, h, w, l)."""
        site = self.sites[name]
        return self.maps[name].unflatten(2, (site.height, site.width))

    def mean(self) -> Tensor:
        """Mean over heads and sites, (b, h, w, l). Raises ValueError if there are no maps, or maps of several sizes."""
        sizes = {(site.height, site.width) for site in self.sites.values()}
        if len(sizes) != 1:
            raise ValueError(f"a mean needs maps of one size, the store has {sorted(sizes)}: give MapStore a side")
        return torch.stack([self.grid(name).mean(1) for name in self.maps]).mean(0)


@contextmanager
def hooked(
    unet: UNet2DConditionModel,
    hooks: Sequence[AttentionHook],
    *,
    step: Any = None,
    branches: Sequence[str | None] = (None,),
) -> Iterator[None]:
    """Run the body with `hooks` in `unet`'s attention, in their order; then the processors are the same objects again.

    The batch consists of equal shares for `branches`, in their order. Under gradient checkpointing the hooks also
    serve the recomputation, even if `backward` comes after the context.

    Raises:
        UserError: at the first prediction, if a hook wants no site; or if an adapter owns the attention (IP-Adapter).
        ValueError: contexts inside one another.
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
    """Every attention layer by name, in the UNet's own order, for latents of `size` (h, w), by default the base's."""
    height, width = size or (unet.config["sample_size"],) * 2
    sites, roles = {}, block_roles(unet)
    for name, attention in _attentions(unet).items():
        role = next(role for block, role in roles.items() if name.startswith(f"{block}."))
        h, w = (-(-side // 2**role.level) for side in (height, width))  # a convolution of stride 2 rounds up
        cross = attention.is_cross_attention
        sites[name] = AttentionSite(name, PLACES[role.side], role.level, cross, attention.heads, h, w)
    return sites


def stage_side(model: Any, target: int = 16) -> int:
    """Side of "the 16×16 maps": nearest `target` among the stages with text attention on both paths.

    SD 1.x: 16, SD 2 at 768 px: 24, SDXL: 32.
    """
    sides = {
        place: {site.side for site in attention_sites(model.unet).values() if site.cross and site.place == place}
        for place in ("down", "up")
    }
    return min(sides["down"] & sides["up"], key=lambda side: (abs(side - target), side))


def _attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


class _Hooking:
    """The processors of one `hooked` context."""

    def __init__(
        self, unet: UNet2DConditionModel, hooks: Sequence[AttentionHook], step: Any, branches: Sequence[str | None]
    ) -> None:
        self.unet, self.hooks, self.step, self.branches = unet, tuple(hooks), step, tuple(branches)
        self.attentions = _attentions(unet)
        self.processors = {name: _Processor(attention.processor) for name, attention in self.attentions.items()}
        self.size: tuple[int, int] | None = None
        self.within = False

    def measure(self, unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each prediction: learn the size of the latents, and which hook serves which site."""
        latents = args[0] if args else kwargs["sample"]
        if self.size == latents.shape[-2:]:
            return
        self.size = latents.shape[-2:]
        sites = attention_sites(unet, self.size)
        wanting = {name: [hook for hook in self.hooks if hook.wants(site)] for name, site in sites.items()}
        for hook in self.hooks:
            if not any(hook is other for served in wanting.values() for other in served):
                raise UserError(
                    f"attention hook {type(hook).__name__} matches no site of this UNet: it has {_listed(sites)}"
                )
        for name, processor in self.processors.items():
            processor.hooks = wanting[name]
            processor.sites = [replace(sites[name], step=self.step, branch=branch) for branch in self.branches]

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {name: attention.processor for name, attention in self.attentions.items()}
        for processor in before.values():
            if isinstance(processor, _Processor):
                raise ValueError("hooked contexts do not go inside one another: give all hooks to one of them")
            if isinstance(processor, nn.Module):
                raise UserError(f"{type(processor).__name__} owns this UNet's attention: unload it before using hooks")
        try:
            for name, processor in self.processors.items():
                self.attentions[name].set_processor(processor)  # pyright: ignore
            self.within = True
            yield
        finally:
            self.within = False
            for name, processor in before.items():
                self.attentions[name].set_processor(processor)

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Let recomputed blocks find the hooks again when the body is over."""
        every = self.unet.modules() if torch.is_grad_enabled() else ()  # without gradients nothing is computed again
        modules = [module for module in every if getattr(module, "gradient_checkpointing", False)]
        before = [module._gradient_checkpointing_func for module in modules]
        try:
            for module, checkpoint in zip(modules, before, strict=True):
                module._gradient_checkpointing_func = self._replaying(checkpoint)  # pyright: ignore
            yield
        finally:
            for module, checkpoint in zip(modules, before, strict=True):
                module._gradient_checkpointing_func = checkpoint

    def _replaying(self, checkpoint: Any) -> Callable[..., Any]:
        def run(block: nn.Module, *args: Any) -> Any:
            def call(*inputs: Any) -> Any:
                if self.within:
                    return block(*inputs)
                with self.installed():
                    return block(*inputs)

            return checkpoint(call, *args)

        return run


class _Processor:
    """Attention of one site: the original where no hook wants it, else fused, else (a hook reads the maps) explicit."""

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
        shares = zip(*(tensor.chunk(count) for tensor in heads), masks, self.sites, strict=True)
        mixed = [self._attend(attn, *share) for share in shares]
        output = attn.to_out[0](torch.cat(mixed).transpose(1, 2).flatten(2))
        return attn.to_out[1](output) / attn.rescale_output_factor

    def _attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: AttentionSite) -> Tensor:
        hooks = [hook for hook in self.hooks if hook.active(site)]
        for hook in hooks:
            q, k, v = hook.qkv(q, k, v, site)
        readers = [hook for hook in hooks if type(hook).probs is not AttentionHook.probs]
        if not readers:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale)
        if attn.upcast_attention:
            q, k = q.float(), k.float()
        scores = (q @ k.transpose(-1, -2)) * attn.scale
        p = (scores if mask is None else scores + mask).float().softmax(-1)
        for hook in readers:
            p = hook.probs(p, site)
        return p.to(v.dtype) @ v


def _listed(sites: dict[str, AttentionSite]) -> str:
    kinds = {f"{'cross' if site.cross else 'self'} {site.height}×{site.width} {site.place}" for site in sites.values()}
    return ", ".join(sorted(kinds))
