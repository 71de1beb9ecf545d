"""Take the keys of an adapter file apart, step by step: words of wrappers, ending, part of the model, path.

    unet._orig_mod.down_blocks.0.attentions.0.….to_q.lora_A.default_0.weight
    part   wrapper  path                              ending  adapter's name

1. Words that torch.compile, data parallelism and PEFT put into names are removed.
2. The ending says which algorithm (LoRA, LoHa, …) the tensor belongs to, and which factor of it the tensor is.
3. The beginning says which part of the model the module is in, and which program's spelling this is.
4. The rest is the module's path, in diffusers' names or in those of the original code; it becomes diffusers'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from personalize.formats.lora_keys import COMPONENTS, KOHYA_PREFIXES, diffusers_name, module_name, with_text_model

TOKEN = re.compile(r"<[^<>\s]+>")  # a learned token: in a prompt, and the key of its rows in diffusers' form
LORA_ENDINGS = {
    ".lora_A.weight": "A", ".lora.down.weight": "A", ".lora_linear_layer.down.weight": "A", ".lora_down.weight": "A",
    ".lora_B.weight": "B", ".lora.up.weight": "B", ".lora_linear_layer.up.weight": "B", ".lora_up.weight": "B",
    "_lora.down.weight": "A", "_lora.up.weight": "B", ".alpha": "alpha", ".lora_mid.weight": "mid",
}  # fmt: skip
"""Key endings of LoRA, and of LoCon with a Tucker core (`lora_mid`), with the factor that each stands for."""

OTHER_ENDINGS = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "DoRA": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "OFT or BOFT": ("oft_blocks", "oft_diag", "oft_R.weight", "rescale"),
    "full difference": ("diff", "w_norm", "set_weight", "reshape_weight"),
    "bias difference": ("diff_b", "b_norm", "lora_B.bias"),
    "(IA)3": ("on_input", "weight"),
    "Custom Diffusion": (),
}
"""Key endings of every other algorithm that is recognised, without the dot before them."""

ENDINGS = {ending: ("LoRA", role) for ending, role in LORA_ENDINGS.items()}
ENDINGS |= {f".{ending}": (algorithm, ending) for algorithm, endings in OTHER_ENDINGS.items() for ending in endings}
LONGEST_ENDING_FIRST = sorted(ENDINGS, key=len, reverse=True)

WRAPPER_WORDS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module", "base_layer")
BASE_PREFIXES = re.compile(r"(?:(?<=\.)|^)(?:base_model\.model\.)+")
ADAPTER_NAME = re.compile(
    r"(\.(?:lora_A|lora_B|lora_down|lora_up|lora_mid|lora_magnitude_vector|hada_[wt]\w+|lokr_[wt]\w+))"
    r"\.((?!weight$|bias$)[^.]+)"
    r"(?=\.weight$|\.bias$|$)"
)
CUSTOM_DIFFUSION = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_custom_diffusion(?:\.0)?\.(weight|bias)")

DOTTED_PREFIXES = {  # by the start of a key: the part of the model, and whose spelling it is
    "model.diffusion_model.": ("unet", "ComfyUI"),
    "diffusion_model.": ("unet", "ComfyUI"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "ComfyUI"),
    "text_encoders.clip_h.transformer.": ("text_encoder", "ComfyUI"),  # SD 2.x has OpenCLIP ViT-H alone
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "ComfyUI"),
    "clip_l.": ("text_encoder", "OneTrainer"),
    "clip_h.": ("text_encoder", "OneTrainer"),
    "clip_g.": ("text_encoder_2", "OneTrainer"),
}
UNET_STARTS = (
    "down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.",
    "input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.",
)  # fmt: skip
ORIGINAL_STARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
TEXT_STARTS = ("text_model.", "encoder.layers.", "text_projection")
OLD_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # old diffusers


@dataclass(frozen=True)
class KeyParts:
    """What a key says: the module by its canonical name, the algorithm, the factor, the spelling.

    `stem` is what names the module in the key, as it is written there; `wrappers` are the words that were removed.
    """

    module: str
    algorithm: str
    role: str
    scheme: str
    stem: str
    wrappers: tuple[str, ...] = ()


def take_apart(key: str) -> KeyParts | None:
    """The parts of a key; None if its ending or its part of the model is unknown."""
    bare, wrappers = without_wrappers(key)
    custom = CUSTOM_DIFFUSION.fullmatch(bare)
    split = (f"{custom[1]}.{custom[2]}", "Custom Diffusion", custom[3]) if custom else split_ending(bare)
    if split is None:
        return None
    stem, algorithm, role = split
    found = _module_and_scheme(stem, bare)
    if found is None:
        return None
    scheme = "PEFT folder" if BASE_PREFIXES.search(key) else found[1]
    return KeyParts(found[0], algorithm, role, scheme, stem, wrappers)


def without_wrappers(key: str) -> tuple[str, tuple[str, ...]]:
    """The key without words of wrappers and without the name of PEFT's adapter, and the words that were removed."""
    words: list[str] = []
    if (match := ADAPTER_NAME.search(key)) is not None:
        words.append(match[2])
        key = ADAPTER_NAME.sub(r"\1", key)
    parts = BASE_PREFIXES.sub("", key).split(".")
    words += [part for part in parts if part in WRAPPER_WORDS]
    key = ".".join(part for part in parts if part not in WRAPPER_WORDS)
    if "__orig_mod_" in key:  # flattened by sd-scripts: lora_unet__orig_mod_down_blocks_…
        words, key = [*words, "_orig_mod"], key.replace("__orig_mod_", "_")
    return key, tuple(words)


