"""Formats: one LoRA, the two files other programs read, and the way back.

Inside the house a LoRA is a dictionary in PEFT names, "<component>.<module path>.lora_A.weight" (r, in[, k, k]) and
"….lora_B.weight" (out, r[, 1, 1]), with one rank r and one alpha: ΔW = (alpha / r) · B A.  Components are `unet`,
`text_encoder`, `text_encoder_2`; paths inside a text encoder always start with `text_model.`, whatever the installed
transformers calls them.  diffusers reads `diffusers_file`; A1111, Forge, ComfyUI, InvokeAI and kohya's tools read
`kohya_file`.  Neither file serves both: diffusers refuses alpha keys beside its own metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize import layouts
from personalize.errors import UserError
from personalize.files import TensorFile, read_tensors, tensor_bytes
from personalize.layouts import FAMILY_OF_WIDTH
from personalize.lora_names import COMPONENTS, kohya_name, with_text_model


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read from a file: `state` in the house's names with one `rank` and one `alpha`."""

    state: dict[str, Tensor]
    rank: int
    alpha: float
    family: str | None
    layout: str
    metadata: dict[str, str] = field(default_factory=dict)


def pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The two factors (A, B) of every module, by "<component>.<path>", sorted; text encoders gain `text_model.`.

    Raises:
        UserError: a name of another style, half a pair, ranks that disagree, or a number that is not finite.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise UserError(f"{key[:120]!r} is no LoRA tensor in PEFT names: expected <component>.<path>.lora_A.weight")
        found.setdefault(with_text_model(match[1], match[2]), {})[match[3]] = tensor
    for module, pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].ndim < 2 or pair["B"].ndim < 2:
            raise UserError(f"module {module} has only {sorted(pair)} of its two LoRA matrices A and B")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"module {module}: A has rank {pair['A'].shape[0]}, B has rank {pair['B'].shape[1]}")
        if not all(bool(tensor.isfinite().all()) for tensor in pair.values()):
            raise UserError(f"module {module} holds a number that is not finite: the adapter is spoilt, train it again")
    return {module: (found[module]["A"], found[module]["B"]) for module in sorted(found)}


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """ "sd1", "sd2" or "sdxl" by the width of the text the cross-attention reads; None when no tensor tells."""
    if any(key.startswith(("text_encoder_2.", "unet.add_embedding.")) for key in state):
        return "sdxl"
    keys = (key for key in state if key.endswith(("attn2.to_k.lora_A.weight", "attn2.to_v.lora_A.weight")))
    return next((FAMILY_OF_WIDTH.get(state[key].shape[1]) for key in keys), None)


def diffusers_file(state: Mapping[str, Tensor], alpha: float, *, dtype: torch.dtype = torch.float32) -> bytes:
    """`pytorch_lora_weights.safetensors`: PEFT names throughout and the least metadata that reloads exactly.

    Only PEFT names: a file that mixes them with diffusers' own loses every attention module on loading, silently.
    Only r, lora_alpha and target_modules: a full dump of PEFT's settings makes an older PEFT refuse the file.
    """
    modules = pairs(state)
    tensors = {}
    for module, (down, up) in modules.items():
        tensors[f"{module}.lora_A.weight"] = _cast(down, dtype, module)
        tensors[f"{module}.lora_B.weight"] = _cast(up, dtype, module)
    settings: dict[str, Any] = {}
    one_rank(modules)
    for component in COMPONENTS:
        own = [module for module in modules if module.startswith(f"{component}.")]
        if own:
            settings[f"{component}.r"] = modules[own[0]][0].shape[0]
            settings[f"{component}.lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
            settings[f"{component}.target_modules"] = [_target(module) for module in own]
    return tensor_bytes(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)})


