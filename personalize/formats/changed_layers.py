"""The weight and bias of a layer after a change of any algorithm; see `weight_changes` for the equations.

A strength other than 1 moves the layer that part of the way, W₀ + strength · (W − W₀).
"""

from __future__ import annotations

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.layer_sizes import SMALL
from personalize.formats.weight_changes import Parts, alpha_of, lora_pair

BIASES = ("diff_b", "b_norm", "lora_B.bias")
MAGNITUDES = ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight")
READ = {"A", "B", "alpha", "scale", "diff", "w_norm", "on_input", "weight", *BIASES, *MAGNITUDES, "a1.weight",
        "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "oft_diag", "rescale", "hada_w1_a", "hada_w1_b",
        "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a",
        "lokr_w2_b", "lokr_t2"}  # fmt: skip


def changed(
    module: str, parts: Parts, weight: Tensor, bias: Tensor | None, strength: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The layer's new weight (out, in[, k, k]) and bias (out), in single precision.

    Args:
        module: the module's name, for messages.
        parts: its tensors by role, with "scale" s.
        weight: W₀.
        bias: the layer's bias, if it has one.
        strength: how far the layer moves.

    Raises:
        UserError: factors that do not fit the layer, a change of a bias that the layer does not have, or roles that
            are not known.
    """
    if odd := sorted(set(parts) - READ):
        raise UserError(f"module {module} has {odd[0]!r}, which is recognised but not applied")
    before = weight.float()
    try:
        after = _changed_weight(module, parts, before)
        new_bias = bias if bias is None else bias.float()
        for role in (role for role in BIASES if role in parts):
            if new_bias is None:
                raise UserError(f"module {module}: the file changes its bias, and this base's layer has none")
            scale = float(parts["scale"]) if role == "lora_B.bias" else 1.0
            new_bias = new_bias + strength * scale * parts[role].to(new_bias).reshape(new_bias.shape)
    except UserError:
        raise
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in sorted(parts.items()) if tensor.ndim)
        raise UserError(f"module {module}: {shapes} do not fit its weight {tuple(weight.shape)}"[:400]) from error
    return before + strength * (after - before), new_bias


def _changed_weight(module: str, parts: Parts, weight: Tensor) -> Tensor:
    """The new weight at full strength."""
    if "a1.weight" in parts:
        return weight + _glora(parts, weight)
    if "oft_blocks" in parts or "oft_diag" in parts:
        return _oft(parts, weight)
    if "on_input" in parts:
        return _ia3(parts, weight)
    if "w_norm" in parts:
        return weight + parts["w_norm"].to(weight).reshape(weight.shape)
    magnitude = _magnitude(parts, weight)
    plain = {role: tensor for role, tensor in parts.items() if role not in MAGNITUDES}
    if set(plain) - {"scale", "alpha", *BIASES}:
        a, b = lora_pair(module, plain, tuple(weight.shape[2:]), max(SMALL, weight.numel()))
        if len(b) * a[0].numel() != weight.numel():
            raise ValueError("another layer's factors")
        update = (b.flatten(1).float() @ a.flatten(1).float()) * float(parts.get("scale", torch.tensor(1.0)))
        weight = weight + update.to(weight).reshape(weight.shape)
    return weight if magnitude is None else _renormed(weight, magnitude)


def _magnitude(parts: Parts, weight: Tensor) -> Tensor | None:
    """m of DoRA; PEFT's always has one number for each output, (out) or of convolutions (1, out, 1, 1)."""
    found = {role: parts[role].to(weight) for role in MAGNITUDES if role in parts}
    magnitudes = [m if role == "dora_scale" else m.reshape(len(weight)) for role, m in found.items()]
    return magnitudes[0] if magnitudes else None


def _renormed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """m ∘ W / ‖W‖, one norm for each output, or for each input where m (1, in[, 1, 1]) has their number."""
    flat = weight.flatten(1)
    if magnitude.shape[0] == len(weight):
        norm = flat.norm(dim=1).reshape(-1, *(1 for _ in weight.shape[1:]))
        return weight * (magnitude.reshape(norm.shape) / norm)
    norm = weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in weight.shape[2:]))
    return weight * (magnitude.reshape(norm.shape) / norm)


def _glora(parts: Parts, weight: Tensor) -> Tensor:
    """s · (W₀ a₁ a₂ + b₁ b₂), a₁ a₂ on the inputs; older files of LyCORIS hold the factors the other way round."""
    a1, a2, b1, b2 = (parts[f"{name}.weight"].flatten(1).to(weight) for name in ("a1", "a2", "b1", "b2"))
    if b2.shape[0] == len(weight) and b1.shape[0] != len(weight):
        a1, a2, b1, b2 = a2, a1, b2, b1
    sides = {len(a1), a2.shape[1], weight.shape[1]}
    if len(sides) > 1 or (len(b1), b2.shape[1]) != (len(weight), weight[0].numel()):
        raise ValueError("another layer's factors")
    scale = (alpha_of(parts) or b1.shape[1]) / b1.shape[1]
    update = torch.einsum("oi...,ij,jk->ok...", weight, a1, a2) + (b1 @ b2).reshape(weight.shape)
    return scale * update


def _ia3(parts: Parts, weight: Tensor) -> Tensor:
    """W₀ ∘ (1 + w), with w along the inputs or the outputs."""
    factor, sides = parts["weight"].to(weight).flatten(), [1] * weight.ndim
    side = 1 if bool(parts["on_input"].any()) else 0
    if len(factor) != weight.shape[side]:
        raise ValueError("another layer's factors")
    sides[side] = -1
    return weight * (1 + factor.reshape(sides))


def _oft(parts: Parts, weight: Tensor) -> Tensor:
    """Rᵀ W₀ with R of blocks (I + Q)(I − Q)⁻¹, Q = blocks − blocksᵀ; an alpha > 0 bounds ‖Q‖ by alpha · outputs."""
    blocks = (parts["oft_blocks"] if "oft_blocks" in parts else parts["oft_diag"]).to(weight)
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[0] * blocks.shape[1] != len(weight):
        raise UserError(
            f"OFT blocks {tuple(blocks.shape)} are not n blocks (b, b) of n · b = {len(weight)} outputs (BOFT is not "
            "read)"
        )
    skew, limit = blocks - blocks.transpose(1, 2), alpha_of(parts) * len(weight)
    if limit and float(skew.norm()) > limit:
        skew = skew * (limit / skew.norm())
    identity = torch.eye(blocks.shape[1]).to(weight)
    rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
    turned = torch.einsum("nij,ni...->nj...", rotation, weight.reshape(*blocks.shape[:2], *weight.shape[1:]))
    turned = turned.reshape(weight.shape)
    if "rescale" in parts:
        turned = turned * parts["rescale"].to(weight).reshape(len(weight), *(1 for _ in weight.shape[1:]))
    return turned
