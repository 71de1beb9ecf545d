"""Which algorithm a module's tensors belong to, by their roles, and which of them it cannot do without."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def algorithm_of(parts: Mapping[str, Tensor]) -> str:
    """The algorithm of a module that is no plain LoRA, by its tensors' roles."""
    roles = set(parts) - {"scale", "alpha"}
    for name, marks in MARKS.items():
        if roles & marks:
            return name
    return "bias difference"


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
    "DoRA": (({"A", "B"},),),
    "LoRA": (({"A", "B"},),),
    "GLoRA": (({"a1.weight", "a2.weight", "b1.weight", "b2.weight"},),),
    "LoHa": (({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),),
    "LoKr": (({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})),
    "(IA)3": (({"weight", "on_input"},),),
}
