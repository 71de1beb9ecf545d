"""Train the small text-to-image model that ships with the package, from the scenes alone.

    accelerate launch train/embedded_model.py --output_dir runs/embedded

Stages, in order, each resumable: `autoencoder` (64 px crops), `diffusion` at 64 px, `diffusion` at 128 px, `export`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from personalize import pretraining, scenes
from personalize.randomness import generator
from personalize.training import fit

CORE_NOUNS = (
    "cat", "dog", "fox", "panda", "frog", "pig", "owl", "penguin", "fish", "crab", "butterfly", "apple", "banana",
    "strawberry", "pineapple", "mushroom", "sunflower", "cactus", "car", "bus", "rocket", "house", "guitar", "donut",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    output_dir: Path
    """Where checkpoints, the scene cache and the finished pipeline go; an unfinished run found there is resumed."""
    stage: Literal["autoencoder", "diffusion", "export"] = "autoencoder"
    """What to train now."""
    init_from: Path | None = None
    """Checkpoint of an earlier stage whose weights (and their average) this one starts from."""
    resolution: int = 64
    """Side of the training pictures in pixels."""
    max_train_steps: int = 5000
    """Optimiser updates of this stage, counted from its first start."""
    train_batch_size: int = 16
    """Pictures per update and process."""
    learning_rate: float = 5e-4
    """Peak rate of AdamW, after a warm-up and before a linear decay over the last fifth."""
    lr_warmup_steps: int = 100
    """Updates over which the rate rises from zero."""
    scene_pool: int = 12000
    """Scenes rendered and encoded ahead for the diffusion stages."""
    nouns: tuple[str, ...] = CORE_NOUNS
    """Nouns of the world."""
    styles: tuple[str, ...] = ("3d", "drawing")
    """Styles of the world; the held-out style is refused."""
    caption_dropout: float = 0.1
    """Share of samples whose caption is replaced by the empty one."""
    ema_decay: float = 0.999
    """Decay of the averaged weights that are exported."""
    checkpointing_steps: int = 200
    """Updates between two checkpoints."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the forward pass."""
    seed: int = 0
    """Seed of the networks, the scenes' captions, the noise and the timesteps."""


def main(config: Config) -> Path:
    if scenes.HELD_OUT_STYLE in config.styles:
        raise ValueError(f"style {scenes.HELD_OUT_STYLE!r} is held out of all training: choose among {scenes.TRAINING_STYLES}")
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
    if config.stage == "autoencoder":
        return train_autoencoder(config, accelerator)
    return train_diffusion(config, accelerator) if config.stage == "diffusion" else export(config)


def train_autoencoder(config: Config, accelerator: Accelerator) -> Path:
    objective = pretraining.AutoencoderObjective(pretraining.build_autoencoder())

    def batch(update: int) -> dict[str, Tensor]:
        pixels = torch.stack([scene_crop(config, sample) for sample in share(config, accelerator, update)])
        side = config.resolution // 4
        noise = torch.randn(len(pixels), 4, side, side, generator=generator(config.seed, "posterior", update, accelerator.process_index))
        return {"pixels": pixels, "noise": noise}

    train(config, accelerator, objective, batch)
    folder = config.output_dir / "vae"
    objective.vae.save_pretrained(folder)
    return folder


def scene_crop(config: Config, sample: int) -> Tensor:
    """A picture (3, r, r) in [−1, 1]: the whole scene at r = `resolution`, or a crop of it at twice that size."""
    rng = np.random.default_rng([config.seed, sample])
    scene = scenes.random_scene(sample, styles=scenes.TRAINING_STYLES)
    r = config.resolution
    if rng.random() < 0.4:
        image = scenes.render(scene, r)[0]
    else:
        left, top = rng.integers(0, r + 1, 2)
        image = scenes.render(scene, 2 * r)[0][top : top + r, left : left + r]
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


def share(config: Config, accelerator: Accelerator, update: int) -> range:
    """Global sample numbers of this process in `update`."""
    size = config.train_batch_size
    first = (update * accelerator.num_processes + accelerator.process_index) * size
    return range(first, first + size)


