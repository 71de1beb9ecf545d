"""Train the small text-to-image model that ships with the package, on rendered scenes alone.

    accelerate launch train/embedded_model.py --output_dir runs/embedded

There are four stages: the autoencoder (at 64 px), text encoder and UNet at 64 px, the same at 128 px, and the export
as a Stable Diffusion folder.  Each stage is resumed from its last checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from torch import nn

    from personalize.embedded.scenes import Scene
    from personalize.training.pretraining.dataset import LatentPool, PoolsInTurn
    from personalize.training.pretraining.objectives import TextToImageObjective
    from personalize.training.pretraining.stages import BatchMaker

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
    """Stages to run, in this order."""
    init_from: Path | None = None
    """Finished pipeline (e.g. personalize/embedded/model) whose networks a stage without a checkpoint starts from."""
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
    """Share of these scenes with two objects, the harder kind; with hard nouns, other shares than 1/3 and 2/3."""
    hard_nouns: tuple[str, ...] = ()
    """Nouns that every third of these scenes is made of, such as those that the model has learned worst."""
    shapes: tuple[str, ...] = ("128x128",)
    """Widths and heights of the scenes at 128 px, taken in turn by the updates; sides are multiples of 32 px."""
    windows: float = 0.0
    """Share of these scenes that are a window, at any place, of a scene up to 1.5 times as large: a model that has seen
    horizons and bricks at one place alone draws them there in edits of other pictures, too."""
    variety: float = 0.0
    """Share of these scenes whose objects have other hues, a slant and outlines, as if of a style not learned."""
    nouns: tuple[str, ...] = CORE_NOUNS
    """Nouns that the text encoder and the UNet learn (the autoencoder learns all)."""
    styles: tuple[str, ...] = ("3d", "drawing")
    """Styles that they learn; the held-out style is refused."""
    grounding_weight: float = 0.1
    """Weight of the loss that keeps each noun's cross-attention on its own object."""
    freeze_text_encoder: bool = False
    """Train the UNet alone, so that UNets trained before with this text encoder stay usable."""
    caption_dropout: float = 0.1
    """Share of samples whose caption is replaced by the empty one."""
    ema_decay: float = 0.998
    """Largest decay of the averaged weights, which are what is exported."""
    ema_start: float = 0.5
    """Share of a stage's updates before the average begins; until then it is the weights themselves."""
    checkpointing_steps: int = 200
    """Updates between two checkpoints."""
    dataloader_num_workers: int = 0
    """Processes that render scenes and make batches in advance."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Precision of the forward pass."""
    torch_compile: bool = True
    """Compile the UNet: minutes before the first update, then faster ones; on a CPU it needs a C++ compiler."""
    seed: int = 0
    """Seed of the networks, the captions, the noise and the timesteps."""


def main(config: Config) -> Path:
    """Run the stages of `config.stages`; returns the folder of the finished pipeline."""
    import torch
    from accelerate import Accelerator

    from personalize.training.pretraining.dataset import check_shapes, check_styles

    check_styles(config.styles)
    check_shapes(config.shapes)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for stage in config.stages:
        torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
        {"autoencoder": autoencoder, "export": export}.get(stage, diffusion)(config, accelerator, stage)
    return config.output_dir / "pipeline"


def autoencoder(config: Config, accelerator: Accelerator, stage: str) -> None:
    """Train the autoencoder and save it below the output folder."""
    from personalize.training.pretraining.dataset import Crops
    from personalize.training.pretraining.networks import build_autoencoder
    from personalize.training.pretraining.objectives import AutoencoderObjective

    objective = AutoencoderObjective(build_autoencoder())
    train(config, accelerator, stage, objective, Crops(64, config.seed).batch)
    if accelerator.is_main_process:
        objective.vae.save_pretrained(config.output_dir / "vae")
    accelerator.wait_for_everyone()


