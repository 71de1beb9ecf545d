"""`personalize convert`: an adapter file in another program's layout; see `formats.conversion`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from personalize.cli.commands import convert_transformer
from personalize.errors import UserError
from personalize.formats import lora_files, textual_inversion_files
from personalize.formats.adapter_source import open_adapter
from personalize.formats.conversion import DTYPES, factors, metadata, require, require_source, require_tokens
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.reading import identify
from personalize.formats.foreign_files import AdapterFile, as_lora, read_adapter_file
from personalize.formats.lora_files import factor_pairs
from personalize.formats.peft_files import peft_files, require_no_other_files, require_peft_files
from personalize.formats.rank_reduction import lowered_pairs
from personalize.formats.reader_keys import Factors
from personalize.formats.timestep_rank import HEADER_KEY, read_rule, require_whole_rank, warning
from personalize.io.atomic import plain_name, write_file, write_folder
from personalize.io.output_folder import require_tensor_name
from personalize.io.plain_files import visible

if TYPE_CHECKING:
    from personalize.cli.options import ConvertConfig

Concepts = Mapping[str, dict[str, Tensor]]


def run(config: ConvertConfig) -> Path:
    """`personalize convert`: read a file, write it in another layout, and verify the result before it gets its name.

    Raises:
        UserError: nothing that can be converted, an output that exists, no disk space, or a result that does not
            verify; nothing is written.
    """
    _require_free(config.output, config)
    content = open_adapter(config.file, allow_pickle=config.allow_pickle)
    if (found := identify(content, config.family)) is not None:
        _require_token(config, {})
        return convert_transformer.run(config, content, found[0])
    if config.family in FAMILIES:
        raise UserError(f"{config.file} has no layer of {FAMILIES[config.family].title}: is --family right?")
    file = read_adapter_file(config.file, content, token=config.token, family=config.family)
    _require_token(config, file.concepts)
    if not file.state and not file.others:
        if config.rank is not None:
            raise UserError(f"{config.file} holds learned tokens alone, which have no rank: leave --rank out")
        if config.unet_only:
            raise UserError(f"{config.file} holds learned tokens alone, and no UNet part: leave --unet_only out")
        return _convert_tokens(config, config.output, file)
    file, left = as_lora(file)
    state = _selected(config, file.state)
    lora, family = replace(file, state=state), file.family
    expected = factors(state, lora.alpha / lora.rank)
    require_source(content, expected, family, config.file)
    rule = read_rule(lora.header.get(HEADER_KEY), config.file)
    if config.rank is not None:
        require_whole_rank(rule)
        lora, expected = _with_lower_rank(config.rank, lora)
    beside = _files_beside(config, file)
    written = _write(config, lora, expected, family)
    print(f"{written}: {len(expected)} modules, rank {lora.rank}, verified")
    for path, data in beside.items():
        print(f"{write_file(path, data)}: learned token, in a file of its own since no program reads both from one")
    for line in [*left, *([warning(rule)] if rule else [])]:
        print(line)
    return written


def _require_token(config: ConvertConfig, concepts: Concepts) -> None:
    """UserError for a word for a learned token, if there is none."""
    if config.token is not None and not concepts:
        raise UserError(f"{config.file} holds no learned token that could be called {config.token}: leave --token out")


def _with_lower_rank(rank: int, lora: AdapterFile) -> tuple[AdapterFile, Factors]:
    """The nearest LoRA of a lower rank, and its factors; its error is printed."""
    reduction = lowered_pairs(factor_pairs(lora.state), lora.alpha / lora.rank, rank)
    print(reduction)
    return replace(lora, state=reduction.state, rank=rank, alpha=float(rank)), factors(reduction.state, 1.0)


def _selected(config: ConvertConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The modules that are wanted."""
    kept = {key: tensor for key, tensor in state.items() if key.startswith("unet.") or not config.unet_only}
    if not kept:
        raise UserError(f"{config.file} has no UNet part: leave --unet_only out")
    return kept


def _write(config: ConvertConfig, lora: AdapterFile, expected: Factors, family: str | None) -> Path:
    """Write a LoRA in the layout that is wanted, read it back, and compare."""
    dtype, state = DTYPES[config.dtype], lora.state
    rule = {key: text for key, text in lora.header.items() if key == HEADER_KEY}
    if config.to == "peft":
        files = peft_files(state, lora.alpha, dtype, lora.base.get("name"), rule)
        return _write_peft(config, files, expected, family)
    if config.to == "diffusers":
        data = lora_files.diffusers_file(state, lora.alpha, dtype=dtype, metadata=rule)
        output = require_tensor_name(config.output)
        return write_file(output, data, check=lambda path: require(path, expected, family, kohya=False))
    if family is None:
        raise UserError(f"{config.file} does not tell the family of its base: say --family sd1, sd2 or sdxl")
    output = require_tensor_name(config.output)
    header = metadata(lora, family, output.stem)
    data = lora_files.kohya_file(state, lora.alpha, family=family, dtype=dtype, metadata=header)
    return write_file(output, data, check=lambda path: require(path, expected, family, kohya=True))


