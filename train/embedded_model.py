"""Train the small text-to-image model that ships with the package, from rendered scenes alone.

    accelerate launch train/embedded_model.py --output_dir runs/embedded

Stages, each resumed where it stopped: the autoencoder (64 px), the diffusion at 64 px, at 128 px, and the export.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from accelerate import Accelerator

    from personalize.pretraining import TextToImageObjective
    from personalize.scenes import Scene
    from personalize.stages import Stage
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
    pairs: float = 0.5
    """Share of those scenes with two objects, the harder kind; not thirds, if there are hard nouns."""
    hard_nouns: tuple[str, ...] = ()
    """Nouns that a third of those scenes take theirs from, such as those that came out worst so far."""
    nouns: tuple[str, ...] = CORE_NOUNS
    """Nouns of the world (the autoencoder sees all)."""
    styles: tuple[str, ...] = ("3d", "drawing")
    """Styles of the world; the held-out style is refused."""
    grounding_weight: float = 0.1
    """Weight of the loss that keeps each noun's attention on its own thing."""
    caption_dropout: float = 0.1
    """Share of samples whose caption is replaced by the empty one."""
    ema_decay: float = 0.998
    """Decay of the averaged weights that are exported."""
    checkpointing_steps: int = 200
    """Updates between two checkpoints."""
    dataloader_num_workers: int = 0
    """Processes that render scenes and make batches ahead."""
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
    from personalize import stages
    from personalize.pretraining import AutoencoderObjective, build_autoencoder
    from personalize.world import Crops

    objective = AutoencoderObjective(build_autoencoder())
    stages.run(stage_of(config, stage), accelerator, objective, Crops(64, config.seed).batch)
    if accelerator.is_main_process:
        objective.vae.save_pretrained(config.output_dir / "vae")
    accelerator.wait_for_everyone()


def diffusion(config: Config, accelerator: Accelerator, stage: str) -> None:
    """Text encoder and UNet together; the stage at 128 px starts from the weights and averages of that at 64 px."""
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.training_utils import EMAModel

    from personalize import stages

    objective = networks(config.init_from, config.grounding_weight)
    if accelerator.device.type == "cpu":
        objective.unet.set_attn_processor(AttnProcessor())  # explicit products: 1.5 × the samples/s of fused ones there
    ema = EMAModel(objective.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    stages.run(stage_of(config, stage), accelerator, objective, pool(config, accelerator, stage).batch, ema)


def networks(folder: Path | None = None, grounding_weight: float = 0.0) -> TextToImageObjective:
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
    return TextToImageObjective(unet, text_encoder, build_scheduler(), grounding_weight)


def training_scenes(config: Config, count: int) -> list[Scene]:
    """Scenes of the split "train": those with two objects spread evenly, hard nouns in each third one."""
    from personalize.scenes import random_scene

    nouns = (config.nouns, config.nouns, config.hard_nouns or config.nouns)
    objects = [1 + int((index + 1) * config.pairs) - int(index * config.pairs) for index in range(count)]
    return [random_scene(i, nouns=nouns[i % 3], styles=config.styles, objects=n) for i, n in enumerate(objects)]


def pool(config: Config, accelerator: Accelerator, stage: str) -> LatentPool:
    """The stage's encoded scenes, made once and kept; at 64 px the first thousand set the VAE's scaling factor."""
    import torch
    from diffusers import AutoencoderKL

    from personalize.pretraining import build_tokenizer
    from personalize.world import LatentPool, encode_scenes, vocabulary

    size, count = int(stage.removeprefix("diffusion_")), config.scene_pools[STAGES.index(stage) - 1]
    world = training_scenes(config, count)
    name = "_".join(["pool", str(size), str(count), f"{config.pairs:g}", *config.hard_nouns])
    path = config.output_dir / f"{name}.pt"
    if accelerator.is_main_process and not path.is_file():
        vae = AutoencoderKL.from_pretrained(vae_folder(config)).to(accelerator.device)
        with accelerator.autocast():
            latents, masks = encode_scenes(world, size, vae, workers=config.dataloader_num_workers)
        if stage == "diffusion_64" and config.init_from is None:
            vae.register_to_config(scaling_factor=float(1 / latents[:1000].std()))
            vae.save_config(config.output_dir / "vae")
        torch.save({"latents": (latents * vae.config["scaling_factor"]).half(), "masks": masks}, path)
    accelerator.wait_for_everyone()
    encodings, tokenizer = torch.load(path), build_tokenizer(vocabulary())
    return LatentPool(**encodings, world=tuple(world), tokenizer=tokenizer, seed=config.seed,
                      caption_dropout=config.caption_dropout)  # fmt: skip


def vae_folder(config: Config) -> Path:
    """The autoencoder trained in this run, or that of the pipeline it goes on from."""
    own = config.output_dir / "vae"
    return own if config.init_from is None or own.is_dir() else config.init_from / "vae"


def stage_of(config: Config, name: str) -> Stage:
    from personalize.stages import Stage

    index, folder = STAGES.index(name), config.output_dir
    return Stage(
        folder, name, config.steps[index], config.batch_sizes[index], config.learning_rates[index],
        config.lr_warmup_steps, name != "diffusion_64", config.checkpointing_steps,
        config.dataloader_num_workers, folder / "diffusion_64.pt" if name == "diffusion_128" else None,
    )  # fmt: skip


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
    known = {"nouns": config.nouns, "styles": config.styles, "backgrounds": BACKGROUNDS}
    world = known | {"updates": {last.stem: state["update"]}}
    (folder / "world.json").write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from personalize.cli import run_script

    raise SystemExit(run_script(Config, main))
