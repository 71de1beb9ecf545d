"""Convert a LoRA or a learned token from any program's layout to another's, and check the result before it is saved.

    personalize convert FILE --to diffusers|kohya|peft --output F

Alphas and ranks that differ between modules become one rank with alpha = rank, because not every program supports
others; every ΔW = (alpha / r) · B A stays as it was.  Module names are corrected: mixed naming schemes, a missing
`text_model`, a missing `unet.`, diffusers' block names in SDXL files.  Learned tokens are converted between the layouts
of diffusers and of the graphical programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from personalize.errors import UserError
from personalize.formats import layouts, lora_files, textual_inversion_files, verification
from personalize.formats.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, _read_peft_keys, require_peft_files
from personalize.formats.reader_keys import Factors, ReaderKeys
from personalize.io.atomic import plain_name, write_file, write_folder
from personalize.io.tensor_files import read_tensors

if TYPE_CHECKING:
    from personalize.cli.options import ConvertConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}




def factors(state: Mapping[str, torch.Tensor], scaling: float) -> Factors:
    """For each module A, B and `scaling` = alpha / r, as `verify.compare` takes them."""
    return {module: (a, b, scaling) for module, (a, b) in lora_files.factor_pairs(state).items()}


def require(path: Path, expected: Factors, family: str | None, *, kohya: bool) -> None:
    """UserError unless the file, read with the keys of `reader_names`, gives every ΔW of `expected`."""
    content = read_tensors(path)
    factors = ReaderKeys(family).kohya(content) if kohya and family else _read_peft_keys(content, family)
    verification.VerificationReport((verification.compare("the result", *factors, expected),)).require()




def metadata(lora: lora_files.LoraFile, family: str, title: str) -> dict[str, str]:
    """The header of a kohya file: the source's `ss_*` and `modelspec.*` strings, except those about its layout."""
    ours = lora_files.kohya_metadata(title=title, family=family, rank=lora.rank, info={})
    layout = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "modelspec.implementation")
    if layouts.family_from_metadata(lora.metadata) != family:  # what the source says of its base is missing or wrong
        layout += ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    return ours | lora.header | {key: ours[key] for key in layout}






def _write_peft(folder: Path, files: Mapping[str, bytes], expected: Factors, family: str | None) -> Path:
    """Write PEFT's files, also in the place of older ones; UserError if the folder holds anything else."""
    ours = {PEFT_CONFIG, PEFT_WEIGHTS}
    if folder.is_dir() and (others := {path.name for path in folder.rglob("*") if path.is_file()} - ours):
        raise UserError(f"{folder} already holds {min(others)}: name another output folder")
    return write_folder(folder, files, check=lambda written: require_peft_files(written, expected, family))


def _convert_embedding(config: ConvertConfig, learned: textual_inversion_files.LearnedToken) -> Path:
    """Convert a learned token; for diffusers, tokens of two text encoders become two files in a folder."""
    if config.to == "peft":
        raise UserError(f"{config.file} is a learned token, which PEFT has no format for: use --to diffusers or kohya")
    dtype = DTYPES[config.dtype]

    def check(path: Path) -> None:
        rows = textual_inversion_files.read_concept(path, learned.token).rows
        same = [torch.equal(rows[key], tensor.to(dtype).float()) for key, tensor in learned.rows.items() if key in rows]
        if rows.keys() != learned.rows.keys() or not all(same):
            raise UserError("the result does not give back the token's rows: the disk or memory is faulty")

    if config.to == "kohya":
        data = textual_inversion_files.ui_file(learned, family=config.family, dtype=dtype)
        written = write_file(config.output, data, check=check)
    elif len(learned.rows) == 1:
        data = textual_inversion_files.diffusers_file(learned, next(iter(learned.rows)), dtype=dtype)
        written = write_file(config.output, data, check=check)
    else:
        written = _write_diffusers_folder(config.output, learned, dtype)
    rows = len(next(iter(learned.rows.values())))
    called = plain_name(written.stem) if config.to == "kohya" else learned.token
    print(f"{written}: token {called}, {rows} vector(s) for {' and '.join(learned.rows)}")
    return written


def _write_diffusers_folder(folder: Path, learned: textual_inversion_files.LearnedToken, dtype: torch.dtype) -> Path:
    """Write a token of two text encoders as diffusers' two files into a new folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: rows for two text encoders make two files, name a new folder for them")
    concepts = {learned.token: learned.rows}
    files = textual_inversion_files.token_file_contents(concepts, layout="diffusers", dtype=dtype)

    def check(path: Path) -> None:
        textual_inversion_files.require_token_files(path, concepts, "diffusers", dtype)

    return write_folder(folder, files, check=check)