def kohya_file(
    state: Mapping[str, Tensor],
    alpha: float,
    *,
    family: str,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The twin for the graphical programs: kohya names, one alpha equal to the rank, the strength inside `lora_up`.

    SDXL modules carry the names of the original code base, which is all that most of those programs know.
    """
    modules = pairs(state)
    rank = one_rank(modules)
    tensors = {}
    for module, (down, up) in modules.items():
        name = kohya_name(module, family)
        tensors[f"{name}.lora_down.weight"] = _cast(down, dtype, module)
        tensors[f"{name}.lora_up.weight"] = _cast(up.double() * (alpha / rank), dtype, module)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    plain = tensor_bytes(tensors)
    digest = sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    header = {**(metadata or {}), "format": "pt", "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return tensor_bytes(tensors, header)


def kohya_metadata(*, title: str, family: str, rank: int, info: Mapping[str, Any]) -> dict[str, str]:
    """The strings by which graphical programs sort and show a LoRA (`ss_*` and `modelspec.*`).

    `info` may hold `base` (name, sha256, prediction_type), `caption`, `config` (the trainer's options) and `date`;
    without a date none is written, so that equal training gives equal files.
    """
    base, config, caption = info.get("base", {}), info.get("config", {}), str(info.get("caption", ""))
    velocity = base.get("prediction_type") == "v_prediction"
    version, architecture = {
        "sd1": ("sd_v1", "stable-diffusion-v1"),
        "sd2": ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    }[family]
    values = {
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": "{}",
        "ss_output_name": title,
        "ss_sd_model_name": base.get("name"),
        "ss_new_sd_model_hash": base.get("sha256"),
        "ss_num_train_images": 1,
        "ss_tag_frequency": json.dumps({"1_picture": {caption: 1}}) if caption else None,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.trigger_phrase": caption or None,
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "modelspec.date": info.get("date"),
    }
    for name in (
        "learning_rate",
        "lr_scheduler",
        "max_train_steps",
        "mixed_precision",
        "optimizer",
        "resolution",
        "seed",
    ):
        values[f"ss_{name}"] = config.get(name)
    values["ss_steps"], values["ss_unet_lr"] = config.get("max_train_steps"), config.get("learning_rate")
    values["modelspec.resolution"] = (
        f"{config['resolution']}x{config['resolution']}" if config.get("resolution") else None
    )
    return {key: str(value) for key, value in values.items() if value is not None}


def read_lora(path: str | Path, content: TensorFile | None = None) -> LoraFile:
    """Read a LoRA in any spelling, also mixed, into the house's names with one rank and alpha.

    Where alphas or ranks differ between modules, strengths are baked into B and narrower pairs are padded with zeros,
    which changes no ΔW.  Tucker convolutions (`lora_mid`) are folded into A, which is exact too.  `content` is what has
    already been read from `path`.

    Raises:
        UserError: no safetensors file, or one that holds something other than plain LoRA pairs.
    """
    content = read_tensors(path) if content is None else content
    found = layouts.contents(content.tensors)
    _require_plain(found, path)
    parts = {module: _folded(module, values) for module, values in found.modules.items()}
    modules = pairs({f"{m}.lora_{s}.weight": v[s].float() for m, v in parts.items() for s in "AB" if s in v})
    if not modules:
        raise UserError(f"{path} holds no LoRA tensors")
    told = layouts.settings(content.metadata, path)
    strength = {module: layouts.strength(module, found.modules[module], told) for module in modules}
    state, rank, alpha = _uniform(modules, strength)
    layout = "kohya" if found.spellings["kohya"] else "peft"
    return LoraFile(state, rank, alpha, layouts.family(found, content.metadata)[0], layout, content.metadata)


def _require_plain(found: layouts.Contents, path: str | Path) -> None:
    """UserError, naming what it is, unless a file holds plain LoRA pairs and nothing else."""
    others = {kind: count for kind, count in found.kinds.items() if kind not in ("LoRA", "Tucker LoCon")}
    if others:
        told = ", ".join(f"{count} module(s) of {kind}" for kind, count in sorted(others.items()))
        raise UserError(f"{path} is no plain LoRA: it holds {told}, which are recognised but not converted")
    if found.form:
        raise UserError(f"{path} is no plain LoRA: it is a {found.form}; `personalize inspect` says more")
    if found.unknown:
        raise UserError(f"{path}: {found.unknown[0][:120]!r} belongs to no known part of a LoRA; it has another base?")
    if found.doubled:
        raise UserError(f"{path} gives the same factor of a module twice, once as {found.doubled[0][:120]!r}")


def _folded(module: str, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A (r, i, k, k) = Σ_s mid (r, s, k, k) · down (s, i) where there is a Tucker core; else as it is."""
    if "mid" not in parts:
        return parts
    mid, down = parts["mid"].float(), parts.get("A", torch.empty(0)).float()
    if mid.ndim != 4 or down.ndim != 4 or down.shape[2:].numel() != 1 or mid.shape[1] != down.shape[0]:
        raise UserError(f"module {module}: lora_mid {tuple(mid.shape)} and lora_down {tuple(down.shape)} do not fit")
    return {**parts, "A": torch.einsum("rskl,si->rikl", mid, down.flatten(1))}


def one_rank(modules: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """The rank all modules share; UserError naming one that differs."""
    ranks = {module: pair[0].shape[0] for module, pair in modules.items()}
    if not ranks:
        raise UserError("the adapter holds no LoRA module: nothing to write")
    first = next(iter(ranks.values()))
    other = next((module for module, rank in ranks.items() if rank != first), None)
    if other is not None:
        raise UserError(
            f"module {other} has rank {ranks[other]}, others have {first}: one rank per adapter is expected"
        )
    return first


def _uniform(
    modules: Mapping[str, tuple[Tensor, Tensor]], strength: Mapping[str, float]
) -> tuple[dict[str, Tensor], int, float]:
    """State, rank and alpha: as they are if all modules agree, else strengths baked in and ranks padded with zeros."""
    rank = max(down.shape[0] for down, _ in modules.values())
    same = len(set(strength.values())) == 1
    state = {}
    for module, (down, up) in modules.items():
        missing = rank - down.shape[0]
        up = up if same else up * strength[module]
        state[f"{module}.lora_A.weight"] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        state[f"{module}.lora_B.weight"] = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1)
    return state, rank, rank * next(iter(strength.values())) if same else float(rank)


def _target(module: str) -> str:
    """How PEFT finds the module again: its path, or for text encoders an ending that both ways of nesting share."""
    return module.split(".", 1)[1].removeprefix("text_model.").removeprefix("encoder.")


def _cast(tensor: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    cast = tensor.detach().to(dtype)
    if not bool(cast.isfinite().all()):
        raise UserError(f"module {module} does not fit into {dtype}: write the file in torch.float32")
    return cast
