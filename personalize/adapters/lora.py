"""The LoRA adapter in a UNet: which modules get one, adding, loading and removing it, and its strength per module.

    W = W₀ + s · (alpha / rank) · B A          A (rank, in) random, B (out, rank) zero, s = 1 unless `scaled`

Modules are selected by their names and by the role of their block (side and level, read from the UNet's structure),
never by counting.  The layers are peft's `LoraLayer`s, under one adapter name and with peft's state dict keys.

References: Hu et al., "LoRA", arXiv 2106.09685, eq. 3; Zhang et al., "Forgedit", arXiv 2309.10556.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from personalize.adapters.orthogonal_start import orthogonal_parameters, start_orthogonal
from personalize.errors import UserError
from personalize.formats.layer_kinds import fitted
from personalize.models.blocks import Role, leaf_modules, module_roles
from personalize.models.lora_modules import is_lora_layer
from personalize.models.offloading import execution_device
from personalize.randomness import generator

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "personalize"  # the adapter's name in peft
PREFIX = "unet."  # diffusers' prefix in adapter files
TARGETS = ("full", "attention")
_PROJECTIONS = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")


def module_names(unet: nn.Module, family: str | None = None, targets: str = "full") -> list[str]:
    """Paths of the modules that single-image training adds LoRA to, in the UNet's order.

    They are in the encoder below full resolution and in the decoder blocks with attention: on SD 1.x and 2.x
    `down_blocks.1`–`3` and `up_blocks.1`–`3`, on SDXL `down_blocks.1`–`2` and `up_blocks.0`–`1`.

    Args:
        family: the base model's, for the error message.
        targets: "full" for every linear layer and convolution there (216 modules on SD 1.x and 2.x, 661 on SDXL),
            "attention" for the q, k, v and output projections of the attention layers (104 and 480).

    Raises:
        UserError: unknown `targets`, or a UNet without such modules.
    """
    if targets not in TARGETS:
        raise UserError(f"unknown LoRA targets {targets!r}: choose one of {', '.join(TARGETS)}")
    leaves = [path for path, _ in leaf_modules(unet)]
    names = [name for name, role in module_roles(unet, leaves).items() if _trained(role)]
    if targets == "attention":
        names = [name for name in names if _PROJECTIONS.fullmatch(name)]
    if not names:
        raise UserError(f"this {family or ''} UNet has no module to tune: expected down and up blocks with attention")
    return names


def _trained(role: Role) -> bool:
    return (role.side == "encoder" and role.level > 0) or (role.side == "decoder" and role.attention)


def add_lora(
    unet: nn.Module,
    names: Iterable[str],
    rank: int,
    alpha: float,
    seed: int,
    prefix: str = "",
    *,
    orthogonal: bool = False,
) -> list[nn.Parameter]:
    """Add a new trainable adapter to the modules `names`; returns its parameters, fp32, A before B.

    A is uniform in ±1/√fan_in, drawn by a generator keyed by (`seed`, `prefix` and the module's name), so it does not
    depend on the order of the modules or on which others there are.  B is zero, so the UNet's output is unchanged.  The
    base's `requires_grad` flags stay as they are.

    orthogonal: start as in `orthogonal_start`, with layers of rank 2 · `rank` whose strength is still alpha / rank.

    Raises:
        UserError: unknown module name, or the UNet already carries an adapter.
    """
    if orthogonal:
        return _add_orthogonal(unet, names, rank, alpha, seed, prefix)
    layers = _inject(unet, names, rank, alpha)
    for name, layer in layers.items():
        a, b = _pair(layer)
        bound = 1 / math.sqrt(a[0].numel())  # fan_in = entries of one row of A
        values = torch.empty(a.shape).uniform_(-bound, bound, generator=generator(seed, f"lora/{prefix}{name}"))
        _set_pair(layer, values, torch.zeros(b.shape), trainable=True)
    return [parameter for layer in layers.values() for parameter in _pair(layer)]


def _add_orthogonal(
    unet: nn.Module, names: Iterable[str], rank: int, alpha: float, seed: int, prefix: str
) -> list[nn.Parameter]:
    for name, layer in _inject(unet, names, 2 * rank, 2 * alpha).items():
        device = next(layer.get_base_layer().parameters()).device
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        start_orthogonal(down, up, rank, seed, f"{prefix}{name}", device)
        layer._halves = True  # pyright: ignore
    return lora_parameters(unet)


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters in the UNet's order: A before B, or Q, P and λ of layers with an orthogonal start."""
    return [parameter for layer in lora_layers(unet).values() for parameter in factor_parameters(layer)]


def changes_nothing(unet: nn.Module) -> bool:
    """True if ΔW is zero in every LoRA layer, as before the first update: B is zero, or the two halves are equal."""
    return all(_is_zero(layer) for layer in lora_layers(unet).values())


@torch.no_grad()
def _is_zero(layer: LoraLayer) -> bool:
    a, b = _pair(layer)
    if not orthogonal_parameters(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
        return not bool(b.any())
    (q, q_start), (p, p_start) = a.chunk(2), b.chunk(2, 1)
    return torch.equal(q, q_start) and torch.equal(p, -p_start)


def lora_state(unet: nn.Module, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Copies of the adapter's tensors, fp32 on the CPU, named "unet.<path>.lora_A.weight" and "….lora_B.weight"."""
    state = {}
    for name, layer in lora_layers(unet).items():
        for key, parameter in zip(("lora_A", "lora_B"), _pair(layer), strict=True):
            state[f"{prefix}{name}.{key}.weight"] = parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state


def load_lora(unet: nn.Module, state: Mapping[str, Tensor], rank: int, alpha: float) -> None:
    """Add the adapter with the tensors `state`, named as by `lora_state`, frozen; other keys than "unet.…" are ignored.

    Raises:
        UserError: a module that the UNet lacks, A without B, a wrong shape, or a UNet that already has an adapter.
    """
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    names = dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", key) for key in tensors)
    if not names:
        raise UserError(f"this adapter has no UNet part: expected names like {PREFIX}down_blocks.1.….lora_A.weight")
    pairs = {name: (f"{name}.lora_A.weight", f"{name}.lora_B.weight") for name in names}
    if missing := [key for pair in pairs.values() for key in pair if key not in tensors]:
        raise UserError(f"adapter tensor {PREFIX}{missing[0]} is missing: the file is incomplete, get it anew")
    layers = _inject(unet, names, rank, alpha)
    try:
        for name, layer in layers.items():
            a, b = (tensors[key] for key in pairs[name])
            a_and_b = fitted(a, b, _shape(layer))
            for parameter, tensor in zip(_pair(layer), a_and_b, strict=True):
                if parameter.shape != tensor.shape:
                    raise UserError(
                        f"adapter module {name} has shape {tuple(tensor.shape)}, this base model needs "
                        f"{tuple(parameter.shape)} at rank {rank}: it was made for another base or rank"
                    )
            _set_pair(layer, *(tensor.detach().float().clone() for tensor in a_and_b), trainable=False)
    except BaseException:
        remove_lora(unet)
        raise


def _shape(layer: LoraLayer) -> tuple[int, ...]:
    """The shape (out, in[, k, k]) of the base layer's weight, which 4-bit layers store in another."""
    base = layer.get_base_layer()
    linear = isinstance(base, nn.Linear)
    return (base.out_features, base.in_features) if linear else tuple(base.weight.shape)  # pyright: ignore


def remove_lora(unet: nn.Module) -> None:
    """Put the original modules back, the same objects as before; does nothing if there is no adapter."""
    for name, layer in lora_layers(unet).items():
        unet.set_submodule(name, layer.get_base_layer())
    if ADAPTER in getattr(unet, "peft_config", {}):
        del unet.peft_config


@contextmanager
def lora_removed(*modules: nn.Module) -> Iterator[None]:
    """Run the body with the adapters taken out of `modules` (a UNet, text encoders); then put the same objects back."""
    removed = [(module, dict(vars(module)).get("peft_config"), lora_layers(module)) for module in modules]
    try:
        for module in modules:
            remove_lora(module)
        yield
    finally:
        for module, config, layers in removed:
            for name, layer in layers.items():
                module.set_submodule(name, layer)  # pyright: ignore
            if config is not None:
                module.peft_config = config  # pyright: ignore


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of our adapter in the UNet, by module path."""
    layers = {path: module for path, module in leaf_modules(unet) if is_lora_layer(module)}
    return {path: layer for path, layer in layers.items() if ADAPTER in layer.lora_A}


def require_no_lora(module: nn.Module, name: str) -> None:
    """UserError, which says how to get rid of them, if `module` (called `name`) has LoRA layers of anybody's."""
    layers = [layer for layer in module.modules() if is_lora_layer(layer)]
    if not layers:
        return
    if any(ADAPTER in layer.lora_A for layer in layers):  # unloading it would break the block that it is attached in
        raise UserError(f"this {name} already carries an adapter of personalize: leave its `with` block first, or "
                        "apply both together, as in attach(pipe, [first, second])")  # fmt: skip
    if any(layer.merged for layer in layers):
        state = "has LoRA layers that are fused into its weights"
    else:
        state = "already carries an adapter" if any(layer.lora_A for layer in layers) else "still has empty LoRA layers"
    raise UserError(f"this {name} {state}: call pipe.unload_lora_weights() first (what is fused stays)")


def _inject(unet: nn.Module, names: Iterable[str], rank: int, alpha: float) -> dict[str, LoraLayer]:
    """Put LoRA layers around exactly the modules `names`, with A and B still on the meta device."""
    from peft import inject_adapter_in_model

    from personalize.adapters.lora_layers import lora_config

    names, leaves = list(names), dict(leaf_modules(unet))
    require_no_lora(unet, "UNet")
    if any(getattr(module, "fused_projections", False) for module in unet.modules()):
        raise UserError("this UNet's q, k and v are fused, so that LoRAs on them would do nothing: call "
                        "pipe.unfuse_qkv_projections() first")  # fmt: skip
    if unknown := [name for name in names if name not in leaves]:
        raise UserError(f"this UNet has no layer {unknown[0]!r}: the adapter was made for another base model")
    if not names:
        raise UserError("no module was named for the adapter: choose some of module_names(unet)")
    config = lora_config(r"\d+", rank, alpha)
    box = nn.ModuleDict({str(number): leaves[name] for number, name in enumerate(names)})  # peft searches only these
    box.is_loaded_in_4bit = getattr(unet, "is_loaded_in_4bit", False)  # pyright: ignore
    flags = [(parameter, parameter.requires_grad) for parameter in box.parameters()]
    with torch.device("meta"):  # so peft draws no random numbers; faster than its own low_cpu_mem_usage
        inject_adapter_in_model(config, box, ADAPTER)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for name, layer in zip(names, box.values(), strict=True):
        unet.set_submodule(name, layer)
    config.target_modules = "|".join(map(re.escape, names))
    unet.peft_config = {ADAPTER: config}  # pyright: ignore
    return dict(zip(names, box.values(), strict=True))  # pyright: ignore


def factor_parameters(layer: LoraLayer) -> list[nn.Parameter]:
    """What is trained in a layer."""
    return orthogonal_parameters(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) or [*_pair(layer)]


def _pair(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B; of an orthogonal start they are computed, and no parameters."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # pyright: ignore


def _set_pair(layer: LoraLayer, a: Tensor, b: Tensor, *, trainable: bool) -> None:
    device = execution_device(layer.get_base_layer())
    layer.lora_A[ADAPTER].weight = nn.Parameter(a.to(device), requires_grad=trainable)
    layer.lora_B[ADAPTER].weight = nn.Parameter(b.to(device), requires_grad=trainable)
