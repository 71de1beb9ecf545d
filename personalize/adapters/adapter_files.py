"""The files of an adapter folder: their names, and what is checked of those that are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from personalize.errors import UserError
from personalize.formats import lora_files, textual_inversion_files, verification
from personalize.formats.adapter_folders import DIFFUSERS_FILE, MANIFEST, SOURCE_FILE
from personalize.formats.foreign_files import AdapterFile
from personalize.formats.manifest import Manifest, listed_files
from personalize.formats.verification_report import VerificationReport
from personalize.io.atomic import folder_path, plain_name, remove_stale
from personalize.io.json_files import checked
from personalize.io.output_folder import check_output_folder

SCHEMA = 1
WAIT = 30.0  # seconds that a save waits for another process that writes into the folder
LONGEST_STEM = 200  # bytes of a file name, which file systems limit to 255
CARD = "README.md"
PICTURES = ("source", "reconstruction", "attention")  # that trainings put on the card


def check_target(folder: str | Path) -> None:
    """UserError if `folder` cannot be written, or holds a file of another origin that saving an adapter would replace.

    Called before training.
    """
    folder = folder_path(folder)
    names = [DIFFUSERS_FILE, SOURCE_FILE, MANIFEST, CARD, kohya_file_name(folder.name), *map(picture_name, PICTURES)]
    check_output_folder(folder, tuple(names))
    remove_stale(folder)
    foreign = [name for name in names if (folder / name).exists() and name not in saved_files(folder)]
    if foreign:
        raise UserError(f"{folder} already holds a {foreign[0]}, which no training wrote: name another --output_dir")


def kohya_file_name(folder_name: str, tokens: Iterable[str] = ()) -> str:
    """File name of the LoRA in kohya's names: the folder's name in plain letters, which graphical programs display.

    It has at most 200 bytes and its ending.  "_lora" is added if it is the file name of one of the learned `tokens`,
    which is the word that prompts use.
    """
    plain = re.sub(r"[^\w.-]+", "_", folder_name).strip("._") or "adapter"
    plain = plain.encode()[:LONGEST_STEM].decode(errors="ignore")
    taken = {Path(DIFFUSERS_FILE).stem, Path(SOURCE_FILE).stem, "learned_embeds", "learned_embeds_2"}
    taken |= {textual_inversion_files.token_file_stem(token).casefold() for token in tokens}
    return f"{plain}_lora.safetensors" if plain.casefold() in taken else f"{plain}.safetensors"


def picture_name(key: str) -> str:
    """File name of a picture: `key` with ".png"; UserError if it is no plain name."""
    return plain_name(key if key.endswith(".png") else f"{key}.png")


def saved_files(folder: Path) -> set[str]:
    """Names of the files in `folder` that an earlier save has written there."""
    names = listed_files(folder / MANIFEST) if (folder / MANIFEST).is_file() else []
    kinds = (".safetensors", ".json", ".md", ".png")
    ours = (entry for entry in folder.glob("*") if entry.name in names and entry.suffix in kinds)
    return {entry.name for entry in ours if entry.is_file()}


def tensor_digests(
    lora: Mapping[str, Tensor], source: Mapping[str, Tensor] | None, concepts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The entries of the manifest by which a reader knows that tensors are those that were saved."""
    tensors = {
        f"{module}.lora_{side}.weight": verification.tensor_digest(tensor.float())
        for module, pair in lora_files.factor_pairs(lora).items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    rows = {token: textual_inversion_files.checked_rows(token, parts) for token, parts in concepts.items()}
    words = {
        token: {key: verification.tensor_digest(part) for key, part in parts.items()} for token, parts in rows.items()
    }
    digests = {key: verification.tensor_digest(value.float()) for key, value in sorted((source or {}).items())}
    return ({"concepts": words} if concepts else {}) | {"source_tensors": digests, "tensors": tensors}


def check_manifest(info: Mapping[str, Any], content: AdapterFile, folder: Path) -> None:
    """UserError unless the LoRA file is the one that `adapter.json` describes."""
    path = folder / MANIFEST
    checked(info, Manifest, path)
    if info["schema"] > SCHEMA:
        raise UserError(f"{path} has schema {info['schema']}, this version reads up to {SCHEMA}: update personalize")
    family = lora_files.family_of(content.state)
    if family not in (None, info["base"].get("family")):
        raise UserError(
            f"{path} says family {info['base'].get('family')!r}, the tensors are of {family!r}: files are mixed up"
        )
    if content.rank != info["rank"] or not math.isclose(content.alpha, info["alpha"]):
        raise UserError(
            f"{folder / DIFFUSERS_FILE} has rank {content.rank} and alpha {content.alpha:g}, {MANIFEST} says "
            f"{info['rank']} and {info['alpha']:g}: the files are not of one adapter"
        )
    VerificationReport((verification.compare_digests(DIFFUSERS_FILE, content.state, info["tensors"]),)).require()


def read_token_files(folder: Path, digests: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Tensor]]:
    """The learned tokens of the manifest's `digests` (token → encoder → digest), from the files for diffusers."""
    concepts: dict[str, dict[str, Tensor]] = {token: {} for token in digests}
    for name, (token, encoder) in textual_inversion_files.token_file_names(digests, "diffusers").items():
        learned = textual_inversion_files.read_concept(folder / name)
        report = verification.compare_digests(name, learned.rows, {str(encoder): digests[token][str(encoder)]})
        VerificationReport((report,)).require()
        concepts[token] |= learned.rows
    return concepts


def check_source(source: Mapping[str, Tensor], captions: int = 1) -> None:
    """UserError unless it is "embeds" (p, l, d), and for SDXL "pooled" (p, e), of finite numbers for p `captions`."""
    embeds, pooled = source.get("embeds"), source.get("pooled")
    if embeds is None or embeds.ndim != 3 or len(embeds) != captions or not set(source) <= {"embeds", "pooled"}:
        shapes = {key: tuple(value.shape) for key, value in source.items()}
        raise UserError(
            f"the source embedding holds {shapes}: expected embeds ({captions}, l, d) and at most pooled "
            f"({captions}, e), a row for each caption"
        )
    if pooled is not None and (pooled.ndim != 2 or len(pooled) != captions):
        raise UserError(f"the source embedding's pooled part has shape {tuple(pooled.shape)}: expected ({captions}, e)")
    if not all(bool(value.isfinite().all()) for value in source.values()):
        raise UserError("the source embedding holds a number that is not finite: train the adapter again")
