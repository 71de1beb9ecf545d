"""Which algorithm a module's tensors belong to, by their roles, and which of them it cannot do without."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from personalize.errors import UserError


def algorithm_of(parts: Mapping[str, Tensor]) -> str:
    """The algorithm of a module that is no plain LoRA, by its tensors' roles."""
    roles = set(parts) - {"scale", "alpha"}
    for name, marks in MARKS.items():
        if roles & marks:
            return name
    return "bias difference"


def missing_factors(parts: Mapping[str, Tensor]) -> list[str]:
    """The tensors that a module that is no plain LoRA lacks, in one of the forms that they may have; [] if none.

    A module of DoRA needs those of the algorithm whose ΔW it renorms: LoRA, LoHa or LoKr.
    """
    name, roles = algorithm_of(parts), set(parts)
    if name == "DoRA":
        name = algorithm_of({role: tensor for role, tensor in parts.items() if role not in MARKS["DoRA"]})
        name = name if name in NEEDED else "LoRA"
    choices = (part for part in NEEDED.get(name, ()) if not any(roles >= choice for choice in part))
    return sorted(next(choices, [set[str]()])[0])


def require_no_new_weight(name: str, parts: Mapping[str, Tensor]) -> None:
    """UserError, naming the module, if its tensors give the layer another weight or shape, which nothing here does."""
    if odd := sorted(NEW_WEIGHT & set(parts)):
        raise UserError(f"{name} has ComfyUI's {odd[0]}, which gives its layer another weight or shape and is not read")


NEW_WEIGHT = {"set_weight", "reshape_weight"}  # read by name alone
MARKS = {
    "DoRA": {"dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"},
    "GLoRA": {"a1.weight", "a2.weight", "b1.weight", "b2.weight"},
    "OFT or BOFT": {"oft_blocks", "oft_diag", "oft_R.weight"},
    "(IA)3": {"on_input", "weight"},
    "LoHa": {"hada_w1_a"},
    "LoKr": {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"},
    "full difference": {"diff"},
    "LoRA": {"A", "B"},
}


# for each algorithm: what must be there, each in one of several forms
NEEDED: dict[str, tuple[tuple[set[str], ...], ...]] = {
    "LoRA": (({"A", "B"},),),
    "GLoRA": (({"a1.weight", "a2.weight", "b1.weight", "b2.weight"},),),
    "LoHa": (({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),),
    "LoKr": (({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})),
    "(IA)3": (({"weight", "on_input"},),),
}
