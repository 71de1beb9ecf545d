"""Scale LoRA layers for the length of a block: forgetting rules, the strength of an adapter, or none of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from personalize.adapters.forgetting import ForgettingRule, degrees, parse_rules
from personalize.adapters.lora import ADAPTER, PREFIX, factor_parameters, lora_layers
from personalize.errors import UserError
from personalize.models.blocks import module_roles
from personalize.models.ranges import MIX, check_number

Rules = ForgettingRule | Iterable[ForgettingRule] | Mapping[str, float] | None


@contextmanager
def scaled(unet: nn.Module, rules: Rules = None, strength: float = 1.0) -> Iterator[None]:
    """Run the body with the adapter's LoRA multiplied by `strength` and, per module, by the factor of `rules`.

    Afterwards every scale is restored exactly.  Nested contexts multiply.

    Args:
        rules: a forgetting rule, several (the smallest degree counts), or a factor per module path.

    Raises:
        UserError: the UNet has no adapter, or a rule selects none of its modules.
    """
    check_number("strength", strength)
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
    """The factor s of each module in `names`, from `rules` and `strength`; see `scaled`.

    Raises:
        UserError: a rule selects none of `names`, or `rules` has a factor for a module that is not among them.
    """
    names = list(names)
    if isinstance(rules, Mapping):
        for name, factor in rules.items():
            check_number(f"the factor of module {name!r}", factor, MIX)
        factors = {str(name): float(factor) for name, factor in rules.items()}
        if unknown := sorted(set(factors) - set(names)):
            raise UserError(f"no module {unknown[0]!r} in the adapter, which has {len(names)}, e.g. {names[:1]}")
        return {name: strength * factors.get(name, 1.0) for name in names}
    chosen = degrees(module_roles(unet, names), parse_rules(rules))
    return {name: strength * kept for name, kept in chosen.items()}


def scaled_state(
    unet: nn.Module, state: Mapping[str, Tensor], rules: Rules, strength: float = 1.0
) -> dict[str, Tensor]:
    """The adapter's tensors multiplied as by `scaled`: B by the module's factor; modules with factor 0 are left out.

    state: named as by `lora_state`; tensors of other modules than the UNet's stay as they are.
    """
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
def lora_disabled(unet: nn.Module) -> Iterator[None]:
    """Run the body with the adapter switched off: its products are skipped, not multiplied by zero."""
    layers = lora_layers(unet).values()
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in factor_parameters(layer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