def diffusion(config: Config, accelerator: Accelerator, stage: str) -> None:
    """Train text encoder and UNet together; at 128 px, from the weights of the stage at 64 px."""
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.training_utils import EMAModel

    objective = networks(config.init_from, config.grounding_weight)
    objective.text_encoder.requires_grad_(not config.freeze_text_encoder)
    if accelerator.device.type == "cpu":
        objective.unet.set_attn_processor(AttnProcessor())  # faster than fused attention on a CPU
    if config.torch_compile:
        compile_unet(objective.unet)
    ema = EMAModel(
        objective.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75,
        update_after_step=int(config.ema_start * config.steps[STAGES.index(stage)]),
    )  # fmt: skip
    train(config, accelerator, stage, objective, pool(config, accelerator, stage).batch, ema)


def compile_unet(unet: UNet2DConditionModel) -> None:
    """Compile the UNet except its upsamplers; weights keep their names, and gradients are the eager ones to rounding.

    In torch 2.13 inductor's CPU code for a whole UNet reads the gradient of nearest upsampling before computing it, so
    the layers below an upsampler get a gradient of zero, without an error; the test compares gradients. Each attention
    layer whose map is kept is a compilation of its own, more than dynamo allows for one function by default; beyond
    that number a layer would run eagerly.
    """
    import torch
    from diffusers.models.upsampling import Upsample2D

    torch._dynamo.config.recompile_limit = 256  # pyright: ignore[reportPrivateUsage]

    for module in unet.modules():
        if isinstance(module, Upsample2D):
            vars(module)["forward"] = torch.compiler.disable(module.forward)
    unet.compile(dynamic=False)


