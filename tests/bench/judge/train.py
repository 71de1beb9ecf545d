"""Train the judge on rendered scenes of all styles and nouns.

    python -m tests.bench.judge.train                                # reproduces tests/bench/judge/judge.safetensors
    python -m tests.bench.judge.train --train_split other-train --test_split other-test --seed 1 \\
        --widths 48 64 128 --run_dir runs/other --output other.safetensors     # a second judge: other data and weights

Scenes are rendered once into `run_dir`; an unfinished run found there is resumed.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from personalize.embedded.scenes import BACKGROUNDS, NOUNS, STYLES, Scene, render
from personalize.randomness import generator
from tests.bench.judge.accuracy import accuracy, judged_scene
from tests.bench.judge.degradation import degraded
from tests.bench.judge.judge import SIDE, WEIGHTS, WIDTHS, Judge, JudgeNet, as_bytes, as_pixels, pooled, resized, save

SHARD = 4000  # scenes rendered per file
NOTHING = -1  # label of a second object that is not there, and of the style of an empty scene


@dataclass(frozen=True)
class JudgeConfig:
    output: Path = WEIGHTS
    """Where the weights are written."""
    run_dir: Path = Path("runs/judge")
    """Where rendered scenes and the checkpoint are kept."""
    train_split: str = "judge-train"
    """Data split of the scenes to train on."""
    test_split: str = "judge-test"
    """Data split of the scenes on which the accuracy is measured."""
    seed: int = 0
    """Seed of the weights and of the degradations."""
    widths: tuple[int, int, int] = WIDTHS
    """Channels of the network's three stages."""
    scenes: int = 48000
    """Scenes of the first phase, rendered at the network's own 64 px."""
    max_train_steps: int = 4500
    """Updates of the first phase."""
    refining_scenes: int = 24000
    """Further scenes for the second phase, rendered at 128 px and averaged down, as most pictures are for the judge."""
    refining_steps: int = 2500
    """Updates of the second phase."""
    test_scenes: int = 4000
    """Held-out scenes the accuracy is measured on."""
    train_batch_size: int = 64
    """Scenes per update."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW in the first phase; the second has a quarter of it.  Each phase is one OneCycleLR cycle."""
    checkpointing_steps: int = 250
    """Updates between two checkpoints; each also writes the weights."""


@dataclass(frozen=True)
class Phase:
    """A phase of the training: updates `begin` to `end` − 1 on scenes `first` to `last` − 1.

    side: at which the scenes are rendered, px.  rate: peak learning rate.
    """

    begin: int
    end: int
    first: int
    last: int
    side: int
    rate: float


def main(config: JudgeConfig) -> None:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
    net = train(config, JudgeNet(config.widths))
    export(config, net, {})
    report = accuracy(Judge.load(config.output), config.test_split, config.test_scenes)
    export(config, net, report)
    print(json.dumps(report))


def phases(config: JudgeConfig) -> tuple[Phase, Phase]:
    end, last, rate = config.max_train_steps, config.scenes, config.learning_rate
    refining = Phase(end, end + config.refining_steps, last, last + config.refining_scenes, 2 * SIDE, rate / 4)
    return Phase(0, end, 0, last, SIDE, rate), refining


def scenes_of(config: JudgeConfig, phase: Phase) -> dict[str, np.ndarray]:
    """The phase's scenes as arrays: images (n, 64, 64, 3), owner (n, 64, 64) and labels (n, 4), as from `labelled`."""
    starts = range(phase.first, phase.last, SHARD)
    parts = [shard(config, start, min(start + SHARD, phase.last), phase.side) for start in starts]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def shard(config: JudgeConfig, first: int, end: int, side: int) -> dict[str, np.ndarray]:
    """Scenes `first` to `end` − 1, from the file in `run_dir`, which is made if it is not there."""
    path = config.run_dir / f"{config.train_split}_{side}px_{first}_{end}.npz"
    if not path.is_file():
        rows = [labelled(judged_scene(config.train_split, index), side) for index in range(first, end)]
        arrays = [np.stack(column) for column in zip(*rows, strict=True)]
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, images=arrays[0], owner=arrays[1], labels=arrays[2])
        partial.rename(path)
    return dict(np.load(path))


