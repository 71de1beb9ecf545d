"""The adapter inside the UNet: which modules it changes, adding and removing it, and its strength per module.

    W = W₀ + s · (alpha / rank) · B A          A (rank, in) random, B (out, rank) zero, s = 1 unless `scaled`

Modules are found by their names and by the role of the block they sit in (side and level, read off the UNet's
structure), never by counting.  Everything is peft's: `LoraLayer`s under one adapter name, exported in peft's names.

References: Hu et al., "LoRA", arXiv 2106.09685, eq. 3; Zhang et al., "Forgedit", arXiv 2309.10556.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from personalize.errors import UserError
from personalize.forgetting import ForgettingRule, Role, degrees
from personalize.lora_layers import lora_config
from personalize.randomness import generator

ADAPTER = "personalize"  # peft's name for it
PREFIX = "unet."  # diffusers' prefix in adapter files
TARGETS = ("full", "attention")
_PROJECTIONS = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)")
OUTSIDE = Role("outside", 0)
Rules = ForgettingRule | Iterable[ForgettingRule] | Mapping[str, float] | None


def block_roles(unet: nn.Module) -> dict[str, Role]:
    """The role of every block: `down_blocks.1` → the encoder at level 1 (half the latents' resolution), …"""
    roles, level = {}, 0
    for name, block in unet.get_submodule("down_blocks").named_children():
        roles[f"down_blocks.{name}"] = Role("encoder", level, _attends(block))
        level += bool(getattr(block, "downsamplers", None))
    if (middle := getattr(unet, "mid_block", None)) is not None:
        roles["mid_block"] = Role("middle", level, _attends(middle))
    for name, block in unet.get_submodule("up_blocks").named_children():
        roles[f"up_blocks.{name}"] = Role("decoder", level, _attends(block))
        level -= bool(getattr(block, "upsamplers", None))
    return roles


def _attends(block: nn.Module) -> bool:
    return any(isinstance(module, Attention) for module in block.modules())


def module_roles(unet: nn.Module, names: Iterable[str]) -> dict[str, Role]:
    """The role of each module path in `names`; paths outside the blocks (`conv_in`, …) have the side "outside"."""
    blocks = block_roles(unet)

    def role(name: str) -> Role:
        return next((role for block, role in blocks.items() if name.startswith(f"{block}.")), OUTSIDE)

    return {name: role(name) for name in names}


def module_names(unet: nn.Module, family: str | None = None, targets: str = "full") -> list[str]:
    """Paths of the modules that single-image tuning changes, in the UNet's own order.

    Trained are the encoder below full resolution and every decoder block with attention: on SD 1.x and 2.x
    `down_blocks.1`–`3` and `up_blocks.1`–`3`, on SDXL `down_blocks.1`–`2` and `up_blocks.0`–`1`.  There, "full" takes
    every linear layer and convolution (216 modules on SD 1.x and 2.x, 661 on SDXL), "attention" only the projections
    q, k, v and out of the attentions (104 and 480).

    Raises:
        UserError: unknown `targets`, or a UNet without such modules (`family` is named in the message).
    """
    if targets not in TARGETS:
        raise UserError(f"unknown LoRA targets {targets!r}: choose one of {', '.join(TARGETS)}")
    leaves = [path for path, _ in _leaves(unet)]
    names = [name for name, role in module_roles(unet, leaves).items() if _trained(role)]
    if targets == "attention":
        names = [name for name in names if _PROJECTIONS.fullmatch(name)]
    if not names:
        raise UserError(f"this {family or ''} UNet has no module to tune: expected down and up blocks with attention")
    return names


def _trained(role: Role) -> bool:
    return (role.side == "encoder" and role.level > 0) or (role.side == "decoder" and role.attention)


def _leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer and convolution, by the path it has without an adapter."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, nn.Linear | nn.Conv2d | LoraLayer):
            yield here, child
        else:
            yield from _leaves(child, here)


def add_lora(
    unet: nn.Module, names: Iterable[str], rank: int, alpha: float, seed: int, prefix: str = ""
) -> list[nn.Parameter]:
    """Add a fresh trainable adapter to the modules `names`; returns its parameters, fp32, A before B.

    A is uniform in ±1/√fan_in from a generator keyed by (`seed`, `prefix` and the module's name), so that neither the
    order of modules nor the presence of others matters; B is zero, so the UNet's output is unchanged.  The base's
    `requires_grad` flags stay as they are.

    Raises:
        UserError: unknown module name, or the UNet already carries an adapter.
    """
    layers = _inject(unet, names, rank, alpha)
    for name, layer in layers.items():
        a, b = _pair(layer)
        bound = 1 / math.sqrt(a[0].numel())  # fan_in = entries of one row of A
        values = torch.empty(a.shape).uniform_(-bound, bound, generator=generator(seed, f"lora/{prefix}{name}"))
        _set_pair(layer, values, torch.zeros(b.shape), trainable=True)
    return [parameter for layer in layers.values() for parameter in _pair(layer)]


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, A before B, in the UNet's own order."""
    return [parameter for layer in lora_layers(unet).values() for parameter in _pair(layer)]


def lora_state(unet: nn.Module, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Copies of the adapter's tensors, fp32 on the CPU, as "unet.<path>.lora_A.weight" and "….lora_B.weight"."""
    state = {}
    for name, layer in lora_layers(unet).items():
        for key, parameter in zip(("lora_A", "lora_B"), _pair(layer), strict=True):
            state[f"{prefix}{name}.{key}.weight"] = parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
    return state


def load_lora(unet: nn.Module, state: Mapping[str, Tensor], rank: int, alpha: float) -> None:
    """Add the adapter of `state` (names as in `lora_state`; keys without the prefix "unet." are not for us), frozen.

    Raises:
        UserError: a module the UNet does not have, half a pair, a wrong shape, or an adapter is already there.
    """
    mine = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    names = dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", key) for key in mine)
    if not names:
        raise UserError(f"this adapter has no UNet part: expected names like {PREFIX}down_blocks.1.….lora_A.weight")
    missing = [key for name in names for key in (f"{name}.lora_A.weight", f"{name}.lora_B.weight") if key not in mine]
    if missing:
        raise UserError(f"adapter tensor {PREFIX}{missing[0]} is missing: the file is incomplete, get it anew")
    layers = _inject(unet, names, rank, alpha)
    try:
        for name, layer in layers.items():
            tensors = [mine[f"{name}.{key}.weight"] for key in ("lora_A", "lora_B")]
            for parameter, tensor in zip(_pair(layer), tensors, strict=True):
                if parameter.shape != tensor.shape:
                    raise UserError(
                        f"adapter module {name} has shape {tuple(tensor.shape)}, this base model needs "
                        f"{tuple(parameter.shape)} at rank {rank}: it was made for another base or rank"
                    )
            _set_pair(layer, *(tensor.detach().float().clone() for tensor in tensors), trainable=False)
    except BaseException:
        remove_lora(unet)
        raise


def remove_lora(unet: nn.Module) -> None:
    """Put the base modules back; the very same objects as before.  Nothing happens if there is no adapter."""
    for name, layer in lora_layers(unet).items():
        unet.set_submodule(name, layer.get_base_layer())
    if ADAPTER in getattr(unet, "peft_config", {}):
        del unet.peft_config


@contextmanager
def lora_aside(*modules: nn.Module) -> Iterator[None]:
    """Run the body without the adapters in `modules` (a UNet, text encoders); then they are back, the same objects."""
    taken = [(module, dict(vars(module)).get("peft_config"), lora_layers(module)) for module in modules]
    try:
        for module in modules:
            remove_lora(module)
        yield
    finally:
        for module, config, layers in taken:
            for name, layer in layers.items():
                module.set_submodule(name, layer)  # pyright: ignore
            if config is not None:
                module.peft_config = config  # pyright: ignore


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """The UNet's LoRA layers of this adapter, by module path."""
    found = {path: module for path, module in _leaves(unet) if isinstance(module, LoraLayer)}
    return {path: layer for path, layer in found.items() if ADAPTER in layer.lora_A}


@contextmanager
def scaled(unet: nn.Module, rules: Rules = None, strength: float = 1.0) -> Iterator[None]:
    """Run the body with the adapter at `strength`, and `rules` forgotten; every scale is restored exactly.

    `rules` is a forgetting rule, several (each module keeps the smallest share any of them leaves it), or a mapping
    from module path to multiplier.  Contexts inside one another multiply.

    Raises:
        UserError: there is no adapter, or a rule selects none of its modules.
    """
    layers = lora_layers(unet)
    if not layers:
        raise UserError("there is no adapter to scale in this UNet: load one first")
    factors = multipliers(unet, layers, rules, strength)
    before = {name: layer.scaling[ADAPTER] for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            full = layer.lora_alpha[ADAPTER] / layer.r[ADAPTER]
            layer.set_scale(ADAPTER, factors[name] * before[name] / full)
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling[ADAPTER] = before[name]


def multipliers(unet: nn.Module, names: Iterable[str], rules: Rules, strength: float = 1.0) -> dict[str, float]:
    """The factor s of each module in `names` under `rules` and `strength`.

    Raises:
        UserError: a rule selects none of `names`, or a mapping names a module that is not there.
    """
    names = list(names)
    if isinstance(rules, Mapping):
        factors = {str(name): float(factor) for name, factor in rules.items()}
        if unknown := sorted(set(factors) - set(names)):
            raise UserError(f"no module {unknown[0]!r} in the adapter, which has {len(names)}, e.g. {names[:1]}")
        return {name: strength * factors.get(name, 1.0) for name in names}
    chosen = () if rules is None else (rules,) if isinstance(rules, ForgettingRule) else tuple(rules)
    return {name: strength * kept for name, kept in degrees(module_roles(unet, names), chosen).items()}


def baked(unet: nn.Module, state: Mapping[str, Tensor], rules: Rules, strength: float = 1.0) -> dict[str, Tensor]:
    """The adapter `state` with `rules` and `strength` worked in: modules at 0 are dropped, others have B multiplied."""
    suffix = ".lora_B.weight"
    names = [key.removeprefix(PREFIX).removesuffix(suffix) for key in state if key.endswith(suffix)]
    out = dict(state)
    for name, factor in multipliers(unet, names, rules, strength).items():
        a, b = f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}{suffix}"
        if factor == 0:
            del out[a], out[b]
        else:
            out[b] = state[b] * factor
    return out


@contextmanager
def without_lora(unet: nn.Module) -> Iterator[None]:
    """Run the body on the base model alone; the adapter is skipped, not multiplied by zero."""
    layers = lora_layers(unet).values()
    flags = [[parameter.requires_grad for parameter in _pair(layer)] for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, (a, b) in zip(layers, flags, strict=True):
            layer.enable_adapters(True)
            _pair(layer)[0].requires_grad_(a)
            _pair(layer)[1].requires_grad_(b)


def _inject(unet: nn.Module, names: Iterable[str], rank: int, alpha: float) -> dict[str, LoraLayer]:
    """LoRA layers around exactly the modules `names`, with A and B still on the meta device."""
    names, leaves = list(names), dict(_leaves(unet))
    if any(isinstance(module, LoraLayer) for module in leaves.values()):
        raise UserError("this UNet already carries an adapter: unload or fuse it first")
    if unknown := [name for name in names if name not in leaves]:
        raise UserError(f"this UNet has no layer {unknown[0]!r}: the adapter was made for another base model")
    if not names:
        raise UserError("no module was named for the adapter: choose some of module_names(unet)")
    config = lora_config(r"\d+", rank, alpha)
    box = nn.ModuleDict({str(number): leaves[name] for number, name in enumerate(names)})  # no UNet to be searched
    box.is_loaded_in_4bit = getattr(unet, "is_loaded_in_4bit", False)  # pyright: ignore
    flags = [(parameter, parameter.requires_grad) for parameter in box.parameters()]
    with torch.device("meta"):  # peft draws no random numbers; a quarter faster than its own low_cpu_mem_usage
        inject_adapter_in_model(config, box, ADAPTER)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for name, layer in zip(names, box.values(), strict=True):
        unet.set_submodule(name, layer)
    config.target_modules = "|".join(map(re.escape, names))
    unet.peft_config = {ADAPTER: config}  # pyright: ignore
    return dict(zip(names, box.values(), strict=True))  # pyright: ignore


def _pair(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # pyright: ignore


def _set_pair(layer: LoraLayer, a: Tensor, b: Tensor, *, trainable: bool) -> None:
    device = next(layer.get_base_layer().parameters()).device
    layer.lora_A[ADAPTER].weight = nn.Parameter(a.to(device), requires_grad=trainable)
    layer.lora_B[ADAPTER].weight = nn.Parameter(b.to(device), requires_grad=trainable)
