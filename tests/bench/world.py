"""What a bench measures: the world that a base model knows, and the stamp of its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from torch import nn

from personalize.model import StableDiffusion
from personalize.scenes import BACKGROUNDS, NOUNS, TRAINING_STYLES


def world_of(folder: Path, *, nouns: Sequence[str] = (), styles: Sequence[str] = ()) -> dict[str, Sequence[str]]:
    """`nouns`, `styles` and `backgrounds`: those asked for, else those of the folder's world.json, else all."""
    file = folder / "world.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    every = {"nouns": NOUNS, "styles": TRAINING_STYLES, "backgrounds": BACKGROUNDS}
    asked = {"nouns": nouns, "styles": styles}
    return {name: tuple(asked.get(name) or known.get(name, every[name])) for name in every}


def weights_of(model: StableDiffusion) -> list[str]:
    """A quick hash of every network's weights: UNet, VAE and text encoders."""
    return [_fingerprint(part) for part in (model.unet, model.vae, *model.text_encoders)]


def _fingerprint(part: nn.Module) -> str:
    """Of the sum and the sum of squares of each weight."""
    sums = [(name, float(w.double().sum()), float(w.double().square().sum())) for name, w in part.state_dict().items()]
    return sha256(repr(sums).encode()).hexdigest()[:16]
