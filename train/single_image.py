"""Learn one picture: LoRA and source embedding, tuned together (Forgedit, arXiv 2309.10556).

    accelerate launch train/single_image.py photo.jpg --caption "a photo of a dog" --output_dir my-dog
    personalize train single_image photo.jpg --config sd15 --pretrained_model_name_or_path FOLDER --output_dir my-dog

Writes an adapter folder: LoRA files for diffusers and for the graphical programs, the source embedding, a card.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from personalize.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from personalize.learning import Learning


@dataclass(frozen=True)
class Config:
    picture: tyro.conf.Positional[Path | None] = None
    """The picture to learn: any size, aspect ratio and format."""
    instance_image: Path | None = None
    """The picture, as an option."""
    instance_data_dir: Path | None = None
    """A folder that holds the picture and nothing else that is one."""
    caption: str | None = None
    """What the picture shows; if not given, read from the .txt file beside it."""
    caption_model: str | None = None
    """BLIP-family folder or hub id that captions the picture if there are no words."""
    output_dir: Path = Path("adapter")
    """Where the adapter folder, its checkpoints and logs go."""
    pretrained_model_name_or_path: str | None = None
    """Diffusers folder, hub id or single-file checkpoint; the embedded model if not given."""
    revision: str | None = None
    """Revision of a hub id."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    resolution: int | None = None
    """The picture is fitted to about resolution² pixels, aspect ratio kept; the base's own if not given."""
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
    """Leave the source embedding at the caption's, for programs that cannot load it; reconstructs less exactly."""
    max_train_samples: int = 400
    """Samples (noisy copies of the picture) to train on, over all processes: 400 in updates of 10 make 40 updates."""
    max_train_steps: int | None = None
    """Updates to make; overrides max_train_samples."""
    train_batch_size: int = 10
    """Samples per batch and process."""
    gradient_accumulation_steps: int = 1
    """Batches per update; `--train_batch_size 1 --gradient_accumulation_steps 10` learns the same in less memory."""
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
    """Seed of the LoRA, latents, noise and timesteps."""
    checkpointing_steps: int | None = None
    """Updates between two checkpoints in output_dir/checkpoint-N; none if not given."""
    checkpoints_total_limit: int | None = None
    """Keep only this many of the newest checkpoints."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint folder, or from the "latest" whole one in output_dir."""
    preview_steps: int = 30
    """Denoising steps of the reconstruction shown and measured on the card; 0 draws none."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all"] | None = None
    """Tracker for losses and rates, through Accelerate."""
    logging_dir: str = "logs"
    """Folder of tracker files inside output_dir."""
    person: bool = False
    """The picture shows a recognisable person: the card says so, and asks for consent."""


def main(config: Config) -> Path:
    """Train and save the adapter; returns its folder."""
    from accelerate import Accelerator

    from personalize.adapter import check_target
    from personalize.captions import find_caption
    from personalize.data import find_picture
    from personalize.images import fit, load_image
    from personalize.learning import learning
    from personalize.model import StableDiffusion
    from personalize.preview import preview

    path = find_picture(place(config))
    image, caption = load_image(path), find_caption(path, config.caption, config.caption_model)
    check_target(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=str(config.output_dir / config.logging_dir),
    )
    settings = recipe(config, accelerator.num_processes)
    model = StableDiffusion.load(
        config.pretrained_model_name_or_path, device=accelerator.device, dtype=dtype(config, accelerator),
        revision=config.revision, variant=config.variant,
    )  # fmt: skip
    pixels, size = fit(image, config.resolution or model.resolution, 8 * model.factor)
    accelerator.print(f"{path}: {size[1]}×{size[0]} px, caption “{caption}” = {' · '.join(model.tokens(caption))}")
    with learning(model, pixels, caption, settings, accelerator=accelerator) as run:
        train(config, run)
        adapter = run.adapter(person=config.person)
    if accelerator.is_main_process:
        figures, pictures = preview(model, adapter, pixels, steps=config.preview_steps, seed=config.seed)
        replace(adapter, info={**adapter.info, **figures}).save(config.output_dir, pictures=pictures)
        print(*(f"{name}: {value}" for name, value in figures.items()), f"Adapter: {config.output_dir}", sep="\n")
    accelerator.end_training()
    return config.output_dir


def place(config: Config) -> Path:
    """Where the picture is, given in exactly one of three ways."""
    given = [path for path in (config.picture, config.instance_image, config.instance_data_dir) if path is not None]
    if len(given) != 1:
        raise UserError(f"name one picture, e.g. `single_image photo.jpg`; got {len(given)}")
    return given[0]


def recipe(config: Config, processes: int) -> Any:
    """The part of the options that decides how the picture is learned."""
    from personalize.learning import Recipe

    values = {field.name: getattr(config, field.name) for field in fields(Recipe)}
    if config.max_train_steps is not None:
        batch = config.train_batch_size * config.gradient_accumulation_steps * processes
        values["max_train_samples"] = config.max_train_steps * batch
    return Recipe(**values)


def dtype(config: Config, accelerator: Accelerator) -> Any:
    """The UNet's precision: bf16 halves its memory on an accelerator; under fp16 it stays fp32 behind autocast."""
    import torch

    return torch.bfloat16 if config.mixed_precision == "bf16" and accelerator.device.type == "cuda" else torch.float32


def train(config: Config, run: Learning) -> None:
    """Make the updates, with progress, tracking and checkpoints."""
    from rich.progress import Progress

    from personalize import checkpoints

    accelerator, checkpoint = run.accelerator, checkpoints.find(config.output_dir, config.resume_from_checkpoint)
    if checkpoint is not None:
        run.resume(checkpoint)
    if config.resume_from_checkpoint is not None:
        start = f"checkpoint-{run.update}" if checkpoint else "the beginning: no whole checkpoint was found"
        accelerator.print(f"Going on from {start}")
    if config.report_to is not None:
        accelerator.init_trackers("single_image", {name: str(value) for name, value in vars(config).items()})
    with Progress(disable=not accelerator.is_local_main_process) as progress:
        task = progress.add_task("Learning", total=run.updates, completed=run.update)
        for report in run.steps():
            loss = float(report.losses["loss"])
            progress.update(task, completed=report.update, description=f"Learning, loss {loss:.3f}")
            accelerator.log({"loss": loss, "learning_rate": report.learning_rates[0]}, step=report.update)
            if config.checkpointing_steps and report.update % config.checkpointing_steps == 0:
                run.save_checkpoint(config.output_dir, config.checkpoints_total_limit)


if __name__ == "__main__":
    from personalize.cli import run_script

    raise SystemExit(run_script(Config, main))
