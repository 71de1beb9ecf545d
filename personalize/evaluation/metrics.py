"""How well an edited picture keeps its source and follows its prompt: the metrics of PIE-Bench.

Background metrics set both pictures to black inside the mask and average over the whole frame.  The networks (CLIP, a
ViT, LPIPS) are named by the user: a folder, a hub id, or a file.  What cannot be measured raises `Unavailable` with the
reason; no number takes its place.

References: Ju et al., "Direct Inversion" (PIE-Bench), arXiv 2310.01506; Tumanyan et al., "Splicing ViT Features",
arXiv 2201.00424, for structure; Zhang et al., arXiv 1801.03924 (LPIPS); Hessel et al., arXiv 2104.08718 (CLIP score).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, mse_loss, normalize

from personalize.evaluation.benchmarks import Point
from personalize.evaluation.networks import Unavailable, load_clip, load_lpips, load_vit
from personalize.evaluation.point_matching import PointMatching

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DINO_SIDE = 224  # px, of the shorter side


@dataclass(frozen=True)
class ImagePair:
    """A source picture and its edit, as pixels (1, 3, H, W) in [0, 1], with both prompts ("" if there are none).

    mask: (H, W), True where the edit belongs; None if it is not known.
    points: of a drag, (handle, target), each (x, y) in pixels.
    """

    source: Tensor
    edited: Tensor
    mask: Tensor | None = None
    source_prompt: str = ""
    target_prompt: str = ""
    points: tuple[tuple[Point, Point], ...] = ()

    def background(self) -> tuple[Tensor, Tensor]:
        """Source and edit, black inside the mask.

        Raises:
            Unavailable: there is no mask, or it covers the whole picture.
        """
        if self.mask is None or bool(self.mask.all()):
            raise Unavailable("no mask" if self.mask is None else "the mask leaves no background")
        keep = (~self.mask).to(self.source)
        return self.source * keep, self.edited * keep


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of pictures in [0, 1], over the whole frame."""
    return float(mse_loss(a.double(), b.double()))


def psnr(a: Tensor, b: Tensor) -> float:
    """10 log₁₀(1 / mse), dB; ∞ for equal pictures."""
    error = mse(a, b)
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity, at most 1, by torchmetrics: Gaussian window of 11 px and σ 1.5, data range 1."""
    try:
        from torchmetrics.functional.image import (  # pyright: ignore[reportMissingImports]
            structural_similarity_index_measure,
        )
    except ImportError:
        raise Unavailable("torchmetrics is not installed: pip install 'personalize[metrics]'") from None
    return float(structural_similarity_index_measure(a, b, data_range=1.0))  # pyright: ignore[reportArgumentType]


class Structure:
    """Structure distance: mean squared difference of two pictures' self-similarity in DINO's last block.

        S(x) = cosines between the keys of all tokens, heads concatenated, (l, l);    distance = mean (S(a) − S(b))²

    As in the published code, pixels enter ImageNet's normalisation as 0–255, not divided by 255, and pictures are
    resized to a shorter side of 224 px.
    """

    def __init__(self, network: str | None, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.model = load_vit("structure_model", network, device)
        layers = [module for name, module in self.model.named_modules() if name.endswith((".k_proj", ".key"))]
        if not layers:
            raise Unavailable(f"{network} has no attention keys: give a ViT, such as facebook/dino-vitb8")
        self.layer = layers[-1]

    @torch.no_grad()
    def similarities(self, picture: Tensor) -> Tensor:
        """S of `picture` (1, 3, H, W) in [0, 1]: cosines of all pairs of keys, (1, l, l)."""
        height, width = picture.shape[-2:]
        scale = DINO_SIDE / min(height, width)
        size = (round(height * scale), round(width * scale))
        resized = interpolate(picture.to(self.device), size, mode="bilinear", antialias=True) * 255
        mean, std = (torch.tensor(part, device=self.device).view(1, 3, 1, 1) for part in IMAGENET)
        outputs: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model((resized - mean) / std, interpolate_pos_encoding=True)
        finally:
            handle.remove()
        keys = normalize(outputs[0], dim=-1)
        return keys @ keys.transpose(1, 2)

    def __call__(self, a: Tensor, b: Tensor) -> float:
        return float(mse_loss(self.similarities(a), self.similarities(b)))


class ClipScore:
    """CLIP score: 100 · max(0, cos) of a picture's and a text's embedding.  Different CLIP models do not compare."""

    def __init__(self, network: str | None, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.model, self.processor = load_clip(network, device)

    @torch.no_grad()
    def __call__(self, picture: Tensor, text: str) -> float:
        """The score of a picture (1, 3, H, W) in [0, 1], which is rounded to 8 bits as PIE-Bench does."""
        array = (picture[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        inputs = self.processor(text=[text], images=[array], return_tensors="pt", padding=True, truncation=True)
        output = self.model(**inputs.to(self.device))
        return max(0.0, 100 * float(cosine_similarity(output.image_embeds, output.text_embeds)))


class Lpips:
    """LPIPS distance on "squeeze", "alex" or "vgg"; `backbone` is the file of torchvision's squeezenet1_1 weights."""

    def __init__(self, backbone: str | Path | None, device: torch.device | str = "cpu", net: str = "squeeze") -> None:
        self.device = device
        self.network = load_lpips(net, device, backbone=backbone)

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> float:
        """The distance of two pictures (1, 3, H, W) in [0, 1]; 0 for equal ones."""
        return float(self.network((2 * a - 1).to(self.device), (2 * b - 1).to(self.device)))