def labelled(scene: Scene, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene rendered at 64 or 128 px: picture (64, 64, 3), owner map (64, 64), and four labels.

    The owner map holds the number of the object at each pixel, 1 or 2, and 0 for none.  The labels are the indices of
    the first noun, second noun, background and style.
    """
    image, masks = render(scene, side)
    every = side // SIDE
    owner = np.zeros((SIDE, SIDE), np.uint8)
    for number, mask in enumerate(masks, 1):
        owner[mask[::every, ::every]] = number
    nouns = [NOUNS.index(thing.noun) for thing in scene.objects] + [NOTHING, NOTHING]
    style = list(STYLES).index(scene.objects[0].style) if scene.objects else NOTHING
    labels = np.array([*nouns[:2], BACKGROUNDS.index(scene.background), style], np.int64)
    return as_bytes(resized(image))[0], owner, labels


def train(config: JudgeConfig, net: JudgeNet) -> JudgeNet:
    """Train both phases, from the checkpoint if there is one; returns the averaged network."""
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.02)
    parts = {"net": net, "averaged": averaged, "optimizer": optimizer}
    path = config.run_dir / "checkpoint.pt"
    state = torch.load(path, weights_only=True) if path.is_file() else {"update": 0}
    for key in parts.keys() & state.keys():
        parts[key].load_state_dict(state[key])
    for phase in phases(config):
        if max(state["update"], phase.begin) < phase.end:
            run_phase(config, phase, parts, state)
    return averaged.module.eval()  # pyright: ignore[reportReturnType]


def run_phase(config: JudgeConfig, phase: Phase, parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Train one phase, from `state` if that is a checkpoint within the phase, else from the phase's beginning."""
    data, first, started = scenes_of(config, phase), max(state["update"], phase.begin), time.monotonic()
    cycle = {"max_lr": phase.rate, "total_steps": phase.end - phase.begin, "pct_start": 0.1}
    parts["schedule"] = torch.optim.lr_scheduler.OneCycleLR(parts["optimizer"], **cycle)
    if state["update"] > phase.begin:
        parts["schedule"].load_state_dict(state["schedule"])
        parts["optimizer"].load_state_dict(state["optimizer"])
    for update in range(first, phase.end):
        loss = objective(parts["net"], *batch(config, data, update))
        step(parts, loss)
        done = update + 1
        if done % 50 == 0:
            speed = (done - first) * config.train_batch_size / (time.monotonic() - started)
            print(json.dumps({"update": done, "loss": round(loss.item(), 4), "scenes_per_s": round(speed)}), flush=True)
        if done % config.checkpointing_steps == 0 or done == phase.end:
            checkpoint(config, parts, done)


def batch(config: JudgeConfig, data: dict[str, np.ndarray], update: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of an update: pixels (b, 3, 64, 64), half of them degraded, owner maps (b, 64, 64), labels (b, 4)."""
    rng = generator(config.seed, "judge", update)
    rows = torch.randint(len(data["images"]), (config.train_batch_size,), generator=rng).numpy()
    pixels, owner = degraded(as_pixels(data["images"][rows]), torch.from_numpy(data["owner"][rows]), rng)
    return pixels, owner, torch.from_numpy(data["labels"][rows])


def step(parts: dict[str, Any], loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parts["net"].parameters(), 5.0)
    parts["optimizer"].step()
    parts["optimizer"].zero_grad(set_to_none=True)
    parts["schedule"].step()
    parts["averaged"].update_parameters(parts["net"])


def checkpoint(config: JudgeConfig, parts: dict[str, Any], update: int) -> None:
    """Write the checkpoint of `update` atomically, and the averaged weights so far."""
    path = config.run_dir / "checkpoint.pt"
    torch.save({"update": update, **{key: part.state_dict() for key, part in parts.items()}}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    export(config, parts["averaged"].module, {"updates": update})


def objective(net: JudgeNet, pixels: Tensor, owner: Tensor, labels: Tensor) -> Tensor:
    """The judge's loss on whole pictures and on their cells.

        L = Σ BCE(nouns) + CE(background) + 2 CE(style) + 2 · mean over cells of CE(noun and style, or nothing)

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
    """Write the judge's file: the weights, the options they were trained with, and the `report` on their accuracy."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("run_dir", "output")}
    save(net, config.output, {"widths": list(config.widths), "settings": settings, "report": report})


if __name__ == "__main__":
    main(tyro.cli(JudgeConfig, config=(tyro.conf.OmitArgPrefixes,)))
