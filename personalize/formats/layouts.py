"""Recognise adapter files: which layout a set of named tensors has, and which module and factor each tensor belongs to.

Every program names the tensors of a LoRA differently.  A key is split into a stem, which says which module it belongs
to, and an ending, which says which algorithm (LoRA, LoHa, …) and which factor of it.  Stems are translated into
canonical module names (see `lora_names`).  The naming scheme each stem was written in is recorded too, because every
program reads only some of the schemes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from personalize.errors import UserError
from personalize.formats.lora_keys import COMPONENTS, KOHYA_PREFIXES, diffusers_name, module_name, with_text_model

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
    "OFT or BOFT": ("oft_blocks", "oft_diag", "oft_R.weight"),
    "full difference": ("diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight"),
    "(IA)3": ("on_input", "weight"),
    "Custom Diffusion": (),
}
"""Key endings of every other algorithm that is recognised, without the dot before them."""

ENDINGS = {ending: ("LoRA", role) for ending, role in LORA_ENDINGS.items()}
ENDINGS |= {f".{ending}": (algorithm, ending) for algorithm, endings in OTHER_ENDINGS.items() for ending in endings}
LONGEST_ENDING_FIRST = sorted(ENDINGS, key=len, reverse=True)
CUSTOM_DIFFUSION = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_custom_diffusion(?:\.0)?\.(weight|bias)")
CLONEOFSIMO = re.compile(r"(unet|text_encoder):\d+:(up|down)")
UNET_PREFIXES = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
TEXT_PREFIXES = ("text_model.", "encoder.layers.")
COMFYUI_TEXT_PREFIXES = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
OLD_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # old diffusers
TEXT_WIDTHS = (768, 1024, 1280)
MAX_KEY_LENGTH = 500  # characters; no module's name comes near
FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by d, the width of the text that the cross-attention reads


@dataclass(frozen=True)
class FileContents:
    """The tensors of an adapter file, sorted by module and factor."""

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """For each module, by its canonical name: its tensors by role ("A", "B", "alpha", "mid", "hada_w1_a", …)."""
    algorithms: dict[str, set[str]] = field(default_factory=dict)
    """For each module: "LoRA", "DoRA", "LoHa", …"""
    key_stems: dict[str, str] = field(default_factory=dict)
    """For each module: the part of its keys that names the module, as it is written in the file."""
    module_schemes: dict[str, str] = field(default_factory=dict)
    """For each module: the naming scheme of its keys."""
    naming_schemes: Counter[str] = field(default_factory=Counter)
    """Number of tensors in each naming scheme: "PEFT", "diffusers", "old diffusers", "kohya", "ComfyUI",
    "PEFT folder", "no prefix"."""
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    """Learned token vectors, by the key that holds them."""
    file_kind: str = ""
    """What the file is if it is not just a LoRA: the form of a textual inversion, "bundle", "checkpoint", …"""
    unknown_keys: list[str] = field(default_factory=list)
    """Keys that are not recognised."""
    duplicate_keys: list[str] = field(default_factory=list)
    """Keys of a factor that another key has given already."""

    @property
    def algorithm_counts(self) -> Counter[str]:
        """Number of modules that use each algorithm."""
        return Counter(name for names in self.algorithms.values() for name in names)


def classify_tensors(tensors: Mapping[str, Tensor]) -> FileContents:
    """Sort the tensors of a file by module and factor; raises nothing, whatever the keys are."""
    kind = _kind_without_modules(tensors)
    if kind.startswith("textual inversion"):
        return FileContents(embeddings=dict(tensors), file_kind=kind)
    if kind:
        return FileContents(file_kind=kind, unknown_keys=sorted(tensors))
    contents = FileContents(file_kind="bundle" if any(key.startswith("bundle_emb.") for key in tensors) else "")
    for key in sorted(tensors):
        if key.startswith("bundle_emb."):
            contents.embeddings[key] = tensors[key]
        else:
            _add_tensor(key, tensors[key], contents)
    return contents


def _kind_without_modules(tensors: Mapping[str, Tensor]) -> str:
    """The kind of a file that is not keyed by modules: a textual inversion, a checkpoint, …; "" if it may be a LoRA."""
    keys = set(tensors)
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for key in keys):
        return "checkpoint"
    if any(CLONEOFSIMO.fullmatch(key) for key in keys):
        return "flat list of cloneofsimo/lora"
    if keys and keys <= {"embeds", "pooled"}:
        return "source embedding of personalize"
    if not keys or any(_split_key(key) or CUSTOM_DIFFUSION.fullmatch(key) for key in keys):
        return ""
    return _textual_inversion_form(tensors)


def _textual_inversion_form(tensors: Mapping[str, Tensor]) -> str:
    """Which program's form of textual inversion the tensors have; "" if they have none."""
    keys = set(tensors)
    forms = {
        "A1111": {"emb_params"}, "SDXL": {"clip_l", "clip_g"}, "OneTrainer": {"emp_params", "emp_params_out"},
        "cog-sdxl": {"text_encoders_0", "text_encoders_1"},
    }  # fmt: skip
    for name, known in forms.items():
        if keys <= known:
            return f"textual inversion, {name} form"
    if all(key.startswith("string_to_param.") for key in keys):
        return "textual inversion, A1111 pickle"
    if all(
        t.ndim in (1, 2) and t.shape[-1] in TEXT_WIDTHS and t.numel() <= 256 * t.shape[-1] for t in tensors.values()
    ):
        return "textual inversion, diffusers form"
    return ""