@dataclass(frozen=True)
class Metric:
    """A column of the table: its name, the factor it is reported with, and whether larger values are better.

    measure: the value of one item, or a list of as many as the item has, all of which count alike in the mean.
    """

    name: str
    factor: float
    larger_is_better: bool
    measure: Callable[[ImagePair], float | list[float]]


def metrics(
    structure: Structure | Unavailable, clip: ClipScore | Unavailable, perceptual: Lpips | Unavailable
) -> list[Metric]:
    """All columns in the order of PIE-Bench's tables.

    A network that could not be loaded is given as the `Unavailable` that says why; its metrics raise it when measured.
    """

    def clip_of_edited_region(pair: ImagePair) -> float:
        if pair.mask is None or not bool(pair.mask.any()):
            raise Unavailable("no mask" if pair.mask is None else "the mask holds no edit")
        return _require(clip)(pair.edited * pair.mask.to(pair.edited), _require_prompt(pair.target_prompt))

    return [
        Metric("structure", 1e3, False, lambda pair: _require(structure)(pair.source, pair.edited)),
        Metric("psnr", 1, True, lambda pair: psnr(*pair.background())),
        Metric("lpips", 1e3, False, lambda pair: _require(perceptual)(*pair.background())),
        Metric("mse", 1e4, False, lambda pair: mse(*pair.background())),
        Metric("ssim", 1e2, True, lambda pair: ssim(*pair.background())),
        Metric("clip whole", 1, True, lambda pair: _require(clip)(pair.edited, _require_prompt(pair.target_prompt))),
        Metric("clip edited", 1, True, clip_of_edited_region),
        Metric("clip source", 1, True, lambda pair: _require(clip)(pair.source, _require_prompt(pair.source_prompt))),
        Metric("psnr, whole frame", 1, True, lambda pair: psnr(pair.source, pair.edited)),
        Metric("lpips, whole frame", 1e3, False, lambda pair: _require(perceptual)(pair.source, pair.edited)),
    ]  # fmt: skip


def drag_metrics(perceptual: Lpips | Unavailable, matching: PointMatching | Unavailable) -> list[Metric]:
    """DragBench's columns: mean distance in pixels (MD) over the points of all pictures, as published, and image
    fidelity 1 − LPIPS (IF)."""

    def distances(pair: ImagePair) -> list[float]:
        if not pair.points:
            raise Unavailable("no points")
        return _require(matching).distances(pair.source, pair.edited, pair.points, pair.source_prompt)

    return [
        Metric("mean distance, px", 1, False, distances),
        Metric("image fidelity", 1, True, lambda pair: 1 - _require(perceptual)(pair.source, pair.edited)),
    ]


def or_unavailable(make: Callable[[], Any]) -> Any:
    """What `make` returns, or the `Unavailable` it raises, for the argument of `metrics`."""
    try:
        return make()
    except Unavailable as reason:
        return reason


def _require(network: Any) -> Any:
    if isinstance(network, Unavailable):
        raise network
    return network


def _require_prompt(prompt: str) -> str:
    if not prompt:
        raise Unavailable("no prompt")
    return prompt
