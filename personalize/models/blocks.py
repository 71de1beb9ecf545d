"""Which block, role and stage each layer of a UNet belongs to, found by the names of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from personalize.models.lora_modules import is_lora_layer


@dataclass(frozen=True)
class Role:
    """Where a module is in the UNet: on which side, and how often the latents were halved before it (`level`)."""

    side: str  # "encoder", "middle", "decoder", or "outside" (input, output and embedding layers)
    level: int
    attention: bool = False  # whether its block has attention layers


OUTSIDE = Role("outside", 0)


def block_roles(unet: nn.Module) -> dict[str, Role]:
    """The role of every block, by name: `down_blocks.1` is the encoder at level 1 (half the latents' resolution), …"""
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
    """Whether the block has attention layers."""
    from diffusers.models.attention_processor import Attention

    return any(isinstance(module, Attention) for module in block.modules())


def module_roles(unet: nn.Module, names: Iterable[str]) -> dict[str, Role]:
    """The role of each module path in `names`; modules outside the blocks (`conv_in`, …) have the side "outside"."""
    blocks = block_roles(unet)

    def role(name: str) -> Role:
        return next((role for block, role in blocks.items() if name.startswith(f"{block}.")), OUTSIDE)

    return {name: role(name) for name in names}


def leaf_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer and convolution with its path; one with LoRA has the path it had without."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, nn.Linear | nn.Conv2d) or is_lora_layer(child):
            yield here, child  # pyright: ignore[reportReturnType]
        else:
            yield from leaf_modules(child, here)
