"""Which folders are adapters, by the names of their files; read before torch is imported."""

from __future__ import annotations

from pathlib import Path

from personalize.io.plain_files import visible

MANIFEST, SOURCE_FILE = "adapter.json", "source_embedding.safetensors"  # of the folders that our trainers write
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the file name that diffusers looks for in a folder
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's file of settings, and the key under which its text joins the metadata
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's file of tensors
INDEX = ".safetensors.index.json"  # the end of the name of an index of shards
ADAPTER_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ADAPTER_FOLDERS = (MANIFEST, ADAPTER_CONFIG, f"*/{ADAPTER_CONFIG}", f"*{INDEX}")


def is_diffusers_folder(folder: Path) -> bool:
    """True for a folder as diffusers' training scripts write it: with a LoRA in diffusers' names and no manifest.

    A folder of ours without its manifest is none: it lacks more than the LoRA.
    """
    ours = (folder / MANIFEST).exists() or (folder / SOURCE_FILE).exists()
    return not ours and (folder / DIFFUSERS_FILE).is_file()


def may_be_adapter(folder: Path) -> bool:
    """True for a folder of ours, of PEFT, of shards, or of diffusers' training scripts."""
    return is_diffusers_folder(folder) or any(any(folder.glob(pattern)) for pattern in ADAPTER_FOLDERS)


def no_adapter(folder: Path) -> str:
    """Why a folder is no adapter, and what to name in its place, for an error message."""
    files = [file for file in visible(folder) if file.suffix.lower() in ADAPTER_SUFFIXES and file.is_file()]
    if not files or (folder / SOURCE_FILE).exists():
        return f"{folder} is no adapter folder: it has no {MANIFEST}; name the folder training wrote"
    which = f"its file {files[0].name}" if len(files) == 1 else f"one of its {len(files)} files, as {files[0].name}"
    return f"{folder} is no adapter folder: it has no {MANIFEST}; name {which} (`personalize inspect` lists them)"