def _split_key(key: str) -> tuple[str, str, str] | None:
    """Stem, algorithm and role of a key; None if its ending is unknown."""
    for ending in LONGEST_ENDING_FIRST:
        if key.endswith(ending) and len(key) > len(ending):
            algorithm, role = ENDINGS[ending]
            stem = key.removesuffix(ending)
            # A bare ".weight" is (IA)3 only after a stem of kohya's or LyCORIS's; any model's weights end so too.
            foreign = ending == ".weight" and ("." in stem or not stem.startswith(("lora_", "lycoris_")))
            return None if foreign else (stem, algorithm, role)
    return None


def _add_tensor(key: str, tensor: Tensor, contents: FileContents) -> None:
    """Put one tensor into `contents`, or its key among the unknown or duplicate keys."""
    if len(key) > MAX_KEY_LENGTH:
        contents.unknown_keys.append(key)
        return
    custom = CUSTOM_DIFFUSION.fullmatch(key)
    split = (f"{custom[1]}.{custom[2]}", "Custom Diffusion", custom[3]) if custom else _split_key(key)
    module_and_scheme = split and _module_and_scheme(split[0], key)
    if not split or not module_and_scheme:
        contents.unknown_keys.append(key)
        return
    (stem, algorithm, role), (module, scheme) = split, module_and_scheme
    parts = contents.modules.setdefault(module, {})
    if role in parts:
        contents.duplicate_keys.append(key)
        return
    parts[role] = tensor
    contents.key_stems.setdefault(module, stem)
    contents.module_schemes.setdefault(module, scheme)
    contents.naming_schemes[scheme] += 1
    algorithms = contents.algorithms.setdefault(module, set())
    if role != "alpha":
        algorithms.add("Tucker LoCon" if role == "mid" else algorithm)


def _module_and_scheme(stem: str, key: str) -> tuple[str, str] | None:
    """The canonical name of the module that a key belongs to, and the naming scheme of the key."""
    if stem.startswith("lycoris_"):
        return module_name("lora_unet_" + stem.removeprefix("lycoris_")), "kohya"
    if any(stem.startswith(f"{prefix}_") for prefix in KOHYA_PREFIXES):
        return module_name(stem), "kohya"
    for prefix, component in COMFYUI_TEXT_PREFIXES.items():
        if stem.startswith(prefix):
            return with_text_model(component, stem.removeprefix(prefix)), "ComfyUI"
    if stem.startswith("diffusion_model."):
        return f"unet.{diffusers_name(stem.removeprefix('diffusion_model.'))}", "ComfyUI"
    component, _, path = stem.partition(".")
    scheme = "old diffusers" if ".processor." in stem or "_lora." in key else "diffusers"
    scheme = "PEFT" if ".lora_A." in key or ".lora_B." in key or ".lora_magnitude" in key else scheme
    if component not in COMPONENTS:
        scheme = "PEFT folder" if stem.startswith("base_model.model.") else "no prefix"
        path = stem.removeprefix("base_model.model.")
        component = (
            "unet" if path.startswith(UNET_PREFIXES) else "text_encoder" if path.startswith(TEXT_PREFIXES) else ""
        )
    if not component or not path:
        return None
    return with_text_model(component, _current_path(component, path.removeprefix("base_model.model."))), scheme


def _current_path(component: str, path: str) -> str:
    """The module path in today's diffusers for a path through the attention processors of old diffusers."""
    path = path.replace(".processor.", ".")
    if component == "unet":
        return f"{path}.0" if path.endswith(".to_out") else path
    parent, _, name = path.rpartition(".")
    return f"{parent}.{OLD_TEXT_PROJECTIONS.get(name, name)}"


