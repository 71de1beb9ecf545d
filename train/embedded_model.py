"""Train the small text-to-image model that ships with the package, from rendered scenes alone.

    accelerate launch train/embedded_model.py --output_dir runs/embedded

Stages, each resumed where it stopped: the autoencoder (64 px), the diffusion at 64 px, at 128 px, and the export.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from torch import Tensor, nn

    from personalize.pretraining import TextToImageObjective
    from personalize.world import LatentPool

CORE_NOUNS = (
    "cat", "dog", "fox", "panda", "frog", "pig", "owl", "penguin", "fish", "crab", "butterfly", "apple", "banana",
    "strawberry", "pineapple", "mushroom", "sunflower", "cactus", "car", "bus", "rocket", "house", "guitar", "donut",
)  # fmt: skip
STAGES = ("autoencoder", "diffusion_64", "diffusion_128", "export")


@dataclass(frozen=True)
class Config:
    output_dir: Path
    """Where checkpoints, encoded scenes and the finished pipeline go; an unfinished run found there is resumed."""
    stages: tuple[Literal["autoencoder", "diffusion_64", "diffusion_128", "export"], ...] = STAGES
    """What to do, in this order."""
    init_from: Path | None = None
    """Finished pipeline (e.g. personalize/embedded) whose networks to go on from where there is no checkpoint yet."""
    steps: tuple[int, int, int] = (2400, 3000, 3000)
    """Optimiser updates of the three trained stages."""
    batch_sizes: tuple[int, int, int] = (12, 16, 12)
    """Pictures per update and process, for each trained stage."""
    learning_rates: tuple[float, float, float] = (8e-4, 6e-4, 4e-4)
    """Peak rates of AdamW, after a warm-up and before a linear decay over the last fifth (at 64 px: none)."""
    lr_warmup_steps: int = 100
    """Updates over which the rate rises from zero."""
    scene_pools: tuple[int, int] = (8000, 5000)
    """Scenes rendered and encoded ahead for the two diffusion stages."""
    nouns: tuple[str, ...] = CORE_NOUNS
    """Nouns of the world (the autoencoder sees all)."""
    styles: tuple[str, ...] = ("3d", "drawing")
    """Styles of the world; the held-out style is refused."""
    caption_dropout: float = 0.1
    """Share of samples whose caption is replaced by the empty one."""
    ema_decay: float = 0.998
    """Decay of the averaged weights that are exported."""
    checkpointing_steps: int = 200
    """Updates between two checkpoints."""
    dataloader_num_workers: int = 0
    """Processes that render ahead."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the forward pass."""
    seed: int = 0
    """Seed of the networks, the captions, the noise and the timesteps."""


def main(config: Config) -> Path:
    """Run the stages asked for; returns the folder of the finished pipeline."""
    import torch
    from accelerate import Accelerator

    from personalize.world import check_styles

    check_styles(config.styles)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for stage in config.stages:
        torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
        {"autoencoder": autoencoder, "export": export}.get(stage, diffusion)(config, accelerator, stage)
    return config.output_dir / "pipeline"


def autoencoder(config: Config, accelerator: Accelerator, stage: str) -> None:
    from personalize.pretraining import AutoencoderObjective, build_autoencoder
    from personalize.world import Crops

    objective = AutoencoderObjective(build_autoencoder())
    train(config, accelerator, stage, objective, Crops(64, config.seed).batch)
    if accelerator.is_main_process:
        objective.vae.save_pretrained(config.output_dir / "vae")
    accelerator.wait_for_everyone()


