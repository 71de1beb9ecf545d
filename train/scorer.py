"""Train the small scorer that ships with the package and ranks pictures of the embedded model.

    personalize train scorer --output_dir runs/scorer            # about twenty minutes on one core

It learns from rendered scenes of data splits of its own.  Some of them are passed through the embedded model's
autoencoder, with noise added to the latents.  `--install` also writes the weights into the package.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from personalize.evaluation.scene_scorer import ScorerNet


@dataclass(frozen=True)
class Config:
    output_dir: Path
    """Where scenes, checkpoint and weights go; an unfinished run found there is resumed."""
    install: bool = False
    """Write the finished weights into the package too."""
    scenes: int = 14000
    """Rendered scenes to train on."""
    autoencoded: int = 900
    """Further scenes, which pass through the embedded model's autoencoder; with 0 the model is not needed."""
    test_scenes: int = 1000
    """Held-out scenes on which the accuracy is measured."""
    widths: tuple[int, int, int] = (24, 56, 112)
    """Channels at 32×32, 16×16 and 8×8."""
    max_train_steps: int = 2600
    """Optimiser updates."""
    train_batch_size: int = 48
    """Scenes per update."""
    learning_rate: float = 3e-3
    """Peak rate of AdamW; it rises over the first tenth, then falls as a cosine."""
    checkpointing_steps: int = 100
    """Updates between two checkpoints."""
    seed: int = 7
    """Seed of weights, draws and augmentations."""


def main(config: Config) -> Path:
    """Train, measure the accuracy on held-out scenes, and write the weights; returns their file."""
    import torch

    from personalize.evaluation import scene_scorer
    from personalize.training.pretraining.scorer import accuracy

    config.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
    net = train(config, scene_scorer.ScorerNet(config.widths))
    file = config.output_dir / "scorer.safetensors"
    info = {"widths": list(config.widths), "settings": settings(config)}
    scene_scorer.save(net, file, info)
    scorer = scene_scorer.SceneScorer.load(file)  # rounded to half precision, as it will be used
    report: dict[str, Any] = {"rendered": accuracy(scorer, "scorer-test", config.test_scenes)}
    if config.autoencoded:
        report["autoencoded"] = accuracy(scorer, "scorer-test", config.test_scenes // 5, autoencoder(noise=0.0))
    print(json.dumps(report))
    for path in [file, *([scene_scorer.WEIGHTS] if config.install else [])]:
        scene_scorer.save(net, path, info | {"report": report})
    return file


def settings(config: Config) -> dict[str, Any]:
    """The options that determine the weights, and the data splits."""
    options = {key: value for key, value in asdict(config).items() if key not in ("output_dir", "install")}
    return options | {"train_split": "scorer-train", "test_split": "scorer-test"}


def train(config: Config, net: ScorerNet) -> ScorerNet:
    """Train `net` from the checkpoint, if there is one, to the last update; returns the averaged network."""
    import torch
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from personalize.training.pretraining.scorer import ScorerData, ScorerObjective
    from personalize.training.pretraining.stages import Stage, run_stage

    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=0.02)
    updates = config.max_train_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=updates + 1, pct_start=0.1
    )
    run_stage(
        Stage(config.output_dir, "scorer", updates, config.train_batch_size, config.checkpointing_steps),
        Accelerator(cpu=True, mixed_precision="bf16"), ScorerObjective(net),
        ScorerData(**scenes(config), seed=config.seed).batch, optimizer, schedule,
        average=averaged, update_average=lambda: averaged.update_parameters(net),
    )  # fmt: skip
    return averaged.module  # pyright: ignore[reportReturnType]


def scenes(config: Config) -> dict[str, Tensor]:
    """The training scenes, rendered once and kept in the output folder."""
    import torch

    from personalize.training.pretraining.scorer import rendered

    path = config.output_dir / f"scenes_{config.scenes}_{config.autoencoded}.pt"
    if not path.is_file():
        plain, change = range(config.scenes), autoencoder(noise=0.4) if config.autoencoded else None
        coded = range(config.scenes, config.scenes + config.autoencoded)
        parts = [rendered("scorer-train", plain[start : start + 100]) for start in range(0, len(plain), 100)]
        parts += [rendered("scorer-train", coded[start : start + 20], change) for start in range(0, len(coded), 20)]
        torch.save({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return torch.load(path, weights_only=True)


def autoencoder(noise: float) -> Any:
    """A function that passes pixels through the embedded model's autoencoder, with noise added to the latents.

    The noise's standard deviation is uniform in [0, `noise`]; the latents' own is about 1.
    """
    import torch

    from personalize.models.stable_diffusion import StableDiffusion
    from personalize.randomness import generator

    model, rng = StableDiffusion.load(device="cpu"), generator(0, "autoencoder")

    def change(pixels: Tensor) -> Tensor:
        latents = model.encode(pixels)
        strength = noise * torch.rand(len(pixels), 1, 1, 1, generator=rng)
        return model.decode(latents + strength * torch.randn(latents.shape, generator=rng))

    return change


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
