"""Merge several adapters into one as a weighted sum: exactly, with the sum of their ranks, or by SVD to a lower rank.

    personalize export merge my-cat some_style.safetensors --weights 1 0.6 --output cat-in-style
    personalize export merge my-cat my-dog --rank 16 --output both

Writes and verifies an adapter folder: LoRA files for diffusers and for the graphical programs, and a model card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from personalize.errors import UserError


@dataclass(frozen=True)
class Config:
    adapters: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more adapter folders or LoRA files, all of one base model."""
    output: Path
    """Adapter folder to write; must not exist yet."""
    weights: tuple[float, ...] = ()
    """The weight of each adapter, in the same order; by default 1 each."""
    family: Literal["sd1", "sd2", "sdxl"] | None = None
    """Family of the base model, for files that do not tell it."""
    rank: int | None = None
    """Rank of the result, reached by SVD, the relative error is printed; by default the sum of the ranks, exactly."""

    def check(self) -> None:
        from personalize.cli.checks import check_adapters
        from personalize.io.output_folder import require_absent

        check_adapters(self.adapters)
        require_absent(self.output)


def main(config: Config) -> Path:
    """Merge, reduce the rank if asked, save, and print the relative error; returns the folder."""
    from personalize.adapters.adapter import Adapter
    from personalize.adapters.export import with_lower_rank
    from personalize.adapters.merging import merged, missed_without, plain
    from personalize.io.output_folder import require_absent

    output, weights = require_absent(config.output), config.weights or (1.0,) * len(config.adapters)
    names = [path.resolve().name.removesuffix(".safetensors") for path in config.adapters]
    read = [plain(Adapter.load(path, family=config.family)) for path in config.adapters]
    adapter = merged([one for one, _ in read], weights, names)
    if config.rank is not None and config.rank > adapter.rank:
        raise UserError(f"the sum has rank {adapter.rank}, got --rank {config.rank}: give a lower one, or leave it out")
    if config.rank is not None and config.rank < adapter.rank:
        adapter, reduction = with_lower_rank(adapter, config.rank)
        print(reduction)
    adapter.save(output)
    print(f"{output}: {len(adapter.lora) // 2} modules, rank {adapter.rank}, verified")
    for name, (one, lines) in zip(names, read, strict=True):
        for line in [*lines, *missed_without(one, tokens=False)]:  # a merge keeps the learned tokens
            print(f"{name}: {line}")
    return output


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
