"""`personalize convert`: rewrite an adapter file for another program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from personalize.errors import UserError
from personalize.formats import lora_files, textual_inversion_files
from personalize.formats.conversion import DTYPES, factors, metadata, require
from personalize.formats.foreign_files import read_foreign_file
from personalize.formats.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, peft_files, require_peft_files
from personalize.formats.reader_keys import Factors
from personalize.io.atomic import plain_name, write_file, write_folder
from personalize.io.pickles import read_any

if TYPE_CHECKING:
    from personalize.cli.options import ConvertConfig


def run(config: ConvertConfig) -> Path:
    """`personalize convert`: read a file, write it in another layout, and verify the result before it gets its name.

    Raises:
        UserError: nothing that can be converted, no disk space, or a result that does not verify; nothing is written.
    """
    if config.output.exists() and config.output.samefile(config.file):
        raise UserError(f"{config.output} is the file to convert: name another --output")
    content = read_any(config.file, allow_pickle=config.allow_pickle)
    lora = read_foreign_file(config.file, content, config.token)
    if isinstance(lora, textual_inversion_files.LearnedToken):
        return _convert_embedding(config, lora)
    state = {key: tensor for key, tensor in lora.state.items() if key.startswith("unet.") or not config.unet_only}
    if not state:
        raise UserError(f"{config.file} has no UNet part: leave --unet_only out")
    family, dtype = config.family or lora.family, DTYPES[config.dtype]
    expected = factors(state, lora.alpha / lora.rank)
    if config.to == "peft":
        written = _write_peft(
            config.output, peft_files(state, lora.alpha, dtype, lora.base.get("name")), expected, family
        )
    elif config.to == "diffusers":
        data = lora_files.diffusers_file(state, lora.alpha, dtype=dtype)
        written = write_file(config.output, data, check=lambda path: require(path, expected, family, kohya=False))
    else:
        if family is None:
            raise UserError(f"{config.file} does not tell the family of its base: say --family sd1, sd2 or sdxl")
        header = metadata(lora, family, config.output.stem)
        data = lora_files.kohya_file(state, lora.alpha, family=family, dtype=dtype, metadata=header)
        written = write_file(config.output, data, check=lambda path: require(path, expected, family, kohya=True))
    print(f"{written}: {len(expected)} modules, rank {lora.rank}, verified")
    return written


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