def train_diffusion(config: Config, accelerator: Accelerator) -> Path:
    tokenizer = pretraining.build_tokenizer(vocabulary())
    unet, text_encoder = pretraining.build_unet(), pretraining.build_text_encoder(tokenizer)
    if accelerator.device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # explicit products: 1.5 times the samples a second of fused ones
    objective = pretraining.TextToImageObjective(unet, text_encoder, pretraining.build_scheduler())
    latents, texts = scene_pool(config, accelerator)

    def batch(update: int) -> dict[str, Tensor]:
        rows = [draw(config, sample, latents, texts) for sample in share(config, accelerator, update)]
        ids = pretraining.tokenize(tokenizer, [str(row.pop("text")) for row in rows])
        return {"input_ids": ids, **{key: torch.stack([row[key] for row in rows]) for key in rows[0]}}

    ema = EMAModel(objective.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    train(config, accelerator, objective, batch, ema)
    ema.copy_to(objective.parameters())
    for name, part in {"unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer}.items():
        part.save_pretrained(config.output_dir / name)
    return config.output_dir


def export(config: Config) -> Path:
    """Write the averaged weights of the diffusion stage at `resolution` as a Stable Diffusion folder, in shards."""
    tokenizer = pretraining.build_tokenizer(vocabulary())
    unet, text_encoder = pretraining.build_unet(), pretraining.build_text_encoder(tokenizer)
    objective = pretraining.TextToImageObjective(unet, text_encoder, pretraining.build_scheduler())
    state = torch.load(config.output_dir / f"diffusion_{config.resolution}.pt", map_location="cpu", weights_only=True)
    for parameter, average in zip(objective.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    vae = pretraining.AutoencoderKL.from_pretrained(config.output_dir / "vae")
    folder = config.output_dir / "pipeline"
    pretraining.save_pipeline(folder, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)
    world = {"nouns": config.nouns, "styles": config.styles, "backgrounds": scenes.BACKGROUNDS, "updates": state["update"]}
    (folder / "world.json").write_text(json.dumps(world, indent=1) + "\n")
    return folder


def vocabulary() -> list[str]:
    """Every word of every caption of the world, so that each is one token."""
    words = {word for phrase in [*scenes.STYLES.values(), scenes.ANY_STYLE, *scenes.PLACES.values()] for word in phrase.split()}
    words |= {word for noun in scenes.NOUNS for word in scenes.noun_phrase(noun).split()}
    words |= {*scenes.COLOURS, *"a an and on the left right background photo of my".split()}
    return sorted(words)


def draw(config: Config, sample: int, latents: Tensor, texts: list[tuple[str, ...]]) -> dict:
    """Sample number `sample`: which scene, which of its captions (or none), its timestep and its noise."""
    rng = generator(config.seed, "diffusion", 0, sample)
    index = int(torch.randint(len(latents), (1,), generator=rng))
    choice = int(torch.randint(len(texts[index]), (1,), generator=rng))
    dropped = bool(torch.rand((), generator=rng) < config.caption_dropout)
    clean = latents[index].float()
    return {
        "text": "" if dropped else texts[index][choice],
        "latents": clean,
        "timesteps": torch.randint(1000, (), generator=rng),
        "noise": torch.randn(clean.shape, generator=rng),
    }


def scene_pool(config: Config, accelerator: Accelerator) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Scaled latents (N, 4, r/4, r/4) in fp16 of `scene_pool` scenes and their captions, made once and kept."""
    world = [
        scenes.random_scene(index, nouns=config.nouns, styles=config.styles) for index in range(config.scene_pool)
    ]
    path = config.output_dir / f"pool_{config.resolution}_{config.scene_pool}.pt"
    if accelerator.is_main_process and not path.is_file():
        torch.save(encoded(config, accelerator, world), path)
    accelerator.wait_for_everyone()
    return torch.load(path), [scenes.captions(scene) for scene in world]


@torch.inference_mode()
def encoded(config: Config, accelerator: Accelerator, world: list[scenes.Scene]) -> Tensor:
    """Latents of `world`; the first thousand scenes set the scaling factor, 1 / their standard deviation."""
    vae = pretraining.AutoencoderKL.from_pretrained(config.output_dir / "vae").to(accelerator.device).eval()
    parts = []
    for start in range(0, len(world), 64):
        images = np.stack([scenes.render(scene, config.resolution)[0] for scene in world[start : start + 64]])
        pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        with accelerator.autocast():
            parts.append(vae.encode(pixels.to(accelerator.device)).latent_dist.mean.float().cpu())
    latents = torch.cat(parts)
    if "scaling_factor_measured" not in vae.config:
        vae.register_to_config(scaling_factor=float(1 / latents[:1000].std()), scaling_factor_measured=True)
        vae.save_config(config.output_dir / "vae")
    return (latents * vae.config["scaling_factor"]).half()


def train(config, accelerator: Accelerator, objective: nn.Module, batch, ema: EMAModel | None = None) -> None:
    """Run one stage of training, resuming from its checkpoint if there is one."""
    name = config.stage if ema is None else f"{config.stage}_{config.resolution}"
    checkpoint = config.output_dir / f"{name}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(config, update))
    first = 0
    if (start := checkpoint if checkpoint.is_file() else config.init_from) is not None:
        state = torch.load(start, map_location="cpu", weights_only=True)
        objective.load_state_dict(state["objective"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        if start == checkpoint:
            first = state["update"]
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
    objective, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)

    def save(update: int) -> None:
        state = {
            "update": update,
            "objective": accelerator.unwrap_model(objective).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        if ema is not None:
            state["ema"] = ema.state_dict()
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").rename(checkpoint)

    batches = ({k: v.to(accelerator.device) for k, v in batch(u).items()} for u in range(first, config.max_train_steps))
    mean, started = {}, time.monotonic()
    for report in fit(objective, batches, optimizer, accelerator=accelerator, scheduler=scheduler, max_grad_norm=1.0, first_update=first):
        if ema is not None:
            ema.step(objective.parameters())
        mean = {key: 0.98 * mean.get(key, float(value)) + 0.02 * float(value) for key, value in report.losses.items()}
        if report.update % 50 == 0 and accelerator.is_main_process:
            speed = (report.update - first) * config.train_batch_size / (time.monotonic() - started)
            accelerator.print(json.dumps({"stage": name, "update": report.update, "samples_per_second": round(speed, 1), **{k: round(v, 5) for k, v in mean.items()}}), flush=True)
        if report.update % config.checkpointing_steps == 0 and accelerator.is_main_process:
            save(report.update)
    if accelerator.is_main_process and first < config.max_train_steps:
        save(config.max_train_steps)


def rate(config: Config, update: int) -> float:
    """The rate's factor: up over the warm-up, level, then down to 2 % over the last fifth."""
    left = (config.max_train_steps - update) / (0.2 * config.max_train_steps)
    return min(1.0, (update + 1) / config.lr_warmup_steps, max(0.02, left))


if __name__ == "__main__":
    main(tyro.cli(Config))