def _require_free(path: Path, config: ConvertConfig) -> None:
    """UserError if `path` exists and may not be replaced, or is, holds or lies in what is read."""
    if path.exists() and config.file.exists():
        if path.samefile(config.file):
            raise UserError(f"{path} is the file to convert: name another --output")
        place, source = path.resolve(), config.file.resolve()
        if source.is_relative_to(place) or place.is_relative_to(source):
            raise UserError(f"{path} and {config.file}, which is read, are one in the other: name another --output")
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists already: name another --output, or add --overwrite")


def _convert_tokens(config: ConvertConfig, output: Path, file: AdapterFile) -> Path:
    """Convert a file of learned tokens; for diffusers, rows for two text encoders become two files in a folder."""
    concepts = file.concepts
    if config.to == "peft":
        raise UserError(f"{config.file} is a learned token, which PEFT has no format for: use --to diffusers or kohya")
    if config.to == "kohya" and len(concepts) > 1:
        raise UserError(f"{config.file} holds {len(concepts)} tokens, graphical programs take one a file: use "
                        "`personalize export tokens`, which writes a folder")  # fmt: skip
    if config.to == "diffusers" and len(concepts) == 1 and len(next(iter(concepts.values()))) > 1:
        return _write_diffusers_folder(config, output, concepts)
    output, dtype = require_tensor_name(output), DTYPES[config.dtype]
    if config.to == "kohya":
        learned = textual_inversion_files.LearnedToken(*next(iter(concepts.items())))
        data = textual_inversion_files.ui_file(learned, family=file.family, dtype=dtype, trigger=output.stem)
    else:
        data = textual_inversion_files.diffusers_tokens(concepts, dtype=dtype)
    named = None if config.to == "diffusers" else next(iter(concepts))
    written = write_file(output, data, check=lambda path: require_tokens(path, concepts, named, dtype))
    for token, rows in concepts.items():
        called = plain_name(written.stem) if config.to == "kohya" else token
        print(f"{written}: token {called}, {len(next(iter(rows.values())))} vector(s) for {' and '.join(rows)}")
    if len(concepts) > 1:
        print("diffusers loads one token at a time: pipe.load_textual_inversion({token: rows}) for each of them")
    return written


def _files_beside(config: ConvertConfig, file: AdapterFile) -> dict[Path, bytes]:
    """The files beside the result for the learned tokens of a LoRA file, in the layout of the same programs."""
    layout = "ui" if config.to == "kohya" else "diffusers"
    files = textual_inversion_files.token_file_contents(
        file.concepts, layout=layout, family=file.family, dtype=DTYPES[config.dtype]
    )
    found = {config.output.parent / name: data for name, data in files.items()}
    for path in found:
        if path.name.casefold() == config.output.name.casefold():
            raise UserError(f"{config.output} is also the file of its learned token {path.stem}: name another --output")
        _require_free(path, config)
    return found


def _write_diffusers_folder(config: ConvertConfig, folder: Path, concepts: Concepts) -> Path:
    """Write a token of two text encoders as diffusers' two files into a new folder."""
    if folder.exists() and (not folder.is_dir() or visible(folder)):
        raise UserError(f"{folder} exists: rows for two text encoders make two files, name a new folder for them")
    dtype = DTYPES[config.dtype]
    files = textual_inversion_files.token_file_contents(concepts, layout="diffusers", dtype=dtype)
    written = write_folder(
        folder,
        files,
        check=lambda path: textual_inversion_files.require_token_files(path, concepts, "diffusers", dtype),
    )
    for token, rows in concepts.items():
        print(f"{written}: token {token}, {len(next(iter(rows.values())))} vector(s) for {' and '.join(rows)}")
    return written


def _write_peft(config: ConvertConfig, files: Mapping[str, bytes], expected: Factors, family: str | None) -> Path:
    """Write PEFT's files, also in the place of older ones; UserError if the folder holds anything else."""
    require_no_other_files(config.output)
    return write_folder(config.output, files, check=lambda written: require_peft_files(written, expected, family))
