"""What a base model was trained on, and a fingerprint of its weights for the stamp of a bench's results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from personalize.embedded.scenes import BACKGROUNDS, NOUNS, TRAINING_STYLES
from personalize.models.stable_diffusion import StableDiffusion

PRIME = 65521  # the largest below 2¹⁶, so that sums of products of two remainders fit into 64 bits


def world_of(folder: Path, *, nouns: Sequence[str] = (), styles: Sequence[str] = ()) -> dict[str, Sequence[str]]:
    """The nouns, styles and backgrounds to measure on: those given, else those of the folder's world.json, else all."""
    file = folder / "world.json"
    trained = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    every = {"nouns": NOUNS, "styles": TRAINING_STYLES, "backgrounds": BACKGROUNDS}
    given = {"nouns": nouns, "styles": styles}
    return {name: tuple(given.get(name) or trained.get(name, every[name])) for name in every}


def weights_of(model: StableDiffusion) -> list[str]:
    """A fast hash of the weights of each network: UNet, VAE and text encoders."""
    return [_fingerprint(part) for part in (model.unet, model.vae, *model.text_encoders)]


def _fingerprint(part: nn.Module) -> str:
    """A hash of two sums over the bits of each weight: Σ bits, and Σ bits · position, which notices an exchange.

    They are sums of integers, so that they do not depend on the number of threads.
    """
    sums = []
    for name, weight in part.state_dict().items():
        bits = weight.detach().cpu().float().contiguous().view(torch.int32).flatten().long()
        positions = torch.arange(bits.numel()) % PRIME
        sums.append((name, int(bits.sum()), int((bits % PRIME * positions).sum())))
    return sha256(repr(sums).encode()).hexdigest()[:16]
