"""Convert a LoRA or a learned token from any program's layout to another's, and check the result before it is saved.

    personalize convert FILE --to diffusers|kohya|peft --output F

Alphas and ranks that differ between modules become one rank with alpha = rank, because not every program supports
others; every ΔW = (alpha / r) · B A stays as it was.  Module names are corrected: mixed naming schemes, a missing
`text_model`, a missing `unet.`, diffusers' block names in SDXL files.  Learned tokens are converted between the layouts
of diffusers and of the graphical programs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from personalize import formats, layouts, token_files, verify
from personalize.errors import UserError
from personalize.files import TensorFile, plain_name, read_json, read_tensors, tensor_bytes, write_file, write_folder
from personalize.lora_names import COMPONENTS
from personalize.pickles import read_any
from personalize.reader_names import Factors, ReaderKeys

if TYPE_CHECKING:
    from personalize.commands import ConvertConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


def run(config: ConvertConfig) -> Path:
    """`personalize convert`: read a file, write it in another layout, and verify the result before it gets its name.

    Raises:
        UserError: nothing that can be converted, no disk space, or a result that does not verify; nothing is written.
    """
    if config.output.exists() and config.output.samefile(config.file):
        raise UserError(f"{config.output} is the file to convert: name another --output")
    content = read_any(config.file, allow_pickle=config.allow_pickle)
    lora = read_foreign_file(config.file, content, config.token)
    if isinstance(lora, token_files.LearnedToken):
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
        data = formats.diffusers_file(state, lora.alpha, dtype=dtype)
        written = write_file(config.output, data, check=lambda path: require(path, expected, family, kohya=False))
    else:
        if family is None:
            raise UserError(f"{config.file} does not tell the family of its base: say --family sd1, sd2 or sdxl")
        header = metadata(lora, family, config.output.stem)
        data = formats.kohya_file(state, lora.alpha, family=family, dtype=dtype, metadata=header)
        written = write_file(config.output, data, check=lambda path: require(path, expected, family, kohya=True))
    print(f"{written}: {len(expected)} modules, rank {lora.rank}, verified")
    return written


def factors(state: Mapping[str, torch.Tensor], scaling: float) -> Factors:
    """For each module A, B and `scaling` = alpha / r, as `verify.compare` takes them."""
    return {module: (a, b, scaling) for module, (a, b) in formats.factor_pairs(state).items()}


def require(path: Path, expected: Factors, family: str | None, *, kohya: bool) -> None:
    """UserError unless the file, read with the keys of `reader_names`, gives every ΔW of `expected`."""
    content = read_tensors(path)
    factors = ReaderKeys(family).kohya(content) if kohya and family else _read_peft_keys(content, family)
    verify.VerificationReport((verify.compare("the result", *factors, expected),)).require()


def _read_peft_keys(content: TensorFile, family: str | None) -> tuple[Factors, list[str]]:
    """The modules of a file in PEFT's keys; if the family is unknown, as read by the family that knows most of them.

    Any family reads the same ΔW: no block numbers in PEFT's keys differ between families.
    """
    readings = (ReaderKeys(name).peft(content) for name in ([family] if family else verify.FAMILIES))
    return max(readings, key=lambda reading: len(reading[0]))


def metadata(lora: formats.LoraFile, family: str, title: str) -> dict[str, str]:
    """The header of a kohya file: the source's `ss_*` and `modelspec.*` strings, except those about its layout."""
    ours = formats.kohya_metadata(title=title, family=family, rank=lora.rank, info={})
    layout = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "modelspec.implementation")
    if layouts.family_from_metadata(lora.metadata) != family:  # what the source says of its base is missing or wrong
        layout += ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    return ours | lora.header | {key: ours[key] for key in layout}


def peft_files(
    state: Mapping[str, torch.Tensor], alpha: float, dtype: torch.dtype = torch.float32, base: str | None = None
) -> dict[str, bytes]:
    """PEFT's own files of a LoRA, name → bytes, for `PeftModel.from_pretrained(module, folder)`.

    A LoRA of the UNet alone gives `adapter_config.json` and `adapter_model.safetensors`; one that also changes text
    encoders gives a folder of these two files for each part: "unet/", "text_encoder/", "text_encoder_2/".  `base` is
    the name of the base model.  Only settings that every version of PEFT knows are written.  Module paths of the first
    text encoder have no `text_model.`, because transformers ≥ 5.6 builds it without; those of SDXL's second have it.
    """
    modules = formats.factor_pairs(state)
    rank, files = formats.common_rank(modules), {}
    parts = [part for part in COMPONENTS if any(module.startswith(f"{part}.") for module in modules)]
    for part in parts:
        own = {module.partition(".")[2]: pair for module, pair in modules.items() if module.startswith(f"{part}.")}
        if part == "text_encoder":
            own = {path.removeprefix("text_model."): pair for path, pair in own.items()}
        tensors = {
            f"{PEFT_PREFIX}{path}.lora_{side}.weight": tensor.to(dtype)
            for path, pair in own.items()
            for side, tensor in zip("AB", pair, strict=True)
        }
        settings = {"peft_type": "LORA", "task_type": None, "r": rank, "lora_alpha": alpha,
                    "target_modules": list(own), "bias": "none", "inference_mode": True,
                    "base_model_name_or_path": base}  # fmt: skip
        folder = "" if parts == ["unet"] else f"{part}/"
        files[f"{folder}{PEFT_CONFIG}"] = (json.dumps(settings, indent=2) + "\n").encode()
        files[f"{folder}{PEFT_WEIGHTS}"] = tensor_bytes(tensors, {"format": "pt"})
    return files


