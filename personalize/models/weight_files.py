"""The weight files of a base model: whether they can be read, are no adapter's, and held every weight that it has.

The libraries give a weight that no file holds random numbers, or none at all, and drop what a model has no place for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from personalize.errors import Notice, UserError
from personalize.io.plain_files import visible
from personalize.io.tensor_files import TensorFile, read_tensors
from personalize.models.config import TEXT_ENCODERS

PARTS = ("unet", "vae", *TEXT_ENCODERS)
STEM, SHARD = "(?:diffusion_pytorch_model|model)", r"(?:-\d+-of-\d+)?"
ANY_STEM = "(?:diffusion_pytorch_model|pytorch_model|model)"  # of pickles too
# endings of names of factors by which a quantized file's numbers are to be multiplied (ComfyUI's, bitsandbytes')
FACTORS = (".scale_weight", ".weight_scale", ".scale_input", "scaled_fp8", ".comfy_quant", ".absmax")
UNET_PREFIX = "model.diffusion_model."  # of the UNet's weights in a single file
UNET_BLOCKS = re.compile(r"(time_embed|label_emb|position_net|input_blocks|middle_block|output_blocks|out)\.")


def weight_header(file: Path, source: object) -> TensorFile:
    """The names, the shapes and the metadata of a weight file of the base `source`; its numbers are not read.

    Raises:
        UserError: it is no safetensors file, cut short, or stands for a file that was not downloaded.
    """
    try:
        return read_tensors(file, peek=0)
    except UserError as error:
        raise UserError(f"cannot load the base model {source}: {error}") from error


def check_weight_files(folder: Path, variant: str | None) -> None:
    """UserError if a safetensors file of the base in `folder` cannot be read, or was saved with LoRA layers in it."""
    for part in PARTS:
        for file in weight_files(folder / part, variant):
            names = weight_header(file, folder).tensors
            odd = next((key for key in names if ".base_layer." in key or ".lora_A." in key), None)
            if odd is not None:
                raise UserError(
                    f"{file} was saved with LoRA layers in it ({odd[:80]}), so that it is no base model: call "
                    "pipe.unload_lora_weights() before pipe.save_pretrained()"
                )


def require_variant(folder: Path, variant: str | None) -> None:
    """UserError if a part's weights are there in a variant alone, such as fp16, and none is asked for."""
    for part in PARTS if variant is None else ():
        names = [file.name for file in visible(folder / part) if file.suffix in (".safetensors", ".bin")]
        plain = any(re.fullmatch(rf"{ANY_STEM}{SHARD}\.\w+", name) for name in names)
        found = (re.match(rf"{ANY_STEM}{SHARD}\.(\w+){SHARD}\.\w+$", name) for name in names)
        if (variants := {match[1] for match in found if match}) and not plain:
            only = min(variants)
            raise UserError(f"{folder} has the weights of its {part} as variant {only} alone: add --variant {only}")


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files that diffusers and transformers take a part's weights from; those of `variant` go first."""
    patterns = [rf"{STEM}{SHARD}\.safetensors"]
    if variant is not None:
        name = re.escape(variant)
        patterns.insert(0, rf"{STEM}(?:\.{name}{SHARD}|{SHARD}\.{name})\.safetensors")
    files = visible(folder, "*.safetensors")
    found = ([file for file in files if re.fullmatch(pattern, file.name)] for pattern in patterns)
    return next(filter(None, found), [])


def require_whole(
    parts: Mapping[str, Any], source: object, folder: Path | None = None, variant: str | None = None
) -> None:
    """UserError if a network of a base that was loaded has a weight that no file has given it.

    Args:
        parts: the pipeline's components.
        source: the base's name, for the message.
        folder: the base's folder, if it is one.
        variant: of the files that were loaded.
    """
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            continue
        missing = [key for key, weight in part.named_parameters() if weight.is_meta]
        if folder is not None and type(part).__name__.startswith("CLIPText"):  # transformers draws what is missing
            files = weight_files(folder / name, variant)
            held = {_bare(key) for file in files for key in weight_header(file, source).tensors}
            missing += [key for key, _ in part.named_parameters() if files and _bare(key) not in held]
        if missing:
            raise UserError(
                f"cannot load the base model {source}: its {name} lacks {len(missing)} weight(s), first "
                f"{missing[0][:120]}: get it again"
            )


def require_unscaled(names: Iterable[str], source: object) -> None:
    """UserError if a single file holds factors for its numbers, which diffusers would leave out."""
    if factor := next((name for name in names if name.endswith(FACTORS)), None):
        raise UserError(
            f"{source} is quantized, its numbers are to be multiplied by factors beside them ({factor[:120]}), which "
            "is not supported: give the base in float16 or bfloat16"
        )


def require_same_unet(names: Iterable[str], unet: nn.Module, config: Mapping[str, Any], source: object) -> None:
    """UserError unless a single file's UNet has exactly the weights of `unet`, whose `config` its conversion takes.

    A UNet with more in its blocks is of another kind: it may read the guidance scale, classes, boxes or frames as well.
    What lies beside the blocks, as merging programs leave it, is not used, and a Notice says so.
    """
    from diffusers.loaders import single_file_utils

    own = {name: name for name in names if name.startswith(UNET_PREFIX)}
    converted: dict[str, str] = single_file_utils.convert_ldm_unet_checkpoint(own, config=dict(config))
    known = dict(unet.named_parameters())
    taken = {theirs for ours, theirs in converted.items() if ours in known}
    more, beside = [], []
    for name in sorted(own.keys() - taken):
        (more if UNET_BLOCKS.match(name.removeprefix(UNET_PREFIX)) else beside).append(name)
    if more:
        raise UserError(
            f"the UNet of {source} has {len(more)} weight(s) that no model of its family has, first {more[0][:120]}: "
            "it is of another kind, give a base without them"
        )
    if beside:
        warnings.warn(
            f"{source}: {len(beside)} tensor(s) beside the UNet's blocks are not used, first {beside[0][:120]}", Notice,
            stacklevel=2,
        )  # fmt: skip
    if missing := sorted(known.keys() - converted.keys()):
        raise UserError(
            f"the UNet of {source} lacks {len(missing)} weight(s) that every model of its family has, first "
            f"{missing[0][:120]}: it is damaged or cut down, give another base"
        )


def _bare(key: str) -> str:
    """A text encoder's weight without the level that transformers has dropped."""
    return key.removeprefix("text_model.")
