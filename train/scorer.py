"""Train the small scorer that ships with the package and chooses among pictures of the embedded model.

    personalize train scorer --output_dir runs/scorer            # about twenty minutes on one core

It learns from rendered scenes of streams of its own, some of which went through the embedded model's autoencoder with
noise on their latents.  With `--install` the weights are put where the package looks for them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from personalize.scene_scorer import ScorerNet


@dataclass(frozen=True)
class Config:
    output_dir: Path
    """Where scenes, checkpoint and weights go; an unfinished run found there is resumed."""
    install: bool = False
    """Put the finished weights into the package too."""
    scenes: int = 14000
    """Rendered scenes to learn from."""
    autoencoded: int = 900
    """Scenes more, seen through the embedded model's autoencoder; 0 does without the model."""
    test_scenes: int = 1000
    """Held-out scenes to be measured on."""
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
    """Train, measure, write the weights; returns their file."""
    import torch

    from personalize import scene_scorer
    from personalize.scorer_training import accuracy

    config.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
    net = train(config, scene_scorer.ScorerNet(config.widths))
    file = config.output_dir / "scorer.safetensors"
    about = {"widths": list(config.widths), "settings": settings(config)}
    scene_scorer.save(net, file, about)
    scorer = scene_scorer.SceneScorer.load(file)  # as it will be used, in half precision
    report: dict[str, Any] = {"rendered": accuracy(scorer, "scorer-test", config.test_scenes)}
    if config.autoencoded:
        report["autoencoded"] = accuracy(scorer, "scorer-test", config.test_scenes // 5, autoencoder(noise=0.0))
    print(json.dumps(report))
    for path in [file, *([scene_scorer.WEIGHTS] if config.install else [])]:
        scene_scorer.save(net, path, about | {"report": report})
    return file


def settings(config: Config) -> dict[str, Any]:
    """What decides the weights."""
    kept = {key: value for key, value in asdict(config).items() if key not in ("output_dir", "install")}
    return kept | {"train_split": "scorer-train", "test_split": "scorer-test"}


def train(config: Config, net: ScorerNet) -> ScorerNet:
    """Make the updates, from the checkpoint if there is one; returns the averaged network."""
    import torch
    from accelerate import Accelerator
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from personalize.scorer_training import ScorerData, ScorerObjective
    from personalize.training import training_steps

    objective = ScorerObjective(net)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=0.02)
    steps, size = config.max_train_steps, config.train_batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    parts = {"net": net, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    path = config.output_dir / "checkpoint.pt"
    state = torch.load(path, weights_only=True) if path.is_file() else {"update": 0}
    for name in parts if state["update"] else ():
        parts[name].load_state_dict(state[name])
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    data, first, started = ScorerData(**scenes(config), seed=config.seed), state["update"], time.monotonic()
    batches = (data.batch(u, range(u * size, (u + 1) * size)) for u in range(first, steps))
    for report in training_steps(
        prepared, batches, optimizer, accelerator=accelerator, lr_scheduler=schedule, max_grad_norm=1.0,
        first_update=first,
    ):  # fmt: skip
        averaged.update_parameters(net)
        if report.update % 50 == 0:
            figures = {name: round(float(value), 4) for name, value in report.losses.items()}
            speed = round((report.update - first) * size / (time.monotonic() - started), 1)
            print(json.dumps({"update": report.update, "scenes_per_s": speed} | figures), flush=True)
        if report.update % config.checkpointing_steps == 0 or report.update == steps:
            whole = {"update": report.update} | {name: part.state_dict() for name, part in parts.items()}
            torch.save(whole, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
    return averaged.module  # pyright: ignore[reportReturnType]


def scenes(config: Config) -> dict[str, Tensor]:
    """All scenes to learn from, rendered once and kept."""
    import torch

    from personalize.scorer_training import rendered

    path = config.output_dir / f"scenes_{config.scenes}_{config.autoencoded}.pt"
    if not path.is_file():
        plain, change = range(config.scenes), autoencoder(noise=0.4) if config.autoencoded else None
        passed = range(config.scenes, config.scenes + config.autoencoded)
        parts = [rendered("scorer-train", plain[start : start + 100]) for start in range(0, len(plain), 100)]
        parts += [rendered("scorer-train", passed[start : start + 20], change) for start in range(0, len(passed), 20)]
        torch.save({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return torch.load(path)


def autoencoder(noise: float) -> Any:
    """Through the embedded model's autoencoder, with up to `noise` units of noise on the (unit-sized) latents."""
    import torch

    from personalize.model import StableDiffusion
    from personalize.randomness import generator

    model, rng = StableDiffusion.load(device="cpu"), generator(0, "autoencoder")

    def change(pixels: Tensor) -> Tensor:
        latents = model.encode(pixels)
        strength = noise * torch.rand(len(pixels), 1, 1, 1, generator=rng)
        return model.decode(latents + strength * torch.randn(latents.shape, generator=rng))

    return change


if __name__ == "__main__":
    from personalize.cli import run_script

    raise SystemExit(run_script(Config, main))