def require_peft_files(folder: Path, expected: Factors, family: str | None) -> None:
    """UserError unless the files of `peft_files` in `folder` give every ΔW of `expected` (keys: `reader_names`)."""
    tensors, settings = {}, {}
    folders = {part: folder / part for part in COMPONENTS if (folder / part).is_dir()} or {"unet": folder}
    for part, place in folders.items():
        config, nested = read_json(place / PEFT_CONFIG), "text_model." if part == "text_encoder" else ""
        for key, tensor in read_tensors(place / PEFT_WEIGHTS).tensors.items():
            tensors[f"{part}.{nested}{key.removeprefix(PEFT_PREFIX)}"] = tensor
        settings |= {f"{part}.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
    content = TensorFile(tensors, {"lora_adapter_metadata": json.dumps(settings)})
    factors, problems = _read_peft_keys(content, family)
    verify.VerificationReport((verify.compare(PEFT_WEIGHTS, factors, problems, expected),)).require()


def _write_peft(folder: Path, files: Mapping[str, bytes], expected: Factors, family: str | None) -> Path:
    """Write PEFT's files, also in the place of older ones; UserError if the folder holds anything else."""
    ours = {PEFT_CONFIG, PEFT_WEIGHTS}
    if folder.is_dir() and (others := {path.name for path in folder.rglob("*") if path.is_file()} - ours):
        raise UserError(f"{folder} already holds {min(others)}: name another output folder")
    return write_folder(folder, files, check=lambda written: require_peft_files(written, expected, family))


def _convert_embedding(config: ConvertConfig, learned: token_files.LearnedToken) -> Path:
    """Convert a learned token; for diffusers, tokens of two text encoders become two files in a folder."""
    if config.to == "peft":
        raise UserError(f"{config.file} is a learned token, which PEFT has no format for: use --to diffusers or kohya")
    dtype = DTYPES[config.dtype]

    def check(path: Path) -> None:
        rows = token_files.read_concept(path, learned.token).rows
        same = [torch.equal(rows[key], tensor.to(dtype).float()) for key, tensor in learned.rows.items() if key in rows]
        if rows.keys() != learned.rows.keys() or not all(same):
            raise UserError("the result does not give back the token's rows: the disk or memory is faulty")

    if config.to == "kohya":
        data = token_files.ui_file(learned, family=config.family, dtype=dtype)
        written = write_file(config.output, data, check=check)
    elif len(learned.rows) == 1:
        data = token_files.diffusers_file(learned, next(iter(learned.rows)), dtype=dtype)
        written = write_file(config.output, data, check=check)
    else:
        written = _write_diffusers_folder(config.output, learned, dtype)
    rows = len(next(iter(learned.rows.values())))
    called = plain_name(written.stem) if config.to == "kohya" else learned.token
    print(f"{written}: token {called}, {rows} vector(s) for {' and '.join(learned.rows)}")
    return written


def _write_diffusers_folder(folder: Path, learned: token_files.LearnedToken, dtype: torch.dtype) -> Path:
    """Write a token of two text encoders as diffusers' two files into a new folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: rows for two text encoders make two files, name a new folder for them")
    concepts = {learned.token: learned.rows}
    files = token_files.token_file_contents(concepts, layout="diffusers", dtype=dtype)

    def check(path: Path) -> None:
        token_files.require_token_files(path, concepts, "diffusers", dtype)

    return write_folder(folder, files, check=check)


def read_foreign_file(
    path: str | Path, content: TensorFile, token: str | None = None
) -> formats.LoraFile | token_files.LearnedToken:
    """The LoRA or the learned token in a file of any program; the one reader of files that are no adapter folder.

    Args:
        path: the file's name, for messages and for tokens that the file does not name.
        content: what `read_tensors` or, where pickles are allowed, `read_any` has read from it.
        token: the word of a learned token, in place of the file's own.

    Raises:
        UserError: the file holds neither of the two, or more than that.
    """
    path = Path(path)
    if not layouts.classify_tensors(content.tensors).file_kind.startswith("textual inversion"):
        return formats.read_lora(path, content)
    tensors = {key: tensor for key, tensor in content.tensors.items() if not key.endswith("_out")}
    if set(tensors) == {"string_to_param.*"}:  # a pickle of A1111
        rows = {"text_encoder": tensors["string_to_param.*"].float()}
        token = token or content.metadata.get("name") or path.stem
        return token_files.LearnedToken(token, token_files.checked_rows(token, rows))
    return token_files.read_concept(path, token, TensorFile(tensors, content.metadata))
