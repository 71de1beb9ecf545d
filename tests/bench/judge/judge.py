"""The judge: a network that recognises the nouns, background and style in a picture of the embedded model's world.

    judge = Judge.load()
    judge([image])[0].nouns                      # frozenset({"cat", "dog"})
    judge.inside(image, mask).style              # of the object under `mask` only

It sees the pixels alone, never a prompt.  Its weights are trained by `train.py`; the metadata of the weights file
holds its accuracy on held-out renders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from personalize.embedded.scenes import BACKGROUNDS, NOUNS, STYLES

WEIGHTS = Path(__file__).with_name("judge.safetensors")
SIDE = 64  # px: every picture is resized to this first
THRESHOLD = 0.5  # a noun is present when its probability exceeds this
WIDTHS = (32, 64, 160)  # channels at 32×32, 16×16 and 8×8
OBJECT_SHARE = 0.64  # the longest side of the object in a crop, as a share of the crop's: as in a one-object scene


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture.

    nouns: those with a probability above `THRESHOLD`.
    style: the most probable style of the objects.
    places: the centre (x, y) of each noun that is present, in fractions of the picture.
    """

    nouns: frozenset[str]
    background: str
    style: str
    noun_probs: dict[str, float]
    style_probs: dict[str, float]
    places: dict[str, tuple[float, float]]


class JudgeNet(nn.Module):
    """Convolutions from pixels (b, 3, 64, 64) in [−1, 1] to logits on an 8×8 grid.

    Each pair of noun and style has a logit of its own, because what distinguishes two styles differs from noun to noun;
    so has each background.  In a cell without an object all noun logits are below 0.  `pooled` combines the cells.

    folded: without normalisation layers, for weights into whose convolutions they are folded (`folded_state`).
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, *, folded: bool = False) -> None:
        super().__init__()
        a, b, c = widths
        norm = nn.Identity if folded else nn.BatchNorm2d
        self.trunk = nn.Sequential(
            convolution(3, a, norm, kernel=5, stride=2),
            convolution(a, b, norm, stride=2),
            Residual(b, norm),
            convolution(b, c, norm, stride=2),
            Residual(c, norm),
            Residual(c, norm),
        )
        self.things, self.places = nn.Conv2d(c, len(NOUNS) * len(STYLES), 1), nn.Conv2d(c, len(BACKGROUNDS), 1)
        with torch.no_grad():
            self.things.bias.fill_(-5.0)  # pyright: ignore[reportOptionalMemberAccess]  # a given noun is rare

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of nouns and styles (b, 73, 4, 8, 8) and of backgrounds (b, 20, 8, 8)."""
        features = self.trunk(2 * pixels)
        return self.things(features).float().unflatten(1, (len(NOUNS), len(STYLES))), self.places(features).float()


