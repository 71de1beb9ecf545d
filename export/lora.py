"""Export an adapter's LoRA in another layout, precision, strength or rank, with forgetting rules applied.

    personalize export lora my-cat --output my-cat.safetensors --forget decoder=0.5 --dtype float16
    personalize export lora some_lora.safetensors --layout diffusers --rank 8 --output folder

The file is read back and every weight change compared before it gets its final name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Config:
    adapter: tyro.conf.Positional[Path]
    """Adapter folder, or a LoRA file or PEFT folder of any program."""
    output: Path
    """File ending in .safetensors, or a folder for the file; must not exist yet."""
    layout: Literal["kohya", "diffusers", "peft"] = "kohya"
    """kohya: for A1111, Forge, ComfyUI, InvokeAI (diffusers reads it too); diffusers; peft: PEFT's own folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the numbers in the file."""
    forget: tuple[str, ...] = ()
    """Forgetting rules to multiply into the weights, e.g. `decoder=0.5` (keep half of what the decoder learned)."""
    strength: float = 1.0
    """Strength to multiply into the weights: programs then call it 1."""
    family: Literal["sd1", "sd2", "sdxl"] | None = None
    """Family of the base model, for files that do not tell it."""
    timestep_rank: Literal["full", "share"] = "share"
    """Of timestep-dependent rank: all components at full strength, or each by its share of timesteps."""
    rank: int | None = None
    """A lower rank, reached by SVD; the relative error is printed."""

    def check(self) -> None:
        from personalize.adapters.forgetting import parse_rules
        from personalize.cli.checks import check_adapters
        from personalize.io.output_folder import is_tensor_name, require_absent

        check_adapters([self.adapter])
        parse_rules(self.forget)
        if is_tensor_name(self.output):  # into a folder that exists goes a file
            require_absent(self.output)


def main(config: Config) -> Path:
    """Write the file and print what it contains; returns its path."""
    from personalize.adapters.adapter import Adapter
    from personalize.adapters.export import DTYPES, baked, describe_resolved, export_lora, with_lower_rank
    from personalize.adapters.merging import missed_without, plain

    adapter, left = plain(Adapter.load(config.adapter, family=config.family))
    adapter, note = describe_resolved(baked(adapter, config.forget, config.strength), config.timestep_rank)
    if note:
        print(note)
    if config.rank is not None:
        adapter, reduction = with_lower_rank(adapter, config.rank)
        print(reduction)
    path = export_lora(adapter, config.output, config.layout, DTYPES[config.dtype])
    print(f"{path}: {len(adapter.lora) // 2} modules, rank {adapter.rank}, {config.layout} layout, verified")
    for line in [*left, *missed_without(adapter)]:
        print(line)
    return path


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