def detect_family(contents: FileContents, metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """The model family of an adapter ("sd1", "sd2", "sdxl"; None if it cannot be known), and the evidence for it.

    The evidence, in order: the text width of the cross-attention, modules that only SDXL has, the metadata, the widths
    of learned tokens, several transformer blocks in a row (SDXL), the width of the text encoder, and whether the
    attention's projections are convolutions (SD 1.x) or linear layers (SD 2.x).
    """
    widths = _text_widths(contents)
    known = {FAMILY_OF_WIDTH[width] for width in widths if width in FAMILY_OF_WIDTH}
    if len(known) == 1:
        return known.pop(), f"the cross-attention reads text of width {min(widths)}"
    if any(module.startswith(("text_encoder_2.", "unet.add_embedding.")) for module in contents.modules):
        return "sdxl", "it has modules that only SDXL has"
    if stated := family_from_metadata(metadata):
        return stated, "its metadata say so"
    if contents.embeddings:
        return _family_of_embeddings(contents.embeddings)
    if any(re.search(r"transformer_blocks\.[1-9]", module) for module in contents.modules):
        return "sdxl", "several transformer blocks in a row"
    shapes = [p["A"].shape for m, p in contents.modules.items() if m.endswith(".q_proj") and "A" in p]
    width = next((shape[-1] for shape in shapes if shape), 0)
    if width in FAMILY_OF_WIDTH and not widths:
        return FAMILY_OF_WIDTH[width], f"the text encoder has width {width}"
    dimensions = {
        p["A"].ndim for m, p in contents.modules.items() if m.endswith((".proj_in", ".proj_out")) and "A" in p
    }
    if len(dimensions) == 1:
        return ("sd1" if dimensions == {4} else "sd2"), "the kind of its projections, though its widths are unusual"
    return ("sd1", "its names alone: widths are unusual") if widths else (None, "nothing in it shows the family")


def _text_widths(contents: FileContents) -> set[int]:
    """The input widths d of the LoRA matrices A on the key and value projections of cross-attention."""
    return {
        parts["A"].shape[1]
        for module, parts in contents.modules.items()
        if module.startswith("unet.") and module.endswith((".attn2.to_k", ".attn2.to_v"))
        if "A" in parts and parts["A"].ndim > 1
    }


def family_from_metadata(metadata: Mapping[str, str]) -> str | None:
    """The model family that metadata of kohya's tools (`ss_*`) or of ModelSpec state; None if they state none."""
    text = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    markers = {
        "sdxl": ("sdxl_", "stable-diffusion-xl"),
        "sd2": ("sd_v2", "diffusion-v2"),
        "sd1": ("sd_v1", "diffusion-v1"),
    }
    return next((family for family, words in markers.items() if any(word in text for word in words)), None)


def _family_of_embeddings(embeddings: Mapping[str, Tensor]) -> tuple[str | None, str]:
    """The model family by the widths of learned token vectors, and the evidence for it."""
    widths = {tensor.shape[-1] for tensor in embeddings.values() if tensor.ndim}
    if 1280 in widths or any("clip_g" in key for key in embeddings):
        return "sdxl", "its vectors have the second encoder's width"
    width = min(widths, default=0)
    return FAMILY_OF_WIDTH.get(width), f"its vectors have width {width}"


def peft_settings(metadata: Mapping[str, str], path: object) -> dict[str, Any]:
    """PEFT's settings, which diffusers stores as JSON under `lora_adapter_metadata`; UserError if it is no object."""
    try:
        values = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its lora_adapter_metadata is no JSON ({error}): get the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: its lora_adapter_metadata holds a {type(values).__name__}, an object was expected")
    return values


def scaling(module: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """The factor alpha / r (alpha / √r with rsLoRA) by which a module's B A is multiplied.

    alpha is taken from the module's own tensor, else from the PEFT `settings` (`alpha_pattern`, then `lora_alpha`),
    else it equals r.

    Raises:
        UserError: an alpha that is no positive number, or an alpha_pattern that is no JSON object.
    """
    component, path = module.split(".", 1)
    rank = parts["A"].shape[0]
    patterns = settings.get(f"{component}.alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"the file's alpha_pattern is {patterns!r:.80}: an object was expected")
    matching = [value for key, value in patterns.items() if f".{path}".endswith(f".{key.removeprefix('^')}")]
    alpha = parts["alpha"].item() if "alpha" in parts and parts["alpha"].numel() == 1 else 0
    alpha = alpha or (matching[0] if matching else settings.get(f"{component}.lora_alpha", rank))
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise UserError(f"module {module} has alpha {alpha!r}: a positive number was expected")
    return alpha / (rank**0.5 if settings.get(f"{component}.use_rslora") else rank)