def split_ending(key: str) -> tuple[str, str, str] | None:
    """Stem, algorithm and role of a key; None if its ending is unknown."""
    for ending in LONGEST_ENDING_FIRST:
        if key.endswith(ending) and len(key) > len(ending):
            algorithm, role = ENDINGS[ending]
            stem = key.removesuffix(ending)
            # A bare ".weight" is (IA)3 only after a stem of kohya's or LyCORIS's; any model's weights end so too.
            foreign = ending == ".weight" and ("." in stem or not stem.startswith(("lora_", "lycoris_")))
            return None if foreign else (stem, algorithm, role)
    return None


def _module_and_scheme(stem: str, key: str) -> tuple[str, str] | None:
    """The canonical name of the module that a stem names, and the naming scheme of its key."""
    if stem.startswith("lycoris_"):
        return module_name("lora_unet_" + stem.removeprefix("lycoris_")), "kohya"
    if any(stem.startswith(f"{prefix}_") for prefix in KOHYA_PREFIXES):
        return module_name(stem), "kohya"
    for prefix, (component, scheme) in DOTTED_PREFIXES.items():
        if stem.startswith(prefix):
            return _canonical(component, stem.removeprefix(prefix)), scheme
    component, _, path = stem.partition(".")
    scheme = "old diffusers" if ".processor." in stem or "_lora." in key else "diffusers"
    scheme = "PEFT" if ".lora_A." in key or ".lora_B." in key or ".lora_magnitude" in key else scheme
    if component == "unet" and path.startswith(ORIGINAL_STARTS):
        scheme = "OneTrainer"
    if component not in COMPONENTS:
        scheme, path = "no prefix", stem
        component = "unet" if path.startswith(UNET_STARTS) else "text_encoder" if path.startswith(TEXT_STARTS) else ""
    return (_canonical(component, path), scheme) if component and path else None


def _canonical(component: str, path: str) -> str:
    """The canonical module name for a path in any spelling with dots."""
    path = path.replace(".processor.", ".")
    if path.endswith(".to_out") and component == "unet":
        path = f"{path}.0"
    if component == "unet":
        return f"unet.{diffusers_name(path)}"
    parent, _, name = path.rpartition(".")
    return with_text_model(component, f"{parent}.{OLD_TEXT_PROJECTIONS.get(name, name)}".removeprefix("."))
