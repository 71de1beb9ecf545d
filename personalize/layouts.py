"""Layouts: what kind of adapter file a set of named tensors is, and which module and role each tensor has in it.

Every program has its own spelling.  A key is cut into a stem (which module), and an ending (which algorithm, and which
factor of it); stems become the house's module names, whatever the spelling, and spellings are remembered, since the
other programs know only some of them.
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
from personalize.lora_names import COMPONENTS, KOHYA_PREFIXES, diffusers_name, module_name, with_text_model

PLAIN = {
    ".lora_A.weight": "A", ".lora.down.weight": "A", ".lora_linear_layer.down.weight": "A", ".lora_down.weight": "A",
    ".lora_B.weight": "B", ".lora.up.weight": "B", ".lora_linear_layer.up.weight": "B", ".lora_up.weight": "B",
    "_lora.down.weight": "A", "_lora.up.weight": "B", ".alpha": "alpha", ".lora_mid.weight": "mid",
}  # fmt: skip
"""Endings of plain LoRA (and of LoCon's Tucker form, `lora_mid`), and the factor of each."""

OTHERS = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "DoRA": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "OFT or BOFT": ("oft_blocks", "oft_diag", "oft_R.weight"),
    "full difference": ("diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight"),
    "(IA)3": ("on_input", "weight"),
    "Custom Diffusion": (),
}
ENDINGS = {ending: ("LoRA", role) for ending, role in PLAIN.items()}
ENDINGS |= {f".{ending}": (kind, ending) for kind, endings in OTHERS.items() for ending in endings}
LONGEST_FIRST = sorted(ENDINGS, key=len, reverse=True)
CUSTOM = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_custom_diffusion(?:\.0)?\.(weight|bias)")
FLAT_LIST = re.compile(r"(unet|text_encoder):\d+:(up|down)")
UNET_STARTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
TEXT_STARTS = ("text_model.", "encoder.layers.")
COMFYUI_TEXT = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
TEXT_WORDS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of old diffusers
TEXT_WIDTHS = (768, 1024, 1280)
MAX_KEY = 500  # characters; no module's name comes near
FAMILY_OF_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of the cross-attention's input


@dataclass(frozen=True)
class Contents:
    """The tensors of a file, sorted out."""

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By module in the house's names: factors by role."""
    algorithms: dict[str, set[str]] = field(default_factory=dict)
    """By module: "LoRA", "DoRA", "LoHa", …"""
    stems: dict[str, str] = field(default_factory=dict)
    """By module: how the file spells it."""
    styles: dict[str, str] = field(default_factory=dict)
    """By module: the spelling of its name."""
    spellings: Counter[str] = field(default_factory=Counter)
    """Tensors by spelling: "PEFT", "diffusers", "old diffusers", "kohya", "ComfyUI", "PEFT folder", "no prefix"."""
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    """Vectors of tokens, by the key that holds them."""
    form: str = ""
    """Which form of embedding, bundle, or whole file; empty for a LoRA."""
    unknown: list[str] = field(default_factory=list)
    """Keys that belong to nothing known."""
    doubled: list[str] = field(default_factory=list)
    """Keys that say again what another key has said."""

    @property
    def kinds(self) -> Counter[str]:
        """Modules by algorithm."""
        return Counter(kind for kinds in self.algorithms.values() for kind in kinds)


def contents(tensors: Mapping[str, Tensor]) -> Contents:
    """Sort out the tensors of a file; never raises, whatever the keys are."""
    form = whole_file(tensors)
    if form:
        words = form.startswith("textual inversion")
        return Contents(embeddings=dict(tensors) if words else {}, form=form, unknown=[] if words else sorted(tensors))
    found = Contents(form="bundle" if any(key.startswith("bundle_emb.") for key in tensors) else "")
    for key in sorted(tensors):
        if key.startswith("bundle_emb."):
            found.embeddings[key] = tensors[key]
        else:
            _sort_in(key, tensors[key], found)
    return found


def whole_file(tensors: Mapping[str, Tensor]) -> str:
    """The form of a file that is no set of modules: an embedding, a checkpoint, another trainer's private layout."""
    keys = set(tensors)
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for key in keys):
        return "checkpoint"
    if any(FLAT_LIST.fullmatch(key) for key in keys):
        return "flat list of cloneofsimo/lora"
    if keys and keys <= {"embeds", "pooled"}:
        return "source embedding of personalize"
    if not keys or any(_cut(key) or CUSTOM.fullmatch(key) for key in keys):
        return ""
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


def _cut(key: str) -> tuple[str, str, str] | None:
    """Stem, algorithm and role of a key; None if its ending is unknown."""
    for ending in LONGEST_FIRST:
        if key.endswith(ending) and len(key) > len(ending):
            kind, role = ENDINGS[ending]
            stem = key.removesuffix(ending)
            foreign = ending == ".weight" and ("." in stem or not stem.startswith(("lora_", "lycoris_")))
            return None if foreign else (stem, kind, role)
    return None


def _sort_in(key: str, tensor: Tensor, found: Contents) -> None:
    if len(key) > MAX_KEY:
        found.unknown.append(key)
        return
    custom = CUSTOM.fullmatch(key)
    cut = (f"{custom[1]}.{custom[2]}", "Custom Diffusion", custom[3]) if custom else _cut(key)
    named = cut and _module(cut[0], key)
    if not cut or not named:
        found.unknown.append(key)
        return
    module, spelling = named
    parts = found.modules.setdefault(module, {})
    if cut[2] in parts:
        found.doubled.append(key)
        return
    parts[cut[2]] = tensor
    found.stems.setdefault(module, cut[0])
    found.styles.setdefault(module, spelling)
    found.spellings[spelling] += 1
    kinds = found.algorithms.setdefault(module, set())
    if cut[2] != "alpha":
        kinds.add("Tucker LoCon" if cut[2] == "mid" else cut[1])


