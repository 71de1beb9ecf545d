"""How an adapter of any algorithm changes a layer: ΔW rebuilt from its factors, and the LoRA that equals it.

    LoRA     ΔW = s · B A                           with a Tucker core, A = core ×₂ down
    LoHa     ΔW = s · (W₁ₐ W₁ᵦ) ∘ (W₂ₐ W₂ᵦ)        = a LoRA of rank r², its factors are products row by row
    LoKr     ΔW = s · W₁ ⊗ W₂                       = a LoRA of rank rank(W₁) · rank(W₂)
    full     ΔW = D
    GLoRA    ΔW = s · (W₀ A + B)
    (IA)³    ΔW = W₀ ∘ w, along the outputs, or the inputs where `on_input` is set
    DoRA     W  = m ∘ (W₀ + ΔW) / ‖W₀ + ΔW‖         norms along the outputs; along the inputs where m says so
    OFT      W  = R W₀, with R block-diagonal and orthogonal

s = alpha / r.  Convolutions count as matrices (out, in·k·k).  The last four need the base's weight W₀.

References: Hu et al., arXiv 2106.09685 (LoRA); Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation", arXiv 2309.14859 (LoHa, LoKr, full, GLoRA); Liu et al., arXiv 2205.05638 ((IA)³);
Liu et al., arXiv 2402.09353 (DoRA); Qiu et al., arXiv 2306.07280 (OFT).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.layer_sizes import most_numbers

Parts = Mapping[str, Tensor]
"""The tensors of one module by role: "A", "B", "mid", "alpha", "hada_w1_a", "lokr_w1", "diff", "dora_scale", …"""

NEED_THE_BASE = {"DoRA", "GLoRA", "OFT or BOFT", "(IA)3"}
NOT_A_MATRIX = {"bias difference"}  # changes of biases, which no LoRA has


def alpha_of(parts: Parts) -> float:
    """The module's own alpha; 0 if it has none."""
    return float(parts["alpha"]) if "alpha" in parts and parts["alpha"].numel() == 1 else 0.0


