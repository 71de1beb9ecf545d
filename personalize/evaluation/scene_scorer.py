"""The scorer for pictures of the embedded model; its weights ship with the package, nothing is downloaded.

    scorer = SceneScorer.load()
    scorer([picture], Request("a cat on the beach", "a cat on the grass", source))[0].edit

The nouns, background and style that a prompt names are looked up in it by word; a small network estimates how probable
each of them is in a picture.  Identity is similarity to the source picture in the regions that the edit leaves alone.
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

from personalize.embedded.backgrounds import COLOURS
from personalize.embedded.scenes import BACKGROUNDS, NOUNS, PLACES, STYLES, place_phrase
from personalize.errors import UserError
from personalize.evaluation.scoring import Request, Scores
from personalize.io.atomic import write_file
from personalize.io.images import to_pixels
from personalize.io.json_files import parse_object
from personalize.io.tensor_files import read_tensors, tensor_bytes

WEIGHTS = Path(__file__).parents[1] / "embedded" / "scene_scorer.safetensors"
SIDE = 64  # px: the network's input; every picture is resized to it
CELLS = 8  # the network predicts on a grid of 8×8 cells
UNRELATED = 0.45  # mean distance between cells of unrelated renders; distances are divided by it
BEST_CELLS = 3  # a noun's probability in a picture is the mean over the cells where it is most probable
_PLACE_WORDS = {"night": "night", "wood": "wooden", "bricks": "brick"}  # the word in prompts, where not the name itself
_STYLE_WORDS = {style: phrase.split()[1] for style, phrase in STYLES.items()}


class ScorerNet(nn.Module):
    """Convolutions from pixels (b, 3, 64, 64) in [−1, 1] to logits on 8×8 cells.

    There is a logit for every pair of noun and style, and for every background.  `widths` are the channels at 32×32,
    16×16 and 8×8.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        a, b, c = widths
        self.fine = nn.Sequential(_down(3, a, 5), _down(a, b), _Residual(b))
        self.coarse = nn.Sequential(_down(b, c), _Residual(c), _Residual(c))
        self.things, self.places = nn.Conv2d(c, len(NOUNS) * len(STYLES), 1), nn.Conv2d(c, len(BACKGROUNDS), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of nouns and styles (b, 73·4, 8, 8), of backgrounds (b, 20, 8, 8), and two layers of features.

        The features are (b, widths[1], 16, 16) and (b, widths[2], 8, 8).
        """
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
class PromptContent:
    """The nouns, background and style of the embedded model's world that a text names; None where it names none."""

    nouns: frozenset[str]
    background: str | None
    style: str | None

    def __bool__(self) -> bool:
        return bool(self.nouns or self.background or self.style)


def parse_prompt(text: str) -> PromptContent:
    """The nouns (also in plural), background and style named in `text`, e.g. "a drawing of two cats in the snow"."""
    text = " ".join(text.lower().split())
    nouns = {noun for noun in NOUNS if re.search(rf"\b{noun.replace('_', ' ')}(s|es)?\b", text)}
    places = [place for place in PLACES if re.search(rf"\b{_PLACE_WORDS.get(place, place)}\b", text)]
    colours = [colour for colour in COLOURS if place_phrase(colour) in text or f"{colour} background" in text]
    style = next((style for style, word in _STYLE_WORDS.items() if re.match(rf"(an? |the )?{word}s? of\b", text)), None)
    return PromptContent(frozenset(nouns), next(iter([*colours, *places]), None), style)


@dataclass(frozen=True)
class SceneProbabilities:
    """What the network finds in one picture, as probabilities.

    nouns: (73,), each on its own.  backgrounds: (20,) and styles: (4,), each adding up to 1.
    cells: (73, 8, 8), of each noun in each cell.
    layers: mean colours, fine and coarse features of the cells, each (·, 8, 8), for distances between pictures.
    """

    nouns: Tensor
    backgrounds: Tensor
    styles: Tensor
    cells: Tensor
    layers: tuple[Tensor, ...]


class SceneScorer:
    """A `Scorer` of pictures of the embedded model's world.

    info: what the weights file says: training settings, data splits, and the accuracy on held-out renders.
    """

    name = "the package's scorer of the embedded model's world"
    # measured on renders: noisy copies are at 0.03, other subjects of the same kind at 0.5 to 0.8
    copy_distance, lost_distance = 0.35, 0.6

    def __init__(self, net: ScorerNet, info: dict[str, Any]) -> None:
        self.net, self.info = net.eval().requires_grad_(False), info

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> SceneScorer:
        """Read weights written by `save`.

        Raises:
            UserError: they are missing, damaged, or were trained for other nouns, backgrounds or styles.
        """
        file = read_tensors(path)
        info = parse_object(file.metadata.get("scorer", "{}"), path)
        if {key: info.get(key) for key in _labels()} != _labels():
            raise UserError(
                f"{path} was trained for another world (nouns, backgrounds, styles) than this version's: "
                "train it again with `train scorer`"
            )
        net = ScorerNet(info["widths"])
        net.load_state_dict({name: tensor.float() for name, tensor in file.tensors.items()})
        return cls(net, info)

    def __call__(self, pictures: Sequence[Image.Image], request: Request) -> list[Scores]:
        """The scores of `pictures`.

            edit = ∏ P(wanted) · ∏ (1 − P(removed))        identity = 1 − Σ w d / Σ w

        Wanted is everything that the prompt names; removed are the caption's nouns that the prompt does not name.
        w (8, 8) is the probability that a cell shows nothing that the edit changes; d (8, 8) is the distance of the
        cell's colours and features from the source's, at most 1.

        Raises:
            UserError: the prompt has no word of the embedded model's world.
        """
        wanted, before = parse_prompt(request.prompt), parse_prompt(request.caption)
        if not wanted:
            raise UserError(
                f"the embedded scorer knows no word of {request.prompt!r}: name objects and places of the embedded "
                "model's world, or give --clip_model"
            )
        source, *others = self.recognize([request.source, *pictures])
        return [_scores(wanted, before, source, one) for one in others]

    @torch.inference_mode()
    def recognize(self, pictures: Sequence[Image.Image]) -> list[SceneProbabilities]:
        """Probabilities of nouns, backgrounds and styles in each picture, of any size."""
        pixels = torch.cat([resized(to_pixels(picture)) for picture in pictures])
        things, places, fine, coarse = self.net(pixels)
        nothing = torch.zeros_like(things[:, :1])
        cells = torch.cat([nothing, things], 1).softmax(1)[:, 1:].unflatten(1, (len(NOUNS), len(STYLES)))
        nouns, styles = cells.sum(2), cells.sum((1, 3, 4))
        presence = nouns.flatten(2).topk(BEST_CELLS, -1).values.mean(-1)
        backgrounds = places.mean((2, 3)).softmax(1)
        styles = styles / styles.sum(1, keepdim=True).clamp_min(1e-6)
        layers = (avg_pool2d(pixels, SIDE // CELLS), avg_pool2d(fine, 2), coarse)
        return [
            SceneProbabilities(presence[i], backgrounds[i], styles[i], nouns[i], tuple(layer[i] for layer in layers))
            for i in range(len(pictures))
        ]


def _scores(
    wanted: PromptContent, before: PromptContent, source: SceneProbabilities, edited: SceneProbabilities
) -> Scores:
    removed = before.nouns - wanted.nouns
    facts = {f"P({noun})": float(edited.nouns[NOUNS.index(noun)]) for noun in sorted(wanted.nouns)}
    facts |= {f"P(no {noun})": 1 - float(edited.nouns[NOUNS.index(noun)]) for noun in sorted(removed)}
    if wanted.background:
        facts[f"P({wanted.background})"] = float(edited.backgrounds[BACKGROUNDS.index(wanted.background)])
    if wanted.style:
        facts[f"P({wanted.style})"] = float(edited.styles[list(STYLES).index(wanted.style)])
    edit = math.prod(facts.values())
    distances = _distances(source, edited)
    weights = _unchanged(wanted, before, source, edited)
    identity = 1 - float((weights * distances).sum() / weights.sum())
    return Scores(edit, identity, float(distances.mean()), {name: round(value, 4) for name, value in facts.items()})


def _distances(source: SceneProbabilities, edited: SceneProbabilities) -> Tensor:
    """Distance (8, 8) of each cell from the source's, in [0, 1].

    The mean of one distance in colour (|difference| / 2, of colours in [−1, 1]) and two in features (1 − cosine),
    divided by `UNRELATED` and clipped at 1.
    """
    colour = (source.layers[0] - edited.layers[0]).abs().mean(0) / 2
    features = [
        1 - (normalize(a, dim=0) * normalize(b, dim=0)).sum(0)
        for a, b in zip(source.layers[1:], edited.layers[1:], strict=True)
    ]
    return (torch.stack([colour, *features]).mean(0) / UNRELATED).clamp(0, 1)


def _unchanged(
    wanted: PromptContent, before: PromptContent, source: SceneProbabilities, edited: SceneProbabilities
) -> Tensor:
    """The probability (8, 8) that a cell shows nothing that the edit changes, at least 0.01.

    The lower bound makes all cells count alike when the edit changes everything.
    """
    objects = (source.cells.sum(0) + edited.cells.sum(0)).clamp(0, 1)
    changed = torch.zeros(CELLS, CELLS)
    if wanted.background and before.background and wanted.background != before.background:
        changed = changed + 1 - source.cells.sum(0)
    if wanted.style and wanted.style != before.style:
        changed = changed + objects
    for noun in (before.nouns - wanted.nouns) if wanted.nouns else ():
        changed = changed + source.cells[NOUNS.index(noun)]
    for noun in wanted.nouns - before.nouns:
        changed = changed + edited.cells[NOUNS.index(noun)]
    return (1 - changed).clamp(0.01, 1)


def resized(pixels: Tensor) -> Tensor:
    """Pixels (b, 3, H, W) averaged down (or interpolated up) to the network's input, (b, 3, 64, 64)."""
    if pixels.shape[-2:] == (SIDE, SIDE):
        return pixels
    return interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def save(net: ScorerNet, path: str | Path, info: dict[str, Any]) -> Path:
    """Write `net` in half precision, with its labels and `info`, which must hold its `widths`."""
    state = {name: tensor.half() for name, tensor in net.state_dict().items()}
    return write_file(path, tensor_bytes(state, {"scorer": json.dumps({**_labels(), **info})}))


def _labels() -> dict[str, list[str]]:
    return {"nouns": list(NOUNS), "backgrounds": list(BACKGROUNDS), "styles": list(STYLES)}
