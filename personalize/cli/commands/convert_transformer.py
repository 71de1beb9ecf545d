"""`personalize convert` for LoRA files of diffusion transformers; see `formats.diffusion_transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.errors import UserError
from personalize.formats.conversion import DTYPES
from personalize.formats.diffusion_transformers.conversion import require_same, transformer_alone
from personalize.formats.diffusion_transformers.factors import Pair
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.reading import read
from personalize.formats.diffusion_transformers.writing import diffusers_file, kohya_file, peft_folder
from personalize.formats.peft_files import require_no_other_files
from personalize.formats.rank_reduction import lowered_pairs
from personalize.io.atomic import write_file, write_folder
from personalize.io.output_folder import require_tensor_name
from personalize.io.tensor_files import TensorFile

if TYPE_CHECKING:
    from personalize.cli.options import ConvertConfig


def _of_rank(rank: int | None, pairs: Mapping[str, Pair]) -> Mapping[str, Pair]:
    """The nearest LoRA of a lower `rank`, whose error is printed; the same LoRA if None."""
    if rank is None:
        return pairs
    reduction = lowered_pairs(pairs, 1.0, rank)
    print(reduction)
    return reduction.pairs


def run(config: ConvertConfig, content: TensorFile, family: str) -> Path:
    """Read the LoRA of a diffusion transformer, write it in another spelling, and read it back before it is saved.

    Raises:
        UserError: nothing that a LoRA could hold, a --family that the file is not of, or a result that differs.
    """
    if config.family not in (None, family):
        raise UserError(f"{config.file} has layers of {FAMILIES[family].title}: leave --family {config.family} out")
    lora = read(config.file, content, family)
    lora = transformer_alone(lora, config.file) if config.unet_only else lora
    dtype, pairs = DTYPES[config.dtype], _of_rank(config.rank, lora.pairs)

    def check(path: Path) -> None:
        require_same(path, pairs, family, dtype, asked=config.to == "diffusers")

    if config.to == "peft":
        require_no_other_files(config.output)
        written = write_folder(config.output, peft_folder(pairs, family, dtype), check=check)
    elif config.to == "diffusers":
        written = write_file(require_tensor_name(config.output), diffusers_file(pairs, family, dtype), check=check)
    else:
        data = kohya_file(pairs, family, dtype, content.metadata)
        written = write_file(require_tensor_name(config.output), data, check=check)
    rank = max(len(a) for a, _ in pairs.values())
    print(f"{written}: {FAMILIES[family].title}, {len(pairs)} layers, rank {rank}, verified")
    if lora.left:
        print(f"{len(lora.left)} changed bias(es) or norm(s) stay behind, first of {lora.left[0]}: no LoRA holds them")
    return written
