"""Train the network of `likeness.py` on views of all sprites, and measure how often it tells two of them apart.

    python -m tests.bench.judge.train_likeness --run_dir runs/likeness

A view is one object in a scene of its own: anywhere, of any size, on any background, of a slightly other hue, with or
without another object beside it.  Views are rendered once into `run_dir`; an unfinished run found there is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.functional import softplus

from personalize.embedded.scenes import BACKGROUNDS, NOUNS, STYLES, Scene, SceneObject, render, sprite_path
from personalize.embedded.variation import Variation
from personalize.randomness import generator
from tests.bench.judge.degradation import degraded
from tests.bench.judge.judge import SIDE, as_bytes, as_pixels, object_crop
from tests.bench.judge.likeness import WEIGHTS, WIDTHS, Likeness, LikenessNet, save

Sprite = tuple[str, str]  # noun and style
SPRITES: tuple[Sprite, ...] = tuple((n, s) for n in NOUNS for s in STYLES if sprite_path(n, s).is_file())
MAX_HUE = 0.04  # turns by which the same subject may differ from itself
NEIGHBOUR_SHARE = 0.4  # of views with another object beside the subject
TEMPERATURE = 0.1  # cosines that differ by as much have a loss of softplus(−1)


@dataclass(frozen=True)
class LikenessConfig:
    output: Path = WEIGHTS
    """Where the weights are written."""
    run_dir: Path = Path("runs/likeness")
    """Where views and the checkpoint are kept."""
    seed: int = 0
    """Seed of the weights, the batches and the degradations."""
    views: int = 16
    """Views of each sprite to train on, of the split `likeness-train`."""
    test_views: int = 8
    """Views of each sprite to measure on, of the split `likeness-test`."""
    max_train_steps: int = 900
    """Updates."""
    nouns_per_batch: int = 8
    """Nouns of an update; of each there are two styles, which are the hardest to tell apart."""
    views_per_sprite: int = 4
    """Views of each sprite in an update."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW, in one OneCycleLR cycle."""
    checkpointing_steps: int = 100
    """Updates between two checkpoints."""


def main(config: LikenessConfig) -> dict[str, Any]:
    """Train, write the weights with the measured report, and return it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # the initial weights are the only thing drawn from global state
    net = train(config, LikenessNet())
    info = {
        "widths": list(WIDTHS),
        "settings": {k: v for k, v in asdict(config).items() if k not in ("output", "run_dir")},
    }
    save(net, config.output, info)
    report = accuracy(Likeness.load(config.output), views_of(config, "likeness-test", config.test_views))
    save(net, config.output, info | {"report": report})
    print(json.dumps(report))
    return report


def view_scene(sprite: Sprite, number: int, split: str) -> tuple[Scene, int]:
    """View `number` of `sprite` in `split`, and which of the scene's objects it shows (the one in front)."""
    rng = np.random.default_rng([crc32(split.encode()), SPRITES.index(sprite), number])
    size = float(rng.uniform(0.3, 0.75))
    x, y = (0.5 + float(rng.uniform(-1, 1)) * (0.49 - size / 2) for _ in range(2))
    hue = Variation(hue=float(rng.uniform(-MAX_HUE, MAX_HUE)))
    subject = SceneObject(*sprite, x, y, size, float(rng.uniform(-10, 10)), bool(rng.random() < 0.5), hue)
    objects = [subject]
    if rng.random() < NEIGHBOUR_SHARE:
        noun, style = SPRITES[int(rng.integers(len(SPRITES)))]
        across = 0.15 if x > 0.5 else 0.85
        objects.insert(0, SceneObject(noun, style, across, float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.25, 0.5))))
    return Scene(str(rng.choice(list(BACKGROUNDS))), tuple(objects)), len(objects) - 1


def view(sprite: Sprite, number: int, split: str) -> np.ndarray:
    """The crop (64, 64, 3) uint8 of view `number` of `sprite` in `split`, rendered at 128 px."""
    scene, which = view_scene(sprite, number, split)
    image, masks = render(scene, 2 * SIDE)
    return as_bytes(object_crop(image, masks[which]))[0]


def views_of(config: LikenessConfig, split: str, count: int) -> np.ndarray:
    """Views (sprites, count, 64, 64, 3) uint8 of all sprites, from the run's folder if they are there."""
    path = config.run_dir / f"{split}_{count}.npy"
    if not path.is_file():
        views = np.stack([[view(sprite, number, split) for number in range(count)] for sprite in SPRITES])
        partial = path.with_suffix(".partial.npy")
        np.save(partial, views)
        partial.rename(path)
    return np.load(path)


