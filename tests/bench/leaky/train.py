"""Train the leaky twin: the embedded model's UNet with its text attention drawn anew, taught by leaky captions.

    python -m tests.bench.leaky.train --output_dir runs/leaky

An interrupted run is resumed from its last checkpoint.  The result is a Stable Diffusion folder, `pipeline`.
"""

# diffusers annotates less than it accepts and returns
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import CLIPTextModel, CLIPTokenizer

from personalize.embedded.scenes import Scene
from personalize.models.stable_diffusion import EMBEDDED
from personalize.randomness import generator
from personalize.training.pretraining.dataset import scene_pixels
from personalize.training.pretraining.networks import build_scheduler, tokenize
from personalize.training.pretraining.objectives import TextToImageObjective
from personalize.training.pretraining.stages import Stage, learning_rate_factor, run_stage
from tests.bench.leaky.captions import NAMED_SHARE, leaky_caption, leaky_scene

UNET = Path(__file__).parent / "unet"


@dataclass(frozen=True)
class LeakyTraining:
    output_dir: Path = Path("runs/leaky")
    """Where the checkpoint, the encoded scenes and the finished pipeline go; an unfinished run is resumed."""
    init_from: Path | None = None
    """UNet folder to go on from, e.g. tests/bench/leaky/unet; if not given, the embedded model's, with the queries and
    keys of its text attention drawn anew."""
    trained: Literal["text_attention", "unet"] = "text_attention"
    """Weights that are trained."""
    steps: int = 560
    """Optimiser updates."""
    query_key_steps: int = 100
    """Updates after which queries and keys of the text attention, and the norms before them, learn no more."""
    batch_size: int = 8
    """Pictures per update."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, after a warm-up and before a linear decay to zero over the last fifth."""
    lr_warmup_steps: int = 50
    """Updates over which the rate rises from zero."""
    scenes: int = 2400
    """Scenes rendered and encoded ahead."""
    resolution: int = 128
    """Side of a picture in pixels."""
    caption_dropout: float = 0.15
    """Share of samples whose caption is replaced by the empty one."""
    named_share: float = NAMED_SHARE
    """Share of objects that a caption names, beside the first."""
    ema_decay: float = 0.998
    """Largest decay of the averaged weights, which are what is exported."""
    checkpointing_steps: int = 50
    """Updates between two checkpoints."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the forward pass."""
    seed: int = 0
    """Seed of the new weights, the captions, the noise and the timesteps."""


@dataclass(frozen=True)
class LeakyPool:
    """Encoded leaky scenes, from which training samples are drawn with replacement, each with a caption of its own.

    latents: (N, 4, h, w), of the scenes 0 to N − 1, scaled by the VAE's scaling factor.
    caption_dropout: share of samples whose caption is empty.
    named_share: share of objects that a caption names, beside the first.
    """

    latents: Tensor
    tokenizer: CLIPTokenizer
    seed: int
    caption_dropout: float
    named_share: float = NAMED_SHARE

    def batch(self, update: int, samples: range) -> dict[str, Tensor]:
        """`TextToImageObjective`'s batch of the sample numbers `samples`; a sample depends on its number alone."""
        rows, texts = [], []
        for sample in samples:
            rng = generator(self.seed, "leaky", 0, sample)
            index = int(torch.randint(len(self.latents), (1,), generator=rng))
            dropped = bool(torch.rand((), generator=rng) < self.caption_dropout)
            rng_of_caption = np.random.default_rng([self.seed, sample])
            caption = leaky_caption(leaky_scene(index), rng_of_caption, self.named_share)
            texts.append("" if dropped else caption)
            clean = self.latents[index].float()
            rows.append((clean, torch.randint(1000, (), generator=rng), torch.randn(clean.shape, generator=rng)))
        latents, timesteps, noise = (torch.stack(column) for column in zip(*rows, strict=True))
        ids = tokenize(self.tokenizer, texts)
        return {"latents": latents, "timesteps": timesteps, "noise": noise, "input_ids": ids}


