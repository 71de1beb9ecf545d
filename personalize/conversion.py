"""Convert: any LoRA or embedding file, written anew for other programs and checked before it takes its name.

personalize convert FILE --to diffusers|kohya|peft --output F

What a program cannot express is worked into the weights: alphas and ranks that differ between modules become one rank
and alpha = rank, ΔW = (alpha / r) B A staying what it was.  Names are mended: mixed styles, a missing `text_model`, a
missing `unet.`, block names of SDXL.  Embeddings go between the forms of diffusers and of the graphical programs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from personalize import formats, layouts, token_files, verify
from personalize.errors import UserError
from personalize.files import TensorFile, plain_name, read_json, read_tensors, tensor_bytes, write_file, write_folder
from personalize.pickles import read_any
from personalize.reader_names import Factors, ReaderNames

if TYPE_CHECKING:
    from personalize.commands import ConvertConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
PEFT_PREFIX = "base_model.model."


def run(config: ConvertConfig) -> Path:
    """`personalize convert`: read, mend, write, read back as the reader does, and only then put it in its place.

    Raises:
        UserError: nothing that can be converted, no room, or a result that does not verify; nothing is written then.
    """
    if config.output.exists() and config.output.samefile(config.file):
        raise UserError(f"{config.output} is the file to convert: name another --output")
    content = read_any(config.file, allow_pickle=config.allow_pickle)
    if layouts.contents(content.tensors).form.startswith("textual inversion"):
        return _convert_embedding(config, content)
    lora = formats.read_lora(config.file, content)
    state = {key: tensor for key, tensor in lora.state.items() if key.startswith("unet.") or not config.unet_only}
    if not state:
        raise UserError(f"{config.file} has no UNet part: leave --unet_only out")
    family, dtype = config.family or lora.family, DTYPES[config.dtype]
    live = factors(state, lora.alpha / lora.rank)
    if config.to == "peft":
        written = write_peft(config.output, state, lora.alpha, live, dtype)
    elif config.to == "diffusers":
        data = formats.diffusers_file(state, lora.alpha, dtype=dtype)
        written = write_file(config.output, data, check=lambda path: require(path, live, family, kohya=False))
    else:
        family = family or _unknown(config.file)
        about = metadata(lora, family, config.output.stem)
        data = formats.kohya_file(state, lora.alpha, family=family, dtype=dtype, metadata=about)
        written = write_file(config.output, data, check=lambda path: require(path, live, family, kohya=True))
    print(f"{written}: {len(live)} modules, rank {lora.rank}, verified")
    return written


def factors(state: Mapping[str, torch.Tensor], strength: float) -> Factors:
    """By module: A, B and alpha / rank, as `verify` compares them."""
    return {module: (a, b, strength) for module, (a, b) in formats.pairs(state).items()}


def require(path: Path, live: Factors, family: str | None, *, kohya: bool) -> None:
    """UserError unless the file, read through the independent name map, gives every ΔW of `live`."""
    content, names = read_tensors(path), ReaderNames(family or "sdxl")
    if family is None:  # PEFT's names hold no block numbering that would differ between families
        names = max((ReaderNames(name) for name in verify.FAMILIES), key=lambda each: len(each.peft(content)[0]))
    found = names.kohya(content) if kohya else names.peft(content)
    verify.Report((verify.compare("the result", *found, live),)).require()


def metadata(lora: formats.LoraFile, family: str, title: str) -> dict[str, str]:
    """The strings by which programs sort a LoRA; those of the source stay where they are not about its layout."""
    ours = formats.kohya_metadata(title=title, family=family, rank=lora.rank, info={})
    kept = {key: value for key, value in lora.metadata.items() if key.startswith(("ss_", "modelspec."))}
    layout = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "modelspec.implementation")
    if layouts.told_family(lora.metadata) != family:  # what it says of its base is missing or wrong
        layout += ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    return ours | kept | {key: ours[key] for key in layout}


def write_peft(
    folder: Path, state: Mapping[str, torch.Tensor], alpha: float, live: Factors, dtype: torch.dtype
) -> Path:
    """PEFT's own folder for a UNet: `PeftModel.from_pretrained(pipe.unet, folder)` reads it.

    Raises:
        UserError: modules of a text encoder, which would need a folder of their own, or a place that is not free.
    """
    modules = formats.pairs(state)
    if other := next((module for module in modules if not module.startswith("unet.")), None):
        raise UserError(f"PEFT's folder is for one model, but {other} is a text encoder's: add --unet_only")
    if folder.is_dir() and (strange := {path.name for path in folder.iterdir()} - set(PEFT_FILES)):
        raise UserError(f"{folder} already holds {min(strange)}: name another output folder")
    keys = {f"{PEFT_PREFIX}{key.removeprefix('unet.')}": tensor.to(dtype) for key, tensor in state.items()}
    settings: dict[str, Any] = {
        "peft_type": "LORA", "r": formats.one_rank(modules), "lora_alpha": alpha, "bias": "none",
        "target_modules": [module.removeprefix("unet.") for module in modules], "inference_mode": True,
    }  # fmt: skip
    text = json.dumps(settings, indent=2).encode()
    files = {PEFT_FILES[0]: text, PEFT_FILES[1]: tensor_bytes(keys, {"format": "pt"})}
    return write_folder(folder, files, check=lambda written: _require_peft(written, live))


def _require_peft(folder: Path, live: Factors) -> None:
    settings = read_json(folder / PEFT_FILES[0])
    tensors = read_tensors(folder / PEFT_FILES[1]).tensors
    found: Factors = {}
    for path in settings["target_modules"]:
        a, b = (tensors[f"{PEFT_PREFIX}{path}.lora_{side}.weight"] for side in "AB")
        found[f"unet.{path}"] = (a, b, settings["lora_alpha"] / settings["r"])
    verify.Report((verify.compare("the result", found, [], live),)).require()


def _convert_embedding(config: ConvertConfig, content: TensorFile) -> Path:
    """A textual inversion in another form; for diffusers one file per text encoder, in a folder if there are two."""
    if config.to == "peft":
        raise UserError(f"{config.file} is a learned token, which PEFT has no format for: use --to diffusers or kohya")
    concept = read_concept(config.file, config.token, content)
    dtype = DTYPES[config.dtype]

    def check(path: Path) -> None:
        rows = token_files.read_concept(path, concept.token).rows
        same = [torch.equal(rows[key], tensor.to(dtype).float()) for key, tensor in concept.rows.items() if key in rows]
        if rows.keys() != concept.rows.keys() or not all(same):
            raise UserError("the result does not give back the token's rows: the disk or memory is faulty")

    if config.to == "kohya":
        data = token_files.ui_file(concept, family=config.family, dtype=dtype)
        written = write_file(config.output, data, check=check)
    elif len(concept.rows) == 1:
        data = token_files.diffusers_file(concept, next(iter(concept.rows)), dtype=dtype)
        written = write_file(config.output, data, check=check)
    else:
        written = _write_both(config.output, concept, dtype)
    rows = len(next(iter(concept.rows.values())))
    called = plain_name(written.stem) if config.to == "kohya" else concept.token
    print(f"{written}: token {called}, {rows} vector(s) for {' and '.join(concept.rows)}")
    return written


def _write_both(folder: Path, concept: token_files.Concept, dtype: torch.dtype) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: two text encoders make two files, name a new folder for them")
    concepts = {concept.token: concept.rows}
    files = token_files.files_of(concepts, layout="diffusers", dtype=dtype)
    return write_folder(folder, files, check=lambda path: token_files.require_files(path, concepts, "diffusers", dtype))


def read_concept(path: Path, token: str | None, content: TensorFile) -> token_files.Concept:
    """The learned token of any form of file, A1111's pickles included."""
    tensors = {key: tensor for key, tensor in content.tensors.items() if not key.endswith("_out")}
    if set(tensors) == {"string_to_param.*"}:
        rows = {"text_encoder": tensors["string_to_param.*"].float()}
        token = token or content.metadata.get("name") or path.stem
        return token_files.Concept(token, token_files.checked(token, rows))
    return token_files.read_concept(path, token, TensorFile(tensors, content.metadata))


def _unknown(path: Path) -> str:
    raise UserError(f"{path} does not tell the family of its base: say --family sd1, sd2 or sdxl")
