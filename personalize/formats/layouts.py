"""Recognise adapter files: which layout a set of named tensors has, and which module and factor each tensor belongs to.

Every program names the tensors of a LoRA differently; `key_parts` takes the names apart.  The naming scheme each key
was written in is recorded too, because every program reads only some of the schemes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from personalize.formats.key_parts import CUSTOM_DIFFUSION, TOKEN, split_ending, take_apart

CLONEOFSIMO = re.compile(r"(unet|text_encoder):\d+:(up|down)")
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
    """Number of tensors in each naming scheme: "PEFT", "diffusers", "old diffusers", "kohya", "ComfyUI", "OneTrainer",
    "PEFT folder", "no prefix"."""
    wrappers: Counter[str] = field(default_factory=Counter)
    """Number of keys that carry a word of a wrapper ("_orig_mod", "module", …) or the name of PEFT's adapter."""
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
        vectors = {key: tensor for key, tensor in tensors.items() if not key.startswith("string_to_token.")}
        return FileContents(embeddings=vectors, file_kind=kind)
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
    whole = any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for key in keys)
    if whole and not any(len(key) <= MAX_KEY_LENGTH and take_apart(key) for key in keys):
        return "checkpoint"
    if any(CLONEOFSIMO.fullmatch(key) for key in keys):
        return "flat list of cloneofsimo/lora"
    if keys and keys <= {"embeds", "pooled"}:
        return "source embedding of personalize"
    if not keys or any(split_ending(key) or CUSTOM_DIFFUSION.fullmatch(key) for key in keys):
        return ""
    return _textual_inversion_form(tensors)


def _textual_inversion_form(tensors: Mapping[str, Tensor]) -> str:
    """Which program's form of textual inversion the tensors have; "" if they have none."""
    keys = set(tensors)
    forms = {
        "A1111": {"emb_params"}, "SDXL": {"clip_l", "clip_g"}, "OneTrainer": {"emp_params", "emp_params_out"},
        "OneTrainer SDXL": {"clip_l", "clip_g", "clip_l_out", "clip_g_out"},
        "cog-sdxl": {"text_encoders_0", "text_encoders_1"},
    }  # fmt: skip
    for name, known in forms.items():
        if keys <= known:
            return f"textual inversion, {name} form"
    if all(key.startswith(("string_to_param.", "string_to_token.")) for key in keys):
        return "textual inversion, A1111 pickle"
    if all(
        tensor.ndim in (1, 2) and tensor.numel() <= 256 * tensor.shape[-1]
        and (tensor.shape[-1] in TEXT_WIDTHS or TOKEN.fullmatch(key)) for key, tensor in tensors.items()
    ):  # fmt: skip
        return "textual inversion, diffusers form"
    return ""


def _add_tensor(key: str, tensor: Tensor, contents: FileContents) -> None:
    """Put one tensor into `contents`, or its key among the unknown or duplicate keys."""
    found = take_apart(key) if len(key) <= MAX_KEY_LENGTH else None
    if found is None:
        contents.unknown_keys.append(key)
        return
    parts = contents.modules.setdefault(found.module, {})
    role = role_of(found.role, tensor)
    if role in parts:
        contents.duplicate_keys.append(key)
        return
    parts[role] = tensor
    contents.key_stems.setdefault(found.module, found.stem)
    contents.module_schemes.setdefault(found.module, found.scheme)
    contents.naming_schemes[found.scheme] += 1
    contents.wrappers.update(set(found.wrappers))
    algorithms = contents.algorithms.setdefault(found.module, set())
    if found.role != "alpha":
        algorithms.add("Tucker LoCon" if found.role == "mid" else found.algorithm)


def role_of(role: str, tensor: Tensor) -> str:
    """The role of a tensor: a difference of one dimension is a norm's, as ComfyUI extracts it, LyCORIS' `w_norm`."""
    return "w_norm" if role == "diff" and tensor.ndim == 1 else role


def detect_family(contents: FileContents, metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """The model family of an adapter ("sd1", "sd2", "sdxl"; None if it cannot be known), and the evidence for it.

    The evidence, in order: the text width of the cross-attention, modules that only SDXL has, the metadata, the widths
    of learned tokens, several transformer blocks in a row (SDXL), the width of the text encoder, and whether the
    attention's projections are convolutions (SD 1.x) or linear layers (SD 2.x).
    """
    if any("clip_h." in stem for stem in contents.key_stems.values()):
        return "sd2", "its text encoder is OpenCLIP ViT-H"
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