def train(config: LikenessConfig, net: LikenessNet) -> LikenessNet:
    """Train from the checkpoint, if there is one, to the last update."""
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.max_train_steps, pct_start=0.1
    )
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
    path, first = config.run_dir / "checkpoint.pt", 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        first = state["update"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    views = views_of(config, "likeness-train", config.views)
    for update in range(first, config.max_train_steps):
        loss = triplet_loss(net(batch(config, views, update)), config.views_per_sprite)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        done = update + 1
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            print(json.dumps({"update": done, "loss": round(loss.item(), 4)}), flush=True)
            state = {"update": done} | {name: part.state_dict() for name, part in parts.items()}
            torch.save(state, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
    return net.eval()


def batch(config: LikenessConfig, views: np.ndarray, update: int) -> Tensor:
    """Crops (b, 3, 64, 64) of an update: views of one sprite follow one another, half of all are degraded."""
    rng = generator(config.seed, "likeness", update)
    rows = []
    for noun in torch.randperm(len(NOUNS), generator=rng)[: config.nouns_per_batch].tolist():
        sprites = [index for index, (name, _) in enumerate(SPRITES) if name == NOUNS[noun]]
        for place in torch.randperm(len(sprites), generator=rng)[:2].tolist():
            chosen = torch.randperm(views.shape[1], generator=rng)[: config.views_per_sprite]
            rows.append(views[sprites[place]][chosen.numpy()])
    pixels = as_pixels(np.concatenate(rows))
    return degraded(pixels, torch.zeros(pixels[:, 0].shape, dtype=torch.uint8), rng)[0]


def triplet_loss(embeddings: Tensor, group: int) -> Tensor:
    """Mean loss of the triplets in embeddings (b, d), of which each `group` that follow one another are one sprite's.

        L = softplus((cos(a, n) − cos(a, p)) / τ)      a anchor, p the same sprite, n another one

    Of each anchor and p only the nearest quarter of the n count, else nearly all triplets would have no loss.

    References: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737.
    """
    cosines = embeddings @ embeddings.T
    sprite = torch.arange(len(embeddings)) // group
    same = sprite[:, None] == sprite
    positives = cosines[same & ~torch.eye(len(embeddings), dtype=torch.bool)].reshape(len(embeddings), group - 1)
    others = cosines[~same].reshape(len(embeddings), -1)
    nearest = others.topk(max(1, others.shape[1] // 4), dim=1).values
    return softplus((nearest[:, None] - positives[..., None]) / TEMPERATURE).mean()


def accuracy(likeness: Likeness, views: np.ndarray) -> dict[str, Any]:
    """How often the same sprite is more alike than another one, over all pairs of its `views` (s, k, 64, 64, 3).

    "any": the other one is any sprite; "same noun": it is of another style; "same style": it has another noun.  Each
    pair is compared with one view of one such sprite, taken in turn.  "lowest of same" and "highest of others" are the
    5 % and 95 % quantiles of cosines with the same and with any other sprite.
    """
    count, k = views.shape[:2]
    flat = likeness.embed(as_pixels(views.reshape(-1, *views.shape[2:])))
    embeddings = flat.reshape(count, k, -1)
    kinds: dict[str, Sequence[Sequence[int]]] = {
        "any": [[j for j in range(count) if j != i] for i in range(count)],
        "same noun": [[j for j in range(count) if j != i and SPRITES[j][0] == SPRITES[i][0]] for i in range(count)],
        "same style": [[j for j in range(count) if j != i and SPRITES[j][1] == SPRITES[i][1]] for i in range(count)],
    }
    pairs = [(i, a, b) for i in range(count) for a in range(k) for b in range(k) if a != b]
    same = torch.stack([embeddings[i, a] @ embeddings[i, b] for i, a, b in pairs])
    report: dict[str, Any] = {"split": "likeness-test", "sprites": count, "n": len(pairs)}
    for kind, others in kinds.items():
        rows = [(i, a, others[i][(a * k + b) * 7919 % len(others[i])], b) for i, a, b in pairs]
        other = torch.stack([embeddings[i, a] @ embeddings[j, b] for i, a, j, b in rows])
        report[kind] = round(float((same > other).float().mean()), 5)
        if kind == "any":
            report["highest of others"] = round(float(other.quantile(0.95)), 3)
    return report | {"lowest of same": round(float(same.quantile(0.05)), 3)}


if __name__ == "__main__":
    main(tyro.cli(LikenessConfig, config=(tyro.conf.OmitArgPrefixes,)))