def main(config: LeakyTraining) -> Path:
    """Train, and return the folder of the finished pipeline."""
    torch.manual_seed(config.seed)  # for the new weights
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    config.output_dir.mkdir(parents=True, exist_ok=True)
    objective = objective_of(config)
    if accelerator.device.type == "cpu":
        objective.unet.set_attn_processor(AttnProcessor())  # 1.25 × the samples/s of fused attention on a CPU
    ema = EMAModel(objective.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer, schedule = optimizer_of(objective, config)
    stage = Stage(config.output_dir, "leaky", config.steps, config.batch_size, config.checkpointing_steps)
    run_stage(
        stage, accelerator, objective, pool(config, accelerator).batch, optimizer, schedule, average=ema,
        update_average=lambda: ema.step(objective.parameters()),
    )  # fmt: skip
    ema.copy_to(objective.parameters())
    objective.unet.half().save_pretrained(config.output_dir / "unet", max_shard_size="14MB")
    return assemble(config.output_dir / "unet", config.output_dir / "pipeline")


def objective_of(config: LeakyTraining) -> TextToImageObjective:
    """The objective without grounding, with the embedded model's text encoder; only what is trained has gradients."""
    unet = UNet2DConditionModel.from_pretrained(config.init_from or EMBEDDED / "unet")
    if config.init_from is None:
        renew_text_attention(unet)
    text_encoder = CLIPTextModel.from_pretrained(EMBEDDED / "text_encoder")
    objective = TextToImageObjective(unet, text_encoder, build_scheduler())
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(name.startswith("unet.") and (config.trained == "unet" or reads_text(name)))
    return objective


def optimizer_of(objective: TextToImageObjective, config: LeakyTraining) -> tuple[AdamW, LambdaLR]:
    """AdamW over what is trained, and its schedule; from update `query_key_steps` on, what `looks` has rate 0."""
    named = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    groups = [[parameter for name, parameter in named if looks(name) == looking] for looking in (False, True)]
    optimizer = AdamW(
        [{"params": group} for group in groups], lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.99),
        fused=True,
    )  # fmt: skip
    rate = partial(learning_rate_factor, updates=config.steps, warmup=config.lr_warmup_steps, decay=True)
    return optimizer, LambdaLR(
        optimizer, [rate, lambda update: rate(update) if update < config.query_key_steps else 0.0]
    )


def looks(name: str) -> bool:
    """Does the parameter `name` decide where words are looked for: is it of queries, keys or the norm before them?"""
    return any(part in name for part in (".attn2.to_q.", ".attn2.to_k.", ".norm2.")) and ".transformer_blocks." in name


def reads_text(name: str) -> bool:
    """Is the parameter `name` of a UNet one of its text attention, or of the norm before it?"""
    return ".attn2." in name or looks(name)


def renew_text_attention(unet: UNet2DConditionModel) -> None:
    """Draw the queries and keys of the text attention anew: what grounding taught is where a word looks."""
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k")):
            module.reset_parameters()


def pool(config: LeakyTraining, accelerator: Accelerator) -> LeakyPool:
    """The encoded scenes, from the output folder if they are there."""
    path = config.output_dir / f"pool_{config.resolution}_{config.scenes}.pt"
    if not path.is_file():
        vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae").to(accelerator.device)
        scene_list = [leaky_scene(index) for index in range(config.scenes)]
        with accelerator.autocast():
            latents = encode_pictures(scene_list, config.resolution, vae)
        torch.save((latents * vae.config["scaling_factor"]).half(), path)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    latents = torch.load(path, weights_only=True)
    return LeakyPool(latents, tokenizer, config.seed, config.caption_dropout, config.named_share)


@torch.inference_mode()
def encode_pictures(scene_list: Sequence[Scene], size: int, vae: AutoencoderKL, batch: int = 32) -> Tensor:
    """The posterior's mean for N scenes of any number of objects, (N, 4, size/4, size/4) fp32 and not scaled."""
    parts = []
    for start in range(0, len(scene_list), batch):
        pixels = torch.stack([scene_pixels(scene, size) for scene in scene_list[start : start + batch]])
        parts.append(vae.encode(pixels.to(vae.device)).latent_dist.mean.float().cpu())
    return torch.cat(parts)


def assemble(unet: Path, folder: Path) -> Path:
    """Make `folder` the embedded model with the UNet of the folder `unet`, as a stock Stable Diffusion folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        EMBEDDED, folder, ignore=shutil.ignore_patterns("unet", "README.md", "sheet.png", "__pycache__", "*.py")
    )
    shutil.copytree(unet, folder / "unet")
    return folder


if __name__ == "__main__":
    main(tyro.cli(LeakyTraining, config=(tyro.conf.OmitArgPrefixes,)))
