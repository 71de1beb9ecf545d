"""What a bench measures: the world that a base model knows, and the stamp of its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from personalize.model import StableDiffusion
from personalize.scenes import BACKGROUNDS, NOUNS, TRAINING_STYLES

PRIME = 65521  # the largest below 2¹⁶: products of two remainders can be added up in 64 bits


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
    """Of two sums over each weight's bits, the second by place; integers, so that no number of threads changes them."""
    sums = []
    for name, weight in part.state_dict().items():
        bits = weight.detach().cpu().float().contiguous().view(torch.int32).flatten().long()
        places = torch.arange(bits.numel()) % PRIME
        sums.append((name, int(bits.sum()), int((bits % PRIME * places).sum())))
    return sha256(repr(sums).encode()).hexdigest()[:16]
