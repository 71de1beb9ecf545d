"""Learn a whole table of pictures: one adapter for each row, on one base model that stays loaded.

    personalize train catalogue items.csv --output_dir adapters
    accelerate launch --multi_gpu --num_processes 8 train/catalogue.py items.csv --output_dir adapters

Columns: image, mask, caption, name, and any option of how pictures are learned, also those of class pictures.  A cell
names one picture, a folder, or several with | between.  The rows are divided among the processes of the launch, on
several machines too.  Started again, a run repeats no finished row; a bad row stops no other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from personalize.errors import UserError, said_if_stopped
from personalize.models.config import BaseModelOptions, notice_unused
from personalize.training.config import SingleImageConfig, extract_config
from personalize.training.run_options import ONE_CLASS_SOURCE, PriorPreservationOptions

if TYPE_CHECKING:
    from personalize.models.stable_diffusion import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class Config(SingleImageConfig, PriorPreservationOptions, BaseModelOptions):
    items: tyro.conf.Positional[Path]
    """Table of the pictures: a CSV file with a header (image, mask, caption, name, …); paths are relative to it."""
    output_dir: Path = Path("adapters")
    """Where each row's adapter folder goes, and results.csv."""
    caption_model: str | None = None
    """BLIP-family folder or hub id that captions pictures for which neither the table nor a .txt file has a caption."""
    resolution: int | None = None
    """Pictures are fitted to about resolution² pixels, aspect ratio kept; the base's own if not given."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass; trained parameters and the loss are always fp32.  If not given, what `accelerate
    launch` says, or else "no", which is fp32."""
    load_in_4bit: bool = False
    """Keep the base UNet's linear layers in 4 bits (NF4) and its convolutions in bf16; for small cards."""
    adapters_per_batch: int = 1
    """Rows of one picture size that are trained in one batch; faster where `train_batch_size` is small."""
    preview_steps: int = 0
    """Denoising steps of the reconstruction that each model card shows and measures; 0 draws none."""

    replaces = SingleImageConfig.replaces | ONE_CLASS_SOURCE

    def check(self) -> None:
        from personalize.io.output_folder import check_output_folder
        from personalize.models.config import check_base_name, check_resolution
        from personalize.training.checks import check_packages

        if not self.items.is_file():
            raise UserError(f"{self.items}: no such file; name a CSV table with the columns image, caption, name")
        if self.pretrained_model_name_or_path is not None:
            check_base_name(self.pretrained_model_name_or_path)
        check_resolution(self.resolution, self.pretrained_model_name_or_path)
        check_packages(self)
        check_output_folder(self.output_dir)


def main(config: Config) -> Path:
    """Train an adapter for each row; returns the table of results.

    Raises:
        UserError: some rows failed; raised when all the others are finished.
    """
    from accelerate.utils import parse_choice_from_env

    from personalize.training import distributed
    from personalize.training.batched_adapters import check_batchable
    from personalize.training.catalogue import Catalogue, learn_catalogue
    from personalize.training.catalogue_results import DONE, write_table
    from personalize.training.catalogue_table import read_items
    from personalize.training.checks import learning_uses, notice_class_options
    from personalize.training.trainer import load_base

    settings = extract_config(config, SingleImageConfig)
    if config.adapters_per_batch > 1:
        check_batchable(settings)
    items, refused = read_items(config.items, settings, config)
    classes = any(item.sources.with_prior_preservation for item in items)
    if not classes:
        notice_class_options(config)
    notice_unused(config, learning_uses([replace(settings, **item.options) for item in items], classes=classes))
    base = "@".join(filter(None, [config.pretrained_model_name_or_path or "embedded", config.revision]))
    precision = config.mixed_precision or parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    catalogue = Catalogue(
        config.output_dir, settings, base, config.resolution, config.caption_model, config.preview_steps,
        config.adapters_per_batch, config.variant, config.prediction_type, config.load_in_4bit, precision,
    )  # fmt: skip
    processes = distributed.join_process_group()

    def load() -> StableDiffusion:
        return load_base(config, distributed.accelerator_of(precision))

    stopped = f"stopped: finished adapters are in {config.output_dir}, the same command learns the other rows"
    with said_if_stopped(stopped):
        rows = learn_catalogue(items, refused, catalogue, load, processes)
    table = config.output_dir / "results.csv"
    if processes.index == 0:
        write_table(rows, table)
        print(f"{sum(row['status'] == DONE for row in rows)} of {len(rows)} rows learned: {table}", flush=True)
    processes.all_gather(None)  # no process leaves before the table is written
    failed = [row for row in rows if row["status"] != DONE]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} rows failed, see {table}; mend them and start again")
    return table


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
