"""Write a LoRA as the two files that other programs read; `foreign_files` reads those of any layout.

In memory a LoRA is a dictionary of tensors in PEFT's names, "<component>.<module path>.lora_A.weight" (r, in[, k, k])
and "….lora_B.weight" (out, r[, 1, 1]), with one rank r and one alpha:

    ΔW = (alpha / r) · B A

Components are `unet`, `text_encoder` and `text_encoder_2`; paths inside a text encoder always start with `text_model.`
(see `lora_keys`).  diffusers reads what `diffusers_file` returns; A1111, Forge, ComfyUI, InvokeAI and kohya's tools
read what `kohya_file` returns.  No single file serves both, because diffusers refuses alpha keys in a file that also
has its own metadata.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats import timestep_rank
from personalize.formats.layouts import FAMILY_OF_WIDTH, family_from_metadata
from personalize.formats.lora_keys import COMPONENTS, kohya_name, with_text_model
from personalize.io.tensor_files import tensor_bytes

TRAINING_OPTIONS = ("learning_rate", "lr_scheduler", "max_train_steps", "seed")  # kohya's tools record them too

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # ModelSpec's words for prediction types

LAYOUT_KEYS = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "modelspec.implementation")


def factor_pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The LoRA matrices (A, B) of every module, by canonical module name, sorted.

    Raises:
        UserError: a key that is not in PEFT's names, a missing A or B, ranks that disagree, or numbers that are not
            finite.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(unet|text_encoder|text_encoder_2)\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise UserError(f"{key[:120]!r} is no LoRA tensor in PEFT names: expected <component>.<path>.lora_A.weight")
        modules.setdefault(with_text_model(match[1], match[2]), {})[match[3]] = tensor
    for module, pair in modules.items():
        if set(pair) != {"A", "B"} or pair["A"].ndim < 2 or pair["B"].ndim < 2:
            raise UserError(f"module {module} has only {sorted(pair)} of its two LoRA matrices A and B")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"module {module}: A has rank {pair['A'].shape[0]}, B has rank {pair['B'].shape[1]}")
        if not all(bool(tensor.isfinite().all()) for tensor in pair.values()):
            raise UserError(f"module {module} holds a number that is not finite: train the adapter again")
    return {module: (modules[module]["A"], modules[module]["B"]) for module in sorted(modules)}


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """The model family of a LoRA by d, the text width that its cross-attention reads; None if no tensor shows it."""
    if any(key.startswith(("text_encoder_2.", "unet.add_embedding.")) for key in state):
        return "sdxl"
    keys = (key for key in state if key.endswith(("attn2.to_k.lora_A.weight", "attn2.to_v.lora_A.weight")))
    return next((FAMILY_OF_WIDTH.get(state[key].shape[1]) for key in keys), None)


def diffusers_file(
    state: Mapping[str, Tensor],
    alpha: float,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of `pytorch_lora_weights.safetensors`, the LoRA file that diffusers loads.

    All keys are in PEFT's names: from a file that mixes them with diffusers' older ones, diffusers silently drops every
    attention module.  The settings hold r, lora_alpha and target_modules and nothing else, because an older PEFT
    refuses settings that it does not know.  `metadata` are strings beside them, which diffusers passes over.

    Raises:
        UserError: as `factor_pairs`; ranks that differ between modules; a number too large for `dtype`.
    """
    modules = factor_pairs(state)
    tensors = {}
    for module, (down, up) in modules.items():
        tensors[f"{module}.lora_A.weight"] = _cast(down, dtype, module)
        tensors[f"{module}.lora_B.weight"] = _cast(up, dtype, module)
    settings: dict[str, Any] = {}
    common_rank(modules)
    for component in COMPONENTS:
        own = [module for module in modules if module.startswith(f"{component}.")]
        if own:
            settings[f"{component}.r"] = modules[own[0]][0].shape[0]
            settings[f"{component}.lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
            settings[f"{component}.target_modules"] = [_target(module) for module in own]
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    return tensor_bytes(tensors, {**(metadata or {}), **header})


def kohya_file(
    state: Mapping[str, Tensor],
    alpha: float,
    *,
    family: str,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of the LoRA file for graphical programs, in kohya's names.

    Every alpha equals the rank, so that readers multiply by 1; the factor alpha / r is multiplied into `lora_up`.
    SDXL modules have the names of the original code, the only ones that most of those programs know.

    Raises:
        UserError: as `diffusers_file`, and a module that the family's UNet does not have.
    """
    modules = factor_pairs(state)
    rank = common_rank(modules)
    tensors = {}
    for module, (down, up) in modules.items():
        name = kohya_name(module, family)
        tensors[f"{name}.lora_down.weight"] = _cast(down, dtype, module)
        tensors[f"{name}.lora_up.weight"] = _cast(up.double() * (alpha / rank), dtype, module)
        tensors[f"{name}.alpha"] = alpha_tensor(rank, dtype)
    return hashed_bytes(tensors, {**(metadata or {}), "format": "pt"})


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha as a file's tensor: in the file's `dtype`, or in single precision where that would round it."""
    tensor = torch.tensor(float(alpha), dtype=dtype)
    return tensor if float(tensor) == alpha else torch.tensor(float(alpha))


def hashed_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file whose header holds the hashes of its data, by which sd-scripts and A1111 know a LoRA."""
    without_metadata = tensor_bytes(tensors)
    data = without_metadata[8 + int.from_bytes(without_metadata[:8], "little") :]
    data_hash = sha256(data).hexdigest()
    hashes = {"sshs_model_hash": data_hash, "modelspec.hash_sha256": f"0x{data_hash}"}
    return tensor_bytes(tensors, {**metadata, **hashes})


def kept_metadata(
    own: Mapping[str, str], header: Mapping[str, str], family: str, others: Collection[str] = ()
) -> dict[str, str]:
    """The header of a file that was made of another: what that one's `header` says, except where it is wrong now.

    Args:
        own: the strings of `kohya_metadata`, which stand where the source has none.
        header: the source's `ss_*` and `modelspec.*` strings.
        family: of the base model; the source's strings about it are replaced if they do not say it.
        others: further keys of `own` that replace the source's.
    """
    changed = {*LAYOUT_KEYS, *others}
    if family_from_metadata(header) != family:
        changed |= {"ss_base_model_version", "ss_v2", "modelspec.architecture"}
    return {**own, **header, **{key: own[key] for key in changed}}


def kohya_metadata(*, title: str, family: str, rank: int, info: Mapping[str, Any]) -> dict[str, str]:
    """The header strings by which graphical programs sort and display a LoRA (`ss_*` and `modelspec.*`).

    `info` may hold `base` (name, sha256, prediction_type), `caption`, `captions` and `caption_counts` if there are
    several, `pictures`, `size` (H, W), `updates` that were made, `mixed_precision`, `config` (the trainer's options)
    and `date`.
    No date is written unless `info` gives one, so that equal training gives equal files, and no prediction type unless
    that of the base is known.
    """
    base, config, caption = info.get("base", {}), info.get("config", {}), str(info.get("caption", ""))
    v_prediction = base.get("prediction_type") == "v_prediction"
    version, architecture = {
        "sd1": ("sd_v1", "stable-diffusion-v1"),
        "sd2": ("sd_v2_v", "stable-diffusion-v2-768-v") if v_prediction else ("sd_v2", "stable-diffusion-v2-512"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    }[family]
    merged, size = "merged_from" in info, info.get("size")  # of a merge the pictures may not be known
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (None, None)
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
        "ss_num_train_images": info.get("pictures", None if merged else 1) if config or caption else None,
        "ss_tag_frequency": json.dumps({"1_picture": tags}) if (tags := _tag_counts(info)) else None,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.trigger_phrase": caption or None,
        "modelspec.prediction_type": PREDICTIONS.get(base.get("prediction_type")),
        "modelspec.date": info.get("date"),
        "modelspec.resolution": f"{width}x{height}" if width else None,
        "ss_resolution": f"({width}, {height})" if width else None,
        "ss_steps": info.get("updates"),
        "ss_mixed_precision": info.get("mixed_precision"),
        "ss_unet_lr": config.get("learning_rate"),
        **timestep_rank.rule_header(info),
    }
    values |= {f"ss_{name}": config.get(name) for name in TRAINING_OPTIONS}
    return {key: str(value) for key, value in values.items() if value is not None}


def _tag_counts(info: Mapping[str, Any]) -> dict[str, int]:
    """The number of pictures with each tag, as kohya's tools count them: what stands between commas, in lower case.

    Where `info` does not say how many pictures have a caption, it is counted once.
    """
    captions, counts = info.get("captions") or [info.get("caption") or ""], info.get("caption_counts")
    if len(captions) == 1 and "merged_from" not in info:
        counts = [info.get("pictures", 1)]
    if not isinstance(counts, list) or [type(count) for count in counts] != [int] * len(captions):
        counts = [1] * len(captions)
    found: Counter[str] = Counter()
    for caption, count in zip(captions, counts, strict=True):
        for tag in str(caption).lower().split(","):
            found[" ".join(tag.split())] += count
    return {tag: count for tag, count in found.items() if tag}


def common_rank(modules: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """The rank that all modules share; UserError if there is no module, or naming one whose rank differs."""
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


def _target(module: str) -> str:
    """The entry in PEFT's target_modules: the path's ending that is the same with and without `text_model.encoder.`."""
    return module.split(".", 1)[1].removeprefix("text_model.").removeprefix("encoder.")


def _cast(tensor: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    """`tensor` in `dtype`; UserError if a number is too large for it."""
    cast = tensor.detach().to(dtype)
    if not bool(cast.isfinite().all()):
        raise UserError(f"module {module} does not fit into {dtype}: write the file in torch.float32")
    return cast