def lora_pair(
    module: str, parts: Parts, kernel: tuple[int, ...] = (), limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """A (r, in[, k, k]) and B (out, r[, 1, 1]) with B A = ΔW, of a module that needs no weight of the base.

    Args:
        module: the module's name, for messages.
        parts: its tensors.
        kernel: the kernel's sides (k, k) of a convolution, () for a linear layer.
        limit: the most numbers that anything built here may have; by default those of the largest such layer.

    Raises:
        UserError: factors that are missing, do not fit or exceed `limit`, or an algorithm that needs the base's weight.
    """
    limit = most_numbers(module) if limit is None else limit
    try:
        if "hada_w1_a" in parts:
            pair = _loha_pair(parts, limit)
        elif any(role.startswith("lokr_") for role in parts):
            pair = _lokr_pair(parts, limit)
        elif "diff" in parts:
            pair = _full_pair(parts["diff"].float(), limit)
        elif "A" in parts and "B" in parts and not {"dora_scale", "lora_magnitude_vector"} & set(parts):
            return parts["A"], parts["B"]
        else:
            raise UserError(
                f"module {module} ({', '.join(sorted(parts))}) is no sum of products that a LoRA could hold"
            )
    except UserError:
        raise
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise _unfit(module, parts, error) from error
    return shortened(*_shaped(module, *pair, kernel), limit)


def require_small(numbers: int, limit: int) -> None:
    """UserError if a factor would have more numbers than its layer: a small file must not fill the memory."""
    if numbers > limit:
        raise UserError(f"a module's factors multiply out to {numbers:,} numbers, its layer has at most {limit:,}")


def _unfit(module: str, parts: Parts, error: Exception) -> UserError:
    shapes = ", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in sorted(parts.items()))
    what = f"lacks {error}" if isinstance(error, KeyError) else "has factors that do not fit"
    return UserError(f"module {module} {what}: {shapes}"[:400])


def _shaped(module: str, a: Tensor, b: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A (r, in·k·k) and B (out, r) in the shapes of a layer with this `kernel`."""
    if not kernel:
        return a.flatten(1), b.flatten(1)
    if a.flatten(1).shape[1] % (kernel[0] * kernel[1]):
        raise UserError(f"module {module}: A {tuple(a.shape)} is for no convolution with a kernel of {kernel}")
    return a.reshape(len(a), -1, *kernel), b.reshape(len(b), -1, 1, 1)


def shortened(a: Tensor, b: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The same product with a rank of at most min(out, in·k·k), which no matrix exceeds."""
    if len(a) <= min(len(b), a[0].numel()):
        return a, b
    require_small(len(b) * a[0].numel(), limit)
    down, up = _full_pair(b.flatten(1).double() @ a.flatten(1).double(), limit)
    return down.float().reshape(-1, *a.shape[1:]), up.float().reshape(len(b), -1, *b.shape[2:])


def _full_pair(update: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """A matrix (out, …) as a product of full rank: of itself and the identity."""
    matrix = update.flatten(1)
    require_small(min(matrix.shape) ** 2, limit)
    if len(matrix) <= matrix.shape[1]:
        return matrix, torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.eye(matrix.shape[1], dtype=matrix.dtype), matrix


def _loha_pair(parts: Parts, limit: int) -> tuple[Tensor, Tensor]:
    """(a₁ b₁) ∘ (a₂ b₂) = Σᵢⱼ (a₁ᵢ ∘ a₂ⱼ) (b₁ᵢ ∘ b₂ⱼ), or multiplied out where that has fewer numbers."""
    a1, b1 = _loha_factors(parts, "1", limit)
    a2, b2 = _loha_factors(parts, "2", limit)
    if a1.shape[0] != a2.shape[0] or b1.shape[1:] != b2.shape[1:]:
        raise ValueError("the two factors of a LoHa differ in shape")
    rank = parts["hada_w1_b"].shape[0]
    scale = (alpha_of(parts) or rank) / rank
    if a1.shape[1] * a2.shape[1] > min(len(a1), b1.shape[1]):
        require_small(len(a1) * b1.shape[1], limit)
        down, up = _full_pair((a1.double() @ b1.double()) * (a2.double() @ b2.double()) * scale, limit)
        return down.float(), up.float()
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1) * scale
    return (b1[:, None] * b2[None, :]).flatten(0, 1), up


def _loha_factors(parts: Parts, number: str, limit: int) -> tuple[Tensor, Tensor]:
    """The two matrices (out, r) and (r, in·k·k) of one factor of a LoHa; with a core t, Σ t[i, j] aᵢ bⱼ."""
    a, b = parts[f"hada_w{number}_a"].float(), parts[f"hada_w{number}_b"].float()
    if f"hada_t{number}" not in parts:
        return a, b.flatten(1)
    require_small(parts[f"hada_t{number}"][:, 0].numel() * b.shape[1], limit)
    core = torch.einsum("ijkl,jr->irkl", parts[f"hada_t{number}"].float(), b)  # a: (r, out), b: (r, in)
    return a.T, core.flatten(1)


def _lokr_pair(parts: Parts, limit: int) -> tuple[Tensor, Tensor]:
    """(P Q) ⊗ (U V) = (P ⊗ U) (Q ⊗ V), the rank of each factor at most its smaller side."""
    (q, p), (v, u) = (shortened(*_lokr_factors(parts, number, limit), limit) for number in "12")
    require_small(p.shape[1] * u.shape[1] * max(len(p) * len(u), q.shape[1] * v[0].numel()), limit)
    decomposed = [parts[f"lokr_w{n}_b"] for n in "12" if f"lokr_w{n}_b" in parts]
    rank = decomposed[-1].shape[0] if decomposed else 0  # scaled only if one of the two is a product
    scale = alpha_of(parts) / rank if rank and alpha_of(parts) else 1.0
    down = torch.einsum("pi,rj...->prij...", q, v).flatten(0, 1).flatten(1)
    return down, torch.kron(p, u) * scale


def _lokr_factors(parts: Parts, number: str, limit: int) -> tuple[Tensor, Tensor]:
    """One factor of a LoKr as two matrices (r, in[, k, k]) and (out, r), whose product in reverse order it is."""
    name = f"lokr_w{number}"
    if name in parts:
        down, up = _full_pair(parts[name].float(), limit)
        return down.reshape(len(down), *parts[name].shape[1:]), up
    a, b = parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
    if number == "2" and "lokr_t2" in parts:  # a: (r, out), b: (r, in)
        require_small(parts["lokr_t2"][:, 0].numel() * b.shape[1], limit)
        return torch.einsum("ijkl,jr->irkl", parts["lokr_t2"].float(), b), a.T
    return b, a
