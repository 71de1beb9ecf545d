"""Train the judge on rendered scenes of all styles and nouns.

    python -m tests.bench.train_judge                                # reproduces tests/bench/judge.safetensors
    python -m tests.bench.train_judge --train_split scorer-train --test_split scorer-test --seed 1 \\
        --widths 48 64 128 --run_dir runs/scorer --output scorer.safetensors   # a scorer: other data, weights, widths

Scenes are rendered once into `run_dir`; an unfinished run found there is resumed.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from personalize.randomness import generator
from personalize.scenes import BACKGROUNDS, NOUNS, STYLES, Scene, render
from tests.bench.degradation import degraded
from tests.bench.judge import SIDE, WEIGHTS, WIDTHS, Judge, JudgeNet, pooled, save
from tests.bench.judge_accuracy import accuracy, judged_scene

SHARD = 4000  # scenes rendered per file
NOTHING = -1  # label of a second object that is not there, and of the style of an empty scene


@dataclass(frozen=True)
class JudgeConfig:
    output: Path = WEIGHTS
    """Where the weights go."""
    run_dir: Path = Path("runs/judge")
    """Where rendered scenes and the checkpoint are kept."""
    train_split: str = "judge-train"
    """Stream of scenes to learn from."""
    test_split: str = "judge-test"
    """Stream of scenes to be measured on."""
    seed: int = 0
    """Seed of the weights and of the degradations."""
    widths: tuple[int, int, int] = WIDTHS
    """Channels of the network's three stages."""
    scenes: int = 48000
    """Scenes to learn from, rendered ahead."""
    test_scenes: int = 4000
    """Held-out scenes the accuracy is measured on."""
    max_train_steps: int = 4500
    """Updates."""
    train_batch_size: int = 64
    """Scenes per update."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW, one cycle."""
    checkpointing_steps: int = 250
    """Updates between two checkpoints (and two exported weights)."""


def main(config: JudgeConfig) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
    net = train(config, JudgeNet(config.widths))
    export(config, net, {})
    report = accuracy(Judge.load(config.output), config.test_split, config.test_scenes)
    export(config, net, report)
    print(json.dumps(report))


def shard(config: JudgeConfig, number: int) -> dict[str, np.ndarray]:
    """Scenes `number`·SHARD … as arrays: images (n, 64, 64, 3), owner (n, 64, 64) 0 none/1/2, labels (n, 4)."""
    first, end = number * SHARD, min((number + 1) * SHARD, config.scenes)
    path = config.run_dir / f"{config.train_split}_{first}_{end}.npz"
    if not path.is_file():
        rows = [labelled(judged_scene(config.train_split, index)) for index in range(first, end)]
        arrays = [np.stack(column) for column in zip(*rows, strict=True)]
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, images=arrays[0], owner=arrays[1], labels=arrays[2])
        partial.rename(path)
    return dict(np.load(path))


def labelled(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image, masks = render(scene, SIDE)
    owner = np.zeros((SIDE, SIDE), np.uint8)
    for number, mask in enumerate(masks, 1):
        owner[mask] = number
    nouns = [NOUNS.index(thing.noun) for thing in scene.objects] + [NOTHING, NOTHING]
    style = list(STYLES).index(scene.objects[0].style) if scene.objects else NOTHING
    return image, owner, np.array([*nouns[:2], BACKGROUNDS.index(scene.background), style], np.int64)


def train(config: JudgeConfig, net: JudgeNet) -> JudgeNet:
    """Run (or finish) the training; returns the averaged network, which is also exported at every checkpoint."""
    data = [shard(config, number) for number in range(math.ceil(config.scenes / SHARD))]
    images, owner, labels = (np.concatenate([part[key] for part in data]) for key in ("images", "owner", "labels"))
    parts = training_parts(config, net)
    first, started = resume(config, parts), time.monotonic()
    for update in range(first, config.max_train_steps):
        rng = generator(config.seed, "judge", update)
        rows = torch.randint(len(images), (config.train_batch_size,), generator=rng).numpy()
        pixels = torch.from_numpy(images[rows].astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        pixels, cells = degraded(pixels, torch.from_numpy(owner[rows]), rng)
        loss = objective(net, pixels, cells, torch.from_numpy(labels[rows]))
        step(parts, loss)
        done = update + 1
        if done % 50 == 0:
            speed = (done - first) * config.train_batch_size / (time.monotonic() - started)
            print(json.dumps({"update": done, "loss": round(loss.item(), 4), "scenes_per_s": round(speed)}), flush=True)
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            checkpoint(config, parts, done)
    return parts["averaged"].module.eval()


def training_parts(config: JudgeConfig, net: JudgeNet) -> dict[str, Any]:
    """What a checkpoint holds: the network, its running average (which is exported), AdamW and its one-cycle rate."""
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.max_train_steps, pct_start=0.1
    )
    return {"net": net, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}


def step(parts: dict[str, Any], loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parts["net"].parameters(), 5.0)
    parts["optimizer"].step()
    parts["optimizer"].zero_grad(set_to_none=True)
    parts["schedule"].step()
    parts["averaged"].update_parameters(parts["net"])


def checkpoint(config: JudgeConfig, parts: dict[str, Any], update: int) -> None:
    """Write the state after `update` updates, whole or not at all, and the weights it would give."""
    path = config.run_dir / "checkpoint.pt"
    torch.save({"update": update, **{key: part.state_dict() for key, part in parts.items()}}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    export(config, parts["averaged"].module, {"updates": update})


def resume(config: JudgeConfig, parts: dict[str, Any]) -> int:
    """Load the checkpoint, if there is one; the number of updates it has behind it."""
    path = config.run_dir / "checkpoint.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return state["update"]


def objective(net: JudgeNet, pixels: Tensor, owner: Tensor, labels: Tensor) -> Tensor:
    """Σ BCE(nouns) + CE(background) + 2 CE(style) of the picture, + 2 CE(noun and style, or nothing) of its cells.

    A cell belongs to the object that covers its middle.
    """
    with torch.autocast("cpu", torch.bfloat16):
        things, places = net(pixels.to(memory_format=torch.channels_last))
    presence, background, style = pooled(things, places)
    nouns, styles = labels[:, :2], labels[:, 3]
    present = torch.zeros(len(labels), len(NOUNS) + 1).scatter_(1, nouns % (len(NOUNS) + 1), 1.0)[:, :-1]
    picture = binary_cross_entropy_with_logits(presence, present, reduction="none").sum(1).mean()
    picture = picture + cross_entropy(background, labels[:, 2]) + 2 * cross_entropy(style, styles, ignore_index=NOTHING)
    cells = owner[:, SIDE // 16 :: SIDE // 8, SIDE // 16 :: SIDE // 8].long()
    nothing = torch.full((len(labels), 1), len(NOUNS) * len(STYLES))
    table = torch.cat([nothing, nouns * len(STYLES) + styles[:, None]], 1)  # class of owner 0, 1, 2
    classes = table.gather(1, cells.flatten(1)).reshape(cells.shape)
    known = things.flatten(1, 2)
    return picture + 2 * cross_entropy(torch.cat([known, torch.zeros_like(known[:, :1])], 1), classes)


def export(config: JudgeConfig, net: JudgeNet, report: dict[str, Any]) -> None:
    """Write the judge's file: weights, what they were trained with, and `report` on them."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("run_dir", "output")}
    save(net, config.output, {"widths": list(config.widths), "settings": settings, "report": report})


if __name__ == "__main__":
    main(tyro.cli(JudgeConfig, config=(tyro.conf.OmitArgPrefixes,)))
