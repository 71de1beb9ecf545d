"""What diffusers and ComfyUI make of a LoRA file for a diffusion transformer, layer by layer.

diffusers is asked: its own converter runs on the file's tensors, and every ΔW that comes out is compared.  For ComfyUI
the naming schemes are listed that its key map knows (`comfy/lora.py`, read in 2026); a test compares with a checkout.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.compatibility import NO, PARTLY, YES
from personalize.formats.diffusion_transformers.factors import Pair
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.reading import SortedFile, TransformerLora
from personalize.formats.diffusion_transformers.skeletons import layer_names
from personalize.formats.peft_settings import scaling, settings_of
from personalize.io.tensor_files import TensorFile
from personalize.models.quiet import quiet_loading

PROBES = 4
CLOSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest |ΔW X − ΔW' X| / max |ΔW X| by the file's dtype: diffusers multiplies alpha into A in that dtype."""
SPLIT = {"diffusers", "LyCORIS", "OneTrainer", "no prefix"}
COMFYUI = {  # the naming schemes that ComfyUI's key map has for each family, besides its own and kohya's
    "flux1": SPLIT, "flux2": SPLIT, "chroma": SPLIT, "sd3": {"diffusers", "LyCORIS", "OneTrainer", "PEFT folder"},
    "z-image": {"diffusers", "LyCORIS", "no prefix", "ai-toolkit"}, "qwen-image": {"diffusers", "LyCORIS", "no prefix"},
    "krea2": {"diffusers", "LyCORIS", "no prefix", "ai-toolkit"}, "anima": set(),
}  # fmt: skip
COMFYUI_LACKS = re.compile(  # layers that it does not know by diffusers' names
    r"time_guidance_embed|stream_modulation|distilled_guidance_layer|SelfAttention|DenseReluDense"
)


@dataclass(frozen=True)
class Reading:
    """How a program reads a file: the layers that it drops, those with another ΔW, or why it refuses the file."""

    dropped: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    refused: str = ""

    @property
    def verdict(self) -> tuple[str, str]:
        """ "yes", "partly" or "no", and the reason."""
        if self.refused:
            return NO, f"refuses it: {self.refused}"
        parts = [f"drops {len(self.dropped)} layer(s), first {self.dropped[0]}"] if self.dropped else []
        parts += [f"applies {len(self.wrong)} wrongly, first {self.wrong[0]}"] if self.wrong else []
        return (PARTLY if parts else YES), "; ".join(parts)


def through_diffusers(content: TensorFile, lora: TransformerLora) -> Reading:
    """The layers that diffusers' converter drops or changes, compared with the LoRA that the file holds.

    Both changes are applied to the same random inputs, for their products would fill the memory.
    """
    try:
        found = _converted(content, lora.family)
    except UserError as error:
        return Reading(refused=str(error))
    dtype = next((tensor.dtype for tensor in content.tensors.values() if tensor.ndim), torch.float32)
    if not found.keys() & lora.pairs.keys():
        return Reading(refused="it finds none of its layers, and says nothing")
    close = CLOSE.get(dtype, CLOSE[torch.float32])
    dropped = sorted(name for name, (_, b) in lora.pairs.items() if name not in found and bool(b.any()))
    both = sorted(found.keys() & lora.pairs.keys())
    return Reading(tuple(dropped), tuple(n for n in both if deviation(found[n], lora.pairs[n]) > close))


@contextmanager
def _quiet() -> Iterator[None]:
    """Run the body without the messages of diffusers' converters, whose results are reported instead."""
    loggers = [logging.getLogger(f"diffusers.loaders.{name}") for name in ("lora_conversion_utils", "lora_pipeline")]
    with quiet_loading():
        for logger in loggers:
            logger.addFilter(_nothing)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


@_quiet()
def _converted(content: TensorFile, family: str) -> dict[str, Pair]:
    """What diffusers' converter makes of the file, by layer, with its strengths; names of no layer are left out.

    Raises:
        UserError: it raises, with its reason.
    """
    from diffusers.loaders import lora_pipeline

    loader = getattr(lora_pipeline, FAMILIES[family].loader)
    options = {"return_alphas": True} if family in ("flux1", "chroma") else {}
    try:
        out = loader.lora_state_dict(dict(content.tensors), **options)
    except Exception as error:  # its converters raise all kinds, from KeyError to NotImplementedError
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{type(error).__name__}: {reason}") from error
    tensors, alphas = (out[0], out[1] or {}) if isinstance(out, tuple) else (out, {})
    return _by_layer(tensors, alphas, content, family)


def _by_layer(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, Tensor], content: TensorFile, family: str
) -> dict[str, Pair]:
    """diffusers' tensors by layer: only names that start with a part of the model are loaded."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+?)(?:\.lora_([AB])|\.lora\.(down|up)|\.lora_linear_layer\.(down|up))\.weight", key)
        if match and (name := _layer_name(match[1], family)):
            side = match[2] or {"down": "A", "up": "B"}[match[3] or match[4]]
            sides.setdefault(name, {})[side] = tensor
            if f"{match[1]}.alpha" in alphas:
                sides[name]["alpha"] = alphas[f"{match[1]}.alpha"]
    settings = settings_of({"lora_adapter_metadata": content.metadata.get("lora_adapter_metadata", "{}")}, "the file")
    settings.pop("", None)  # a pipeline takes the settings with its parts' names alone
    return {name: (own["A"].float(), own["B"].float() * scaling(name, own, settings))
            for name, own in sides.items() if {"A", "B"} <= set(own)}  # fmt: skip


def _layer_name(name: str, family: str) -> str | None:
    """The layer that diffusers would put a LoRA on; None if there is none of this name."""
    part, _, path = name.partition(".")
    nested = f"{part}.text_model.{path}"
    return next((one for one in (name, nested) if one in layer_names(family)), None)


def deviation(one: Pair, other: Pair) -> float:
    """max |ΔW X − ΔW' X| / max |ΔW' X| for random X (in, PROBES); ∞ where the shapes differ."""
    (a, b), (a2, b2) = one, other
    if (len(b), a[0].numel()) != (len(b2), a2[0].numel()):
        return float("inf")
    probes = torch.randn(a[0].numel(), PROBES, generator=torch.Generator().manual_seed(0)).double()
    first = b.double().flatten(1) @ (a.double().flatten(1) @ probes)
    second = b2.double().flatten(1) @ (a2.double().flatten(1) @ probes)
    return float((first - second).abs().max()) / (float(second.abs().max()) or 1.0)


def through_comfyui(file: SortedFile) -> Reading:
    """The layers whose names ComfyUI's key map does not have."""
    known = {"ComfyUI", "kohya"} | COMFYUI[file.family]
    odd = sorted(stem for stem, scheme in file.schemes.items() if scheme not in known
                 or (scheme in SPLIT and COMFYUI_LACKS.search(file.layer(stem).layers[0])))  # fmt: skip
    if odd and len(odd) == len(file.schemes):
        return Reading(refused=f"it knows no name like {odd[0][:100]!r} and changes nothing, with a warning for each")
    return Reading(dropped=tuple(odd))
