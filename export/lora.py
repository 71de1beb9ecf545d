"""Carry an adapter's LoRA out: another layout, precision, strength or rank, forgetting worked in.

    personalize export lora my-cat --output my-cat.safetensors --forget decoder=0.5 --dtype float16
    personalize export lora some_lora.safetensors --layout diffusers --rank 8 --output folder

What was written is read back and compared, weight change by weight change, before it appears under its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Config:
    adapter: tyro.conf.Positional[Path]
    """Adapter folder, or a LoRA file of any layout."""
    output: Path
    """File ending in .safetensors, or a folder to put it in; must not exist yet."""
    layout: Literal["kohya", "diffusers", "peft"] = "kohya"
    """kohya: for A1111, Forge, ComfyUI, InvokeAI (diffusers reads it too); diffusers; peft: its own folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the numbers in the file."""
    forget: tuple[str, ...] = ()
    """Forgetting rules worked into the weights, e.g. `decoder=0.5` (half of what the decoder learned is kept)."""
    strength: float = 1.0
    """Strength worked into the weights: what programs then call 1."""
    rank: int | None = None
    """Lower rank, by SVD; the relative error is printed."""


def main(config: Config) -> Path:
    """Write the file and say what is in it; returns its path."""
    from personalize.adapter import Adapter
    from personalize.exporting import DTYPES, baked, export_lora, with_lower_rank

    adapter = Adapter.load(config.adapter)
    if adapter.source is not None and not adapter.info.get("standalone"):
        print("The source embedding stays behind: without it, the LoRA alone recalls the picture less exactly.")
    adapter = baked(adapter, config.forget, config.strength)
    if config.rank is not None:
        adapter, reduction = with_lower_rank(adapter, config.rank)
        print(reduction)
    path = export_lora(adapter, config.output, config.layout, DTYPES[config.dtype])
    print(f"{path}: {len(adapter.lora) // 2} modules, rank {adapter.rank}, {config.layout} layout, verified")
    return path


if __name__ == "__main__":
    from personalize.cli import run_script

    raise SystemExit(run_script(Config, main))