def diffusion(config: Config, accelerator: Accelerator, stage: str) -> None:
    """Text encoder and UNet together; the stage at 128 px starts from the weights and averages of that at 64 px."""
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.training_utils import EMAModel

    objective = networks(config.init_from)
    if accelerator.device.type == "cpu":
        objective.unet.set_attn_processor(AttnProcessor())  # explicit products: 1.5 × the samples/s of fused ones there
    ema = EMAModel(objective.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    train(config, accelerator, stage, objective, pool(config, accelerator, stage).batch, ema)


def networks(folder: Path | None = None) -> TextToImageObjective:
    """UNet and text encoder: fresh, or those of the pipeline in `folder`."""
    from personalize.pretraining import (
        TextToImageObjective,
        build_scheduler,
        build_text_encoder,
        build_tokenizer,
        build_unet,
    )
    from personalize.world import vocabulary

    unet, text_encoder = build_unet(), build_text_encoder(build_tokenizer(vocabulary()))
    if folder is not None:
        unet = type(unet).from_pretrained(folder / "unet")
        text_encoder = type(text_encoder).from_pretrained(folder / "text_encoder")
    return TextToImageObjective(unet, text_encoder, build_scheduler())


def pool(config: Config, accelerator: Accelerator, stage: str) -> LatentPool:
    """The stage's encoded scenes, made once and kept; at 64 px the first thousand set the VAE's scaling factor."""
    import torch
    from diffusers import AutoencoderKL

    from personalize.pretraining import build_tokenizer
    from personalize.scenes import captions, random_scene
    from personalize.world import LatentPool, encoded, vocabulary

    size, count = int(stage.removeprefix("diffusion_")), config.scene_pools[STAGES.index(stage) - 1]
    world = [random_scene(index, nouns=config.nouns, styles=config.styles) for index in range(count)]
    path = config.output_dir / f"pool_{size}_{count}.pt"
    if accelerator.is_main_process and not path.is_file():
        vae = AutoencoderKL.from_pretrained(vae_folder(config)).to(accelerator.device)
        with accelerator.autocast():
            latents = encoded(world, size, vae, workers=config.dataloader_num_workers)
        if stage == "diffusion_64" and config.init_from is None:
            vae.register_to_config(scaling_factor=float(1 / latents[:1000].std()))
            vae.save_config(config.output_dir / "vae")
        torch.save((latents * vae.config["scaling_factor"]).half(), path)
    accelerator.wait_for_everyone()
    texts = tuple(captions(scene) for scene in world)
    return LatentPool(torch.load(path), texts, build_tokenizer(vocabulary()), config.seed, config.caption_dropout)


def vae_folder(config: Config) -> Path:
    """The autoencoder trained in this run, or that of the pipeline it goes on from."""
    own = config.output_dir / "vae"
    return own if config.init_from is None or own.is_dir() else config.init_from / "vae"


def train(
    config: Config,
    accelerator: Accelerator,
    stage: str,
    objective: nn.Module,
    batch: Callable[[int, range], dict[str, Tensor]],
    ema: EMAModel | None = None,
) -> None:
    """Run one stage to its end, from its checkpoint if there is one."""
    import torch

    from personalize.training import fit

    index, checkpoint = STAGES.index(stage), config.output_dir / f"{stage}.pt"
    steps, size = config.steps[index], config.batch_sizes[index]
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=config.learning_rates[index], weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(config, stage, update))
    parts = {"objective": objective, "optimizer": optimizer, "scheduler": schedule, **({"ema": ema} if ema else {})}
    first = restore(config, stage, parts)
    prepared, optimizer = accelerator.prepare(objective, optimizer)

    def share(update: int) -> range:
        """Numbers of this process's samples in `update`, counted over all of them."""
        start = (update * accelerator.num_processes + accelerator.process_index) * size
        return range(start, start + size)

    batches = (
        {key: value.to(accelerator.device) for key, value in batch(u, share(u)).items()} for u in range(first, steps)
    )
    means, started = {}, time.monotonic()
    for report in fit(
        prepared, batches, optimizer, accelerator=accelerator, scheduler=schedule, max_grad_norm=1.0, first_update=first
    ):
        if ema is not None:
            ema.step(objective.parameters())
        means = {key: 0.98 * means.get(key, float(value)) + 0.02 * float(value) for key, value in report.losses.items()}
        if report.update % 50 == 0:
            speed = (report.update - first) * size * accelerator.num_processes / (time.monotonic() - started)
            figures = {"samples_per_second": round(speed, 1)} | {key: round(value, 5) for key, value in means.items()}
            accelerator.print(json.dumps({"stage": stage, "update": report.update} | figures), flush=True)
        if accelerator.is_main_process and (report.update % config.checkpointing_steps == 0 or report.update == steps):
            state = {"update": report.update} | {name: part.state_dict() for name, part in parts.items()}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)


def restore(config: Config, stage: str, parts: dict) -> int:
    """Load the stage's checkpoint and return its update; at 128 px without one, begin with the weights of 64 px."""
    import torch

    path = config.output_dir / f"{stage}.pt"
    fresh = not path.is_file()
    if fresh:
        path = config.output_dir / "diffusion_64.pt"
        if stage != "diffusion_128" or not path.is_file():
            return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("objective", "ema") if fresh else parts:
        if name in parts:
            parts[name].load_state_dict(state[name])
    return 0 if fresh else state["update"]


def rate(config: Config, stage: str, update: int) -> float:
    """The rate's factor: up over the warm-up, level, then (not at 64 px, whose result is trained on) down to 2 %."""
    steps = config.steps[STAGES.index(stage)]
    left = 1.0 if stage == "diffusion_64" else max(0.02, (steps - update) / (0.2 * steps))
    return min(1.0, (update + 1) / config.lr_warmup_steps, left)


def export(config: Config, accelerator: Accelerator, stage: str) -> None:
    """Write the averaged weights of the last diffusion stage as a stock Stable Diffusion folder, and what it knows."""
    import torch
    from diffusers import AutoencoderKL

    from personalize.pretraining import build_tokenizer, save_pipeline
    from personalize.scenes import BACKGROUNDS
    from personalize.world import vocabulary

    if not accelerator.is_main_process:
        return
    objective = networks()
    last = next(path for name in STAGES[2:0:-1] if (path := config.output_dir / f"{name}.pt").is_file())
    state = torch.load(last, map_location="cpu", weights_only=True)
    for parameter, average in zip(objective.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    vae = AutoencoderKL.from_pretrained(vae_folder(config))
    folder, tokenizer = config.output_dir / "pipeline", build_tokenizer(vocabulary())
    save_pipeline(folder, unet=objective.unet, text_encoder=objective.text_encoder, tokenizer=tokenizer, vae=vae)
    world = {
        "nouns": config.nouns,
        "styles": config.styles,
        "backgrounds": BACKGROUNDS,
        "updates": {last.stem: state["update"]},
    }
    (folder / "world.json").write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from personalize.cli import run_script

    raise SystemExit(run_script(Config, main))
