"""Learn a whole table of pictures: one adapter for each row, on one base model that stays loaded.

    personalize train catalogue items.csv --output_dir adapters
    accelerate launch --multi_gpu --num_processes 8 train/catalogue.py items.csv --output_dir adapters

Columns: image, caption, name, and any option of how a picture is learned.  The rows are shared over the processes of
the launch, on several machines too; a run that was stopped goes on where it was, and a bad row stops no other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from personalize.errors import UserError


@dataclass(frozen=True)
class Config:
    items: tyro.conf.Positional[Path]
    """Table of the pictures: a CSV file with a header; paths are relative to it."""
    output_dir: Path = Path("adapters")
    """Where each row's adapter folder goes, and results.csv."""
    pretrained_model_name_or_path: str | None = None
    """Diffusers folder, hub id or single-file checkpoint; the embedded model if not given."""
    revision: str | None = None
    """Revision of a hub id."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    caption_model: str | None = None
    """BLIP-family folder or hub id that captions pictures for which neither the table nor a .txt file has words."""
    resolution: int | None = None
    """Pictures are fitted to about resolution² pixels, aspect ratio kept; the base's own if not given."""
    rank: int = 16
    """Rank of the LoRA."""
    lora_alpha: float | None = None
    """LoRA alpha, the strength being alpha / rank; the rank if not given."""
    targets: Literal["full", "attention"] = "full"
    """Modules tuned: every linear layer and convolution of the tuned blocks, or only their attentions."""
    learning_rate: float = 1e-3
    """Adam's rate for the LoRA."""
    text_embedding_lr: float = 1e-3
    """Adam's rate for the source embedding."""
    standalone: bool = False
    """Leave the source embeddings at the captions', for programs that cannot load them."""
    max_train_samples: int = 400
    """Samples (noisy copies of the picture) for each row."""
    train_batch_size: int = 10
    """Samples per batch."""
    gradient_accumulation_steps: int = 1
    """Batches per update."""
    resample_latents: bool = False
    """Draw new latents from the picture's posterior for each sample, instead of once."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss; 5 is usual, none if not given."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; not clipped if not given."""
    early_stop_loss: float | None = None
    """Stop after 350 samples once an update's loss is below this; the paper uses 0.03."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass; LoRA, source embedding and loss are always fp32."""
    seed: int = 0
    """Seed of every row."""
    preview_steps: int = 0
    """Denoising steps of the reconstruction shown and measured on each card; 0 draws none."""


def main(config: Config) -> Path:
    """Learn the rows; returns the table of results.  UserError, at the very end, if rows have failed."""
    from personalize import teams
    from personalize.catalogue import DONE, Catalogue, read_items, run, write_table

    recipe = recipe_of(config)
    items, refused = read_items(config.items, recipe)
    base = "@".join(filter(None, [config.pretrained_model_name_or_path or "embedded", config.revision]))
    catalogue = Catalogue(
        config.output_dir, recipe, base, config.resolution, config.caption_model, config.preview_steps
    )
    team = teams.join()
    rows = run(items, refused, catalogue, lambda: base_model(config), team, config.mixed_precision)
    table = config.output_dir / "results.csv"
    if team.index == 0:
        write_table(rows, table)
        print(f"{sum(row['status'] == DONE for row in rows)} of {len(rows)} rows learned: {table}", flush=True)
    team.gathered(None)  # the table is there before any process leaves
    failed = [row for row in rows if row["status"] != DONE]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} rows failed, see {table}; mend them and start again")
    return table


def recipe_of(config: Config) -> Any:
    """The part of the options that decides how a picture is learned, for rows that say nothing else."""
    from personalize.learning import Recipe

    return Recipe(**{one.name: getattr(config, one.name) for one in fields(Recipe) if hasattr(config, one.name)})


def base_model(config: Config) -> Any:
    """The base, on this process's device."""
    import torch

    from personalize.model import StableDiffusion, default_device

    device = default_device()
    half = config.mixed_precision == "bf16" and device.type == "cuda"
    return StableDiffusion.load(
        config.pretrained_model_name_or_path, device=device, dtype=torch.bfloat16 if half else torch.float32,
        revision=config.revision, variant=config.variant,
    )  # fmt: skip


if __name__ == "__main__":
    from personalize.cli import run_script

    raise SystemExit(run_script(Config, main))