class Residual(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width, norm), convolution(width, width, norm))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def convolution(inputs: int, outputs: int, norm: type[nn.Module], *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    bias = norm is nn.Identity
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    return nn.Sequential(convolution, nn.Identity() if bias else norm(outputs), nn.ReLU())


def pooled(things: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of whole pictures, from those of their cells: nouns (b, 73), backgrounds (b, 20), styles (b, 4).

    A noun's logit is the softmax-weighted mean of its map, so that one cell with a high logit suffices.  A style's is
    the mean log-probability over the cells that hold an object; a background's is the mean over all cells.
    """
    noun, style = things.logsumexp(2).flatten(2), things.logsumexp(1).log_softmax(1).flatten(2)
    presence = (noun.softmax(-1) * noun).sum(-1)
    occupied = noun.detach().amax(1, keepdim=True).sigmoid() + 1e-4
    return presence, places.mean((2, 3)), (style * occupied).sum(-1) / occupied.sum(-1)


class Judge:
    """The trained network, called with pictures of any size; info: its training settings and measured accuracy."""

    def __init__(self, net: JudgeNet, info: dict[str, Any]) -> None:
        self.net, self.info = net.eval().requires_grad_(False), info

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> Judge:
        """Read weights written by `save`.

        Raises:
            ValueError: they were trained for other nouns, backgrounds or styles.
        """
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["judge"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        for key, known in _labels().items():
            if info[key] != known:
                raise ValueError(
                    f"{path} judges other {key} than the scenes have: train it again: python -m tests.bench.judge.train"
                )
        net = JudgeNet(info["widths"], folded=True)
        net.load_state_dict(state)
        return cls(net, info)

    @torch.inference_mode()
    def __call__(self, images: Any) -> list[Verdict]:
        """The verdict on each picture; `images` may have any form that `as_pixels` accepts."""
        verdicts = []
        for pixels in resized(images).split(256):
            things, places = self.net(pixels)
            maps = things.logsumexp(2)
            verdicts += [_verdict(*row) for row in zip(maps, *pooled(things, places), strict=True)]
        return verdicts

    def inside(self, image: Any, mask: np.ndarray) -> Verdict:
        """The verdict on one object of a picture, seen in a square crop around its boolean `mask` (H, W)."""
        return self(object_crop(image, mask))[0]

    def style_inside(self, image: Any, mask: np.ndarray) -> str:
        """The style of the object under `mask`."""
        return self.inside(image, mask).style


def save(net: JudgeNet, path: str | Path, info: dict[str, Any]) -> None:
    """Write `net` in half precision, with the normalisation layers folded in, its labels and `info`."""
    state = {name: tensor.half().contiguous() for name, tensor in folded_state(net).items()}
    save_file(state, path, {"judge": json.dumps({**_labels(), **info})})


def _labels() -> dict[str, list[str]]:
    return {"nouns": list(NOUNS), "backgrounds": list(BACKGROUNDS), "styles": list(STYLES)}


def folded_state(net: nn.Module) -> dict[str, Tensor]:
    """The state of the same network without normalisation layers, which are folded into the convolutions.

    w' = w·γ/σ,   b' = β − μ·γ/σ   for each output channel
    """
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("trunk")}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Sequential) and len(layer) == 3 and isinstance(layer[1], nn.BatchNorm2d):
            values = layer.state_dict()
            scale = values["1.weight"] / (values["1.running_var"] + layer[1].eps).sqrt()
            state[f"{name}.0.weight"] = values["0.weight"] * scale[:, None, None, None]
            state[f"{name}.0.bias"] = values["1.bias"] - values["1.running_mean"] * scale
    return {name: tensor.detach() for name, tensor in state.items()}


def resized(images: Any) -> Tensor:
    """Pictures as the network's input (b, 3, 64, 64) in [−1, 1], averaged down (or interpolated up)."""
    pixels = as_pixels(images)
    if pixels.shape[-2:] == (SIDE, SIDE):
        return pixels
    return interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def as_pixels(images: Any) -> Tensor:
    """Pictures of any form as pixels (b, 3, H, W) in [−1, 1], float32 on the CPU.

    images: one or several PIL images, a uint8 array (b, H, W, 3) or (H, W, 3), or a float tensor (b, 3, H, W) or
        (3, H, W) in [−1, 1].

    Raises:
        ValueError: anything else.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Tensor) and images.is_floating_point():
        return (images[None] if images.ndim == 3 else images).detach().float().cpu()
    if isinstance(images, Tensor):
        images = images.cpu().numpy()
    if not isinstance(images, np.ndarray):
        images = np.stack([np.asarray(im.convert("RGB") if isinstance(im, Image.Image) else im) for im in images])
    if images.ndim == 3:
        images = images[None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 pictures (b, H, W, 3), got {images.dtype} {images.shape}")
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def as_bytes(pixels: Tensor) -> np.ndarray:
    """Pixels (b, 3, H, W) in [−1, 1] as RGB uint8 (b, H, W, 3)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def object_crop(image: Any, mask: np.ndarray) -> Tensor:
    """A square crop around the object under `mask`, as (1, 3, 64, 64); its side is the mask's longest / `OBJECT_SHARE`.

    Where the crop exceeds the picture, the border's pixels are repeated.

    Raises:
        ValueError: the mask is empty or has another size than the picture.
    """
    pixels = as_pixels(image)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("the mask is empty: there is no object to look at")
    if mask.shape != tuple(pixels.shape[-2:]):
        raise ValueError(f"mask {mask.shape} and picture {tuple(pixels.shape[-2:])} differ in size")
    side = round(max(np.ptp(rows), np.ptp(columns)) / OBJECT_SHARE) + 1
    top, left = (round((axis[0] + axis[-1] + 1 - side) / 2) for axis in (rows, columns))
    down = torch.arange(top, top + side).clamp(0, mask.shape[0] - 1)
    across = torch.arange(left, left + side).clamp(0, mask.shape[1] - 1)
    return resized(pixels[:1, :, down][..., across])


def _verdict(grid: Tensor, noun: Tensor, background: Tensor, style: Tensor) -> Verdict:
    probs: dict[str, float] = dict(zip(NOUNS, noun.sigmoid().tolist(), strict=True))
    styles = dict(zip(STYLES, style.softmax(-1).tolist(), strict=True))
    present = frozenset(name for name, prob in probs.items() if prob > THRESHOLD)
    return Verdict(
        nouns=present,
        background=BACKGROUNDS[int(background.argmax())],
        style=max(styles, key=styles.__getitem__),
        noun_probs=probs,
        style_probs=styles,
        places={name: _centre(grid[NOUNS.index(name)].sigmoid()) for name in sorted(present)},
    )


def _centre(weights: Tensor) -> tuple[float, float]:
    """The centre of mass (x, y) of a map (h, w), in fractions of the frame."""
    h, w = weights.shape
    x, y = (torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h
    total = weights.sum()
    return float((weights * x).sum() / total), float((weights * y[:, None]).sum() / total)
