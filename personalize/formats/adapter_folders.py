"""Which folders are adapters, by the names of their files; read before torch is imported."""

from __future__ import annotations

from pathlib import Path

from personalize.formats.lora_keys import COMPONENTS
from personalize.io.plain_files import visible

MANIFEST, SOURCE_FILE = "adapter.json", "source_embedding.safetensors"  # of the folders that our trainers write
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the file name that diffusers looks for in a folder
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's file of settings, and the key under which its text joins the metadata
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's file of tensors
WEIGHTS = (ADAPTER_WEIGHTS, "adapter_model.bin")  # the same, or a pickle of it
INDEX = ".safetensors.index.json"  # the end of the name of an index of shards
ADAPTER_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def is_diffusers_folder(folder: Path) -> bool:
    """True for a folder as diffusers' training scripts write it: with a LoRA in diffusers' names and no manifest.

    A folder of ours without its manifest is none: it lacks more than the LoRA.
    """
    ours = (folder / MANIFEST).exists() or (folder / SOURCE_FILE).exists()
    return not ours and (folder / DIFFUSERS_FILE).is_file()


def peft_folders(folder: Path) -> dict[str, Path]:
    """PEFT's file of weights by part of the model; by "" if the folder itself holds the two files of PEFT."""
    places = {"": folder, **{part: folder / part for part in COMPONENTS}}
    files = {
        part: next((place / name for name in WEIGHTS if (place / name).is_file()), None)
        for part, place in places.items()
        if (place / ADAPTER_CONFIG).is_file()
    }
    found = {part: file for part, file in files.items() if file is not None}
    return {"": found[""]} if "" in found else found


def is_adapter_folder(path: Path) -> bool:
    """True if `path` is a folder of PEFT or of shards, which is one adapter whatever else it holds."""
    return path.is_dir() and bool(peft_folders(path) or visible(path, f"*{INDEX}"))


def is_foreign_folder(path: Path) -> bool:
    """True if `path` is a folder of another program, also of diffusers' training scripts, and not of ours."""
    return not (path / MANIFEST).is_file() and (is_adapter_folder(path) or is_diffusers_folder(path))


def in_several_files(path: Path) -> bool:
    """True if the weights of the adapter `path` are not in one file: a folder of PEFT, or shards."""
    return path.name.endswith(INDEX) or (is_adapter_folder(path) and not (path / MANIFEST).is_file())


def no_adapter(folder: Path) -> str:
    """Why a folder is no adapter, and what to name in its place, for an error message."""
    if (folder / SOURCE_FILE).exists():
        return f"{folder} lacks {MANIFEST}, which training wrote beside its other files: copy the whole folder again"
    for place in (folder, *(folder / part for part in COMPONENTS)):
        if (place / ADAPTER_CONFIG).is_file():
            return f"{place} has PEFT's {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS} beside it: copy that file too"
    files = [file for file in visible(folder) if file.suffix.lower() in ADAPTER_SUFFIXES and file.is_file()]
    if not files:
        return f"{folder} is no adapter folder: it has no {MANIFEST}; name the folder training wrote"
    which = f"its file {files[0].name}" if len(files) == 1 else f"one of its {len(files)} files, as {files[0].name}"
    return f"{folder} is no adapter folder: it has no {MANIFEST}; name {which} (`personalize inspect` lists them)"