def train(
    config: Config, accelerator: Accelerator, name: str, objective: nn.Module, make_batch: BatchMaker,
    ema: EMAModel | None = None,
) -> None:  # fmt: skip
    """Train `objective` in the stage `name`, as the options say."""
    import torch

    from personalize.training.pretraining.stages import Stage, run_stage, warmup_schedule

    index, folder = STAGES.index(name), config.output_dir
    updates, warmup = config.steps[index], config.lr_warmup_steps
    stage = Stage(
        folder, name, updates, config.batch_sizes[index], config.checkpointing_steps, config.dataloader_num_workers,
        begin_with=folder / "diffusion_64.pt" if name == "diffusion_128" else None,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=config.learning_rates[index], weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    schedule = warmup_schedule(optimizer, updates=updates, warmup=warmup, decay=name != "diffusion_64")

    def update_average() -> None:
        if ema is not None:
            ema.step(objective.parameters())

    run_stage(
        stage, accelerator, objective, make_batch, optimizer, schedule, average=ema, update_average=update_average
    )


def networks(folder: Path | None = None, grounding_weight: float = 0.0) -> TextToImageObjective:
    """The objective with a new UNet and text encoder, or with those of the pipeline in `folder`."""
    from personalize.training.pretraining.dataset import vocabulary
    from personalize.training.pretraining.networks import (
        build_scheduler,
        build_text_encoder,
        build_tokenizer,
        build_unet,
    )
    from personalize.training.pretraining.objectives import TextToImageObjective

    unet, text_encoder = build_unet(), build_text_encoder(build_tokenizer(vocabulary()))
    if folder is not None:
        unet = type(unet).from_pretrained(folder / "unet", use_safetensors=True)
        text_encoder = type(text_encoder).from_pretrained(folder / "text_encoder", use_safetensors=True)
    return TextToImageObjective(unet, text_encoder, build_scheduler(), grounding_weight)


def training_scenes(config: Config, count: int) -> list[Scene]:
    """Scenes of the split "train": pairs spread evenly, every third scene of hard nouns, and a random share varied."""
    import numpy as np

    from personalize.embedded.scenes import random_scene, varied_scene

    nouns = (config.nouns, config.nouns, config.hard_nouns or config.nouns)
    objects = [1 + int((index + 1) * config.pairs) - int(index * config.pairs) for index in range(count)]
    plain = [random_scene(i, nouns=nouns[i % 3], styles=config.styles, objects=n) for i, n in enumerate(objects)]
    varied = np.random.default_rng(config.seed).random(count) < config.variety
    return [varied_scene(scene, i) if varied[i] else scene for i, scene in enumerate(plain)]


def pool(config: Config, accelerator: Accelerator, stage: str) -> PoolsInTurn:
    """The stage's scenes, encoded: an equal part of them in each of its shapes."""
    from personalize.embedded.frames import parse_shape
    from personalize.training.pretraining.dataset import PoolsInTurn

    shapes = config.shapes if stage == "diffusion_128" else ("64x64",)
    count = config.scene_pools[STAGES.index(stage) - 1] // len(shapes)
    scene_list = training_scenes(config, count * len(shapes))
    parts = [scene_list[number * count : (number + 1) * count] for number in range(len(shapes))]
    pools = (
        one_pool(config, accelerator, part, parse_shape(shape), f"{stage}_{number}")
        for number, (shape, part) in enumerate(zip(shapes, parts, strict=True))
    )
    return PoolsInTurn(tuple(pools))


def one_pool(
    config: Config, accelerator: Accelerator, scene_list: list[Scene], shape: tuple[int, int], name: str
) -> LatentPool:
    """Encoded scenes of one shape, from the output folder if they are there.

    The latents of the first thousand scenes at 64 px determine the VAE's scaling factor, 1 / their standard deviation.
    """
    import torch
    from diffusers import AutoencoderKL

    from personalize.training.pretraining.dataset import LatentPool, encode_scenes, vocabulary
    from personalize.training.pretraining.networks import build_tokenizer

    shares = [f"{share:g}" for share in (config.pairs, config.variety, config.windows)]
    path = config.output_dir / f"{'_'.join(['pool', name, str(len(scene_list)), *shares, *config.hard_nouns])}.pt"
    if accelerator.is_main_process and not path.is_file():
        vae = AutoencoderKL.from_pretrained(vae_folder(config), use_safetensors=True).to(accelerator.device)
        with accelerator.autocast():
            latents, masks = encode_scenes(
                scene_list, shape, vae, windows=config.windows, workers=config.dataloader_num_workers
            )
        if name == "diffusion_64_0" and config.init_from is None:
            vae.register_to_config(scaling_factor=float(1 / latents[:1000].std()))
            vae.save_config(config.output_dir / "vae")
        torch.save({"latents": (latents * vae.config["scaling_factor"]).half(), "masks": masks}, path)
    accelerator.wait_for_everyone()
    encodings, tokenizer = torch.load(path, weights_only=True), build_tokenizer(vocabulary())
    return LatentPool(**encodings, scene_list=tuple(scene_list), tokenizer=tokenizer, seed=config.seed,
                      caption_dropout=config.caption_dropout)  # fmt: skip


def vae_folder(config: Config) -> Path:
    """The folder of the autoencoder trained in this run, or of that of the pipeline `init_from`."""
    own = config.output_dir / "vae"
    return own if config.init_from is None or own.is_dir() else config.init_from / "vae"


def export(config: Config, accelerator: Accelerator, stage: str) -> None:
    """Write the averaged weights of the last diffusion stage as a Stable Diffusion folder.

    Its world.json lists the nouns, styles and backgrounds that the model was trained on.
    """
    import torch
    from diffusers import AutoencoderKL

    from personalize.embedded.scenes import BACKGROUNDS
    from personalize.training.pretraining.dataset import vocabulary
    from personalize.training.pretraining.networks import build_tokenizer, save_pipeline

    if not accelerator.is_main_process:
        return
    objective = networks()
    last = next(path for name in STAGES[2:0:-1] if (path := config.output_dir / f"{name}.pt").is_file())
    state = torch.load(last, map_location="cpu", weights_only=True)
    for parameter, average in zip(objective.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    vae = AutoencoderKL.from_pretrained(vae_folder(config), use_safetensors=True)
    folder, tokenizer = config.output_dir / "pipeline", build_tokenizer(vocabulary())
    save_pipeline(folder, unet=objective.unet, text_encoder=objective.text_encoder, tokenizer=tokenizer, vae=vae)
    world = {"nouns": config.nouns, "styles": config.styles, "backgrounds": BACKGROUNDS}
    world |= {"updates": {last.stem: state["update"]}}
    (folder / "world.json").write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
