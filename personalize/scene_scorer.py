"""A scorer for pictures of the scenes' world that travels with the package: nothing to download.

    scorer = SceneScorer.load()
    scorer([picture], Request("a cat on the beach", "a cat on the grass", source))[0].edit

It reads from the words of a prompt which things, background and style are wanted, and asks a small network how probable
each is in a picture.  Identity is nearness to the source picture where the two texts agree.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, normalize

from personalize.errors import UserError
from personalize.files import read_tensors, tensor_bytes, write_file
from personalize.images import to_pixels
from personalize.scenes import BACKGROUNDS, COLOURS, NOUNS, PLACES, STYLES, place_phrase
from personalize.scoring import Reading, Request

WEIGHTS = Path(__file__).parent / "scorer" / "scorer.safetensors"
SIDE = 64  # pixels: every picture is brought to this size first
CELLS = 8  # the network answers on a grid of 8×8 cells
UNRELATED = 0.45  # mean distance of cells of unrelated renders, which is counted as 1
SEEN_IN = 3  # cells: a thing is there as surely as, on average, in the three cells that show it best
_KEYS = {"night": "night", "wood": "wooden", "bricks": "brick"}  # words of places that are not their names
_MEDIA = {style: phrase.split()[1] for style, phrase in STYLES.items()}


class ScorerNet(nn.Module):
    """Pixels (b, 3, 64, 64) in [−1, 1] → logits of every noun in every style, and of every background, on 8×8 cells."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        a, b, c = widths
        self.fine = nn.Sequential(_down(3, a, 5), _down(a, b), _Residual(b))
        self.coarse = nn.Sequential(_down(b, c), _Residual(c), _Residual(c))
        self.things, self.places = nn.Conv2d(c, len(NOUNS) * len(STYLES), 1), nn.Conv2d(c, len(BACKGROUNDS), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Things (b, 73·4, 8, 8), backgrounds (b, 20, 8, 8), and the features (b, ·, 16, 16) and (b, ·, 8, 8)."""
        fine = self.fine(pixels)
        coarse = self.coarse(fine)
        return self.things(coarse).float(), self.places(coarse).float(), fine, coarse


def _down(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.layers = nn.Sequential(first, nn.GroupNorm(8, width), nn.ReLU(), second, nn.GroupNorm(8, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@dataclass(frozen=True)
class Words:
    """What a text asks for, as far as the scenes' world has it."""

    nouns: frozenset[str]
    background: str | None
    style: str | None

    def __bool__(self) -> bool:
        return bool(self.nouns or self.background or self.style)


def words_of(text: str) -> Words:
    """Nouns (plural too), background and style named in `text`: "a drawing of two cats in the snow"."""
    text = " ".join(text.lower().split())
    nouns = {noun for noun in NOUNS if re.search(rf"\b{noun.replace('_', ' ')}(s|es)?\b", text)}
    places = [place for place in PLACES if re.search(rf"\b{_KEYS.get(place, place)}\b", text)]
    colours = [colour for colour in COLOURS if place_phrase(colour) in text or f"{colour} background" in text]
    style = next((style for style, word in _MEDIA.items() if re.match(rf"(an? |the )?{word}s? of\b", text)), None)
    return Words(frozenset(nouns), next(iter([*colours, *places]), None), style)


@dataclass(frozen=True)
class Seen:
    """Probabilities in one picture: `nouns` (73,), `backgrounds` (20,), `styles` (4,), and of `cells` (73, 8, 8)."""

    nouns: Tensor
    backgrounds: Tensor
    styles: Tensor
    cells: Tensor
    layers: tuple[Tensor, ...]  # colours, fine and coarse features, each (·, 8, 8)


class SceneScorer:
    """The network with its reading of prompts; `info` says what it was trained on and how often it is right."""

    name = "the package's scorer of the scenes' world"
    copy, lost = 0.35, 0.6  # renders: noisy copies 0.03, other subjects of the same kind 0.5 to 0.8, see `UNRELATED`

    def __init__(self, net: ScorerNet, info: dict[str, Any]) -> None:
        self.net, self.info = net.eval().requires_grad_(False), info

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> SceneScorer:
        """Read weights written by `save`; UserError when they are missing or were trained for another world."""
        file = read_tensors(path)
        info = json.loads(file.metadata.get("scorer", "{}"))
        if {key: info.get(key) for key in _labels()} != _labels():
            raise UserError(f"{path} scores another world than this version's: train it again with `train scorer`")
        net = ScorerNet(info["widths"])
        net.load_state_dict({name: tensor.float() for name, tensor in file.tensors.items()})
        return cls(net, info)

    def __call__(self, pictures: Sequence[Image.Image], request: Request) -> list[Reading]:
        """Readings of `pictures`.

            edit = ∏ P(wanted) · ∏ (1 − P(gone))        identity = 1 − Σ w d / Σ w

        over what the prompt names, and the caption's nouns that it names no more.  w (8, 8) is the chance that
        a cell shows nothing that is to change, d the mean distance of colours and features there, at most 1.

        Raises:
            UserError: the prompt has no word of the scenes' world.
        """
        wanted, had = words_of(request.prompt), words_of(request.caption)
        if not wanted:
            raise UserError(
                f"the embedded scorer knows no word of {request.prompt!r}: name things and places of the embedded "
                "model's world, or give --clip_model"
            )
        source, *seen = self.look([request.source, *pictures])
        return [_reading(wanted, had, source, one) for one in seen]

    @torch.inference_mode()
    def look(self, pictures: Sequence[Image.Image]) -> list[Seen]:
        """What each picture shows."""
        pixels = torch.cat([shrunk(to_pixels(picture)) for picture in pictures])
        things, places, fine, coarse = self.net(pixels)
        nothing = torch.zeros_like(things[:, :1])
        cells = torch.cat([nothing, things], 1).softmax(1)[:, 1:].unflatten(1, (len(NOUNS), len(STYLES)))
        nouns, styles = cells.sum(2), cells.sum((1, 3, 4))
        presence = nouns.flatten(2).topk(SEEN_IN, -1).values.mean(-1)
        backgrounds = places.mean((2, 3)).softmax(1)
        styles = styles / styles.sum(1, keepdim=True).clamp_min(1e-6)
        layers = (avg_pool2d(pixels, SIDE // CELLS), avg_pool2d(fine, 2), coarse)
        return [
            Seen(presence[i], backgrounds[i], styles[i], nouns[i], tuple(layer[i] for layer in layers))
            for i in range(len(pictures))
        ]


def _reading(wanted: Words, had: Words, source: Seen, seen: Seen) -> Reading:
    gone = had.nouns - wanted.nouns
    facts = {f"P({noun})": float(seen.nouns[NOUNS.index(noun)]) for noun in sorted(wanted.nouns)}
    facts |= {f"P(no {noun})": 1 - float(seen.nouns[NOUNS.index(noun)]) for noun in sorted(gone)}
    if wanted.background:
        facts[f"P({wanted.background})"] = float(seen.backgrounds[BACKGROUNDS.index(wanted.background)])
    if wanted.style:
        facts[f"P({wanted.style})"] = float(seen.styles[list(STYLES).index(wanted.style)])
    edit = math.prod(facts.values())
    distances = _distances(source, seen)
    weights = _unchanged(wanted, had, source, seen)
    identity = 1 - float((weights * distances).sum() / weights.sum())
    return Reading(edit, identity, float(distances.mean()), {name: round(value, 4) for name, value in facts.items()})


def _distances(source: Seen, seen: Seen) -> Tensor:
    """Distance (8, 8) of each cell: mean of those of colour (full range 1) and features (1 − cosine) / `UNRELATED`."""
    colour = (source.layers[0] - seen.layers[0]).abs().mean(0) / 2
    others = [
        1 - (normalize(ours, dim=0) * normalize(theirs, dim=0)).sum(0)
        for ours, theirs in zip(source.layers[1:], seen.layers[1:], strict=True)
    ]
    return (torch.stack([colour, *others]).mean(0) / UNRELATED).clamp(0, 1)


def _unchanged(wanted: Words, had: Words, source: Seen, seen: Seen) -> Tensor:
    """The chance (8, 8) that a cell shows nothing that the prompt changes; nearly even where it changes everything."""
    things = (source.cells.sum(0) + seen.cells.sum(0)).clamp(0, 1)
    changed = torch.zeros(CELLS, CELLS)
    if wanted.background and had.background and wanted.background != had.background:
        changed = changed + 1 - source.cells.sum(0)
    if wanted.style and wanted.style != had.style:
        changed = changed + things
    for noun in (had.nouns - wanted.nouns) if wanted.nouns else ():
        changed = changed + source.cells[NOUNS.index(noun)]
    for noun in wanted.nouns - had.nouns:
        changed = changed + seen.cells[NOUNS.index(noun)]
    return (1 - changed).clamp(0.01, 1)


def shrunk(pixels: Tensor) -> Tensor:
    """Pixels (b, 3, H, W) averaged down (or interpolated up) to (b, 3, 64, 64)."""
    if pixels.shape[-2:] == (SIDE, SIDE):
        return pixels
    return interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def save(net: ScorerNet, path: str | Path, info: dict[str, Any]) -> Path:
    """Write `net` in half precision with `info`, which holds at least its `widths`, and the world's labels."""
    state = {name: tensor.half() for name, tensor in net.state_dict().items()}
    return write_file(path, tensor_bytes(state, {"scorer": json.dumps({**_labels(), **info})}))


def _labels() -> dict[str, list[str]]:
    return {"nouns": list(NOUNS), "backgrounds": list(BACKGROUNDS), "styles": list(STYLES)}