def _module(stem: str, key: str) -> tuple[str, str] | None:
    """The house's name of a module and the spelling it was found in."""
    if stem.startswith("lycoris_"):
        return module_name("lora_unet_" + stem.removeprefix("lycoris_")), "kohya"
    if any(stem.startswith(f"{prefix}_") for prefix in KOHYA_PREFIXES):
        return module_name(stem), "kohya"
    for prefix, component in COMFYUI_TEXT.items():
        if stem.startswith(prefix):
            return with_text_model(component, stem.removeprefix(prefix)), "ComfyUI"
    if stem.startswith("diffusion_model."):
        return f"unet.{diffusers_name(stem.removeprefix('diffusion_model.'))}", "ComfyUI"
    component, _, path = stem.partition(".")
    spelling = "old diffusers" if ".processor." in stem or "_lora." in key else "diffusers"
    spelling = "PEFT" if ".lora_A." in key or ".lora_B." in key or ".lora_magnitude" in key else spelling
    if component not in COMPONENTS:
        spelling = "PEFT folder" if stem.startswith("base_model.model.") else "no prefix"
        path = stem.removeprefix("base_model.model.")
        component = "unet" if path.startswith(UNET_STARTS) else "text_encoder" if path.startswith(TEXT_STARTS) else ""
    if not component or not path:
        return None
    return with_text_model(component, _modern(component, path.removeprefix("base_model.model."))), spelling


def _modern(component: str, path: str) -> str:
    """Today's path for one that goes through diffusers' old attention processors."""
    path = path.replace(".processor.", ".")
    if component == "unet":
        return f"{path}.0" if path.endswith(".to_out") else path
    head, _, last = path.rpartition(".")
    return f"{head}.{TEXT_WORDS.get(last, last)}"


def family(found: Contents, metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """ "sd1", "sd2" or "sdxl", and by what it is known; None if nothing tells."""
    widths = {p["A"].shape[1] for m, p in found.modules.items() if _reads_text(m) and "A" in p and p["A"].ndim > 1}
    known = {FAMILY_OF_WIDTH[width] for width in widths if width in FAMILY_OF_WIDTH}
    if len(known) == 1:
        return known.pop(), f"the cross-attention reads text of width {min(widths)}"
    if any(module.startswith(("text_encoder_2.", "unet.add_embedding.")) for module in found.modules):
        return "sdxl", "it has modules that only SDXL has"
    if told := told_family(metadata):
        return told, "its metadata say so"
    if found.embeddings:
        return _of_embedding(found.embeddings)
    if any(re.search(r"transformer_blocks\.[1-9]", module) for module in found.modules):
        return "sdxl", "several transformer blocks in a row"
    sides = [p["A"].shape for m, p in found.modules.items() if m.endswith(".q_proj") and "A" in p]
    width = next((side[-1] for side in sides if side), 0)
    if width in FAMILY_OF_WIDTH and not widths:
        return FAMILY_OF_WIDTH[width], f"the text encoder has width {width}"
    shapes = {p["A"].ndim for m, p in found.modules.items() if m.endswith((".proj_in", ".proj_out")) and "A" in p}
    if len(shapes) == 1:
        return ("sd1" if shapes == {4} else "sd2"), "the kind of its projections, though its widths are unusual"
    return ("sd1", "its names alone: widths are unusual") if widths else (None, "nothing tells")


def _reads_text(module: str) -> bool:
    return module.startswith("unet.") and module.endswith((".attn2.to_k", ".attn2.to_v"))


def told_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the metadata of kohya's tools and of ModelSpec name, if any."""
    text = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    marks = {
        "sdxl": ("sdxl_", "stable-diffusion-xl"),
        "sd2": ("sd_v2", "diffusion-v2"),
        "sd1": ("sd_v1", "diffusion-v1"),
    }
    return next((name for name, words in marks.items() if any(word in text for word in words)), None)


def _of_embedding(embeddings: Mapping[str, Tensor]) -> tuple[str | None, str]:
    widths = {tensor.shape[-1] for tensor in embeddings.values() if tensor.ndim}
    if 1280 in widths or any("clip_g" in key for key in embeddings):
        return "sdxl", "its vectors have the second encoder's width"
    width = min(widths, default=0)
    return FAMILY_OF_WIDTH.get(width), f"its vectors have width {width}"


def settings(metadata: Mapping[str, str], path: object) -> dict[str, Any]:
    """diffusers' `lora_adapter_metadata`, parsed; UserError if it is no JSON object."""
    try:
        values = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its lora_adapter_metadata is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: its lora_adapter_metadata holds a {type(values).__name__}, an object was expected")
    return values


def strength(module: str, parts: Mapping[str, Tensor], told: Mapping[str, Any]) -> float:
    """alpha / r of a module, from its alpha tensor or from diffusers' metadata `told`; 1 where neither speaks.

    Raises:
        UserError: an alpha that is no positive number.
    """
    component, path = module.split(".", 1)
    rank = parts["A"].shape[0]
    patterns = told.get(f"{component}.alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"the file's alpha_pattern is {patterns!r:.80}: an object was expected")
    own = [value for key, value in patterns.items() if f".{path}".endswith(f".{key.removeprefix('^')}")]
    alpha = parts["alpha"].item() if "alpha" in parts and parts["alpha"].numel() == 1 else 0
    alpha = alpha or (own[0] if own else told.get(f"{component}.lora_alpha", rank))
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise UserError(f"module {module} has alpha {alpha!r}: a positive number was expected")
    return alpha / (rank**0.5 if told.get(f"{component}.use_rslora") else rank)
