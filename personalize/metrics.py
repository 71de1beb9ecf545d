"""How an edited picture compares with its source and its prompt, by the conventions of PIE-Bench.

Background metrics multiply both pictures by 1 − mask and average over the whole frame.  Networks are given by the user:
folders, hub ids, or a file.  What cannot be measured is a `Missing`, with the reason, and never a number.

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

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DINO_SIDE = 224  # px, of the shorter side


class Missing(Exception):
    """A metric that cannot be measured, and why."""


@dataclass(frozen=True)
class Pair:
    """What is compared: pixels (1, 3, H, W) in [0, 1], the true edit region (H, W) if there is one, the prompts."""

    source: Tensor
    edited: Tensor
    mask: Tensor | None = None
    source_prompt: str = ""
    target_prompt: str = ""

    def background(self) -> tuple[Tensor, Tensor]:
        """Source and edit, black where the mask is.  Raises Missing without a mask or without background."""
        if self.mask is None or bool(self.mask.all()):
            raise Missing("no mask" if self.mask is None else "the mask leaves no background")
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
    """Structural similarity: Gaussian of 11 px and σ 1.5, range 1, as torchmetrics has it."""
    try:
        from torchmetrics.functional.image import (  # pyright: ignore[reportMissingImports]
            structural_similarity_index_measure,
        )
    except ImportError:
        raise Missing("torchmetrics is not installed: pip install 'personalize[metrics]'") from None
    return float(structural_similarity_index_measure(a, b, data_range=1.0))  # pyright: ignore[reportArgumentType]


class Structure:
    """Distance of self-similarity: MSE of the cosines between keys of DINO's last block, heads concatenated.

    As published, pictures go into ImageNet's normalisation as 0–255, not divided by 255; the shorter side is 224 px.
    """

    def __init__(self, network: str | None, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.model: Any = _pretrained("AutoModel", network, "--structure_model", "facebook/dino-vitb8").to(device)
        layers = [module for name, module in self.model.named_modules() if name.endswith((".k_proj", ".key"))]
        if not layers:
            raise Missing(f"{network} has no attention keys: give a ViT, such as facebook/dino-vitb8")
        self.layer = layers[-1]

    @torch.no_grad()
    def similarities(self, picture: Tensor) -> Tensor:
        """(1, l, l) cosines of the keys of `picture` (1, 3, H, W) in [0, 1]."""
        height, width = picture.shape[-2:]
        scale = DINO_SIDE / min(height, width)
        size = (round(height * scale), round(width * scale))
        resized = interpolate(picture.to(self.device), size, mode="bilinear", antialias=True) * 255
        mean, std = (torch.tensor(part, device=self.device).view(1, 3, 1, 1) for part in IMAGENET)
        kept: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda module, args, output: kept.append(output))
        try:
            self.model((resized - mean) / std, interpolate_pos_encoding=True)
        finally:
            handle.remove()
        keys = normalize(kept[0], dim=-1)
        return keys @ keys.transpose(1, 2)

    def __call__(self, a: Tensor, b: Tensor) -> float:
        return float(mse_loss(self.similarities(a), self.similarities(b)))


class ClipScore:
    """100 · max(0, cos) of a picture and a text under one CLIP; scores of different CLIPs do not compare."""

    def __init__(self, network: str | None, device: torch.device | str = "cpu") -> None:
        self.device = device
        wish = ("--clip_model", "openai/clip-vit-large-patch14")
        self.model: Any = _pretrained("CLIPModel", network, *wish).to(device)
        self.processor: Any = _pretrained("CLIPProcessor", network, *wish)

    @torch.no_grad()
    def __call__(self, picture: Tensor, text: str) -> float:
        """Of a picture (1, 3, H, W) in [0, 1], rounded to 8 bits as the reference does."""
        bytes_ = (picture[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        told = self.processor(text=[text], images=[bytes_], return_tensors="pt", padding=True, truncation=True)
        output = self.model(**told.to(self.device))
        return max(0.0, 100 * float(cosine_similarity(output.image_embeds, output.text_embeds)))


class Lpips:
    """LPIPS on SqueezeNet, of pictures mapped to [−1, 1]; `backbone` is torchvision's squeezenet1_1 as a file."""

    def __init__(self, backbone: str | Path | None, device: torch.device | str = "cpu") -> None:
        try:
            import lpips  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise Missing("lpips is not installed: pip install 'personalize[metrics]'") from None
        if backbone is None:
            raise Missing("no backbone is given: name the file of torchvision's squeezenet1_1 with --lpips_backbone")
        self.device = device
        self.network: Any = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
        self._fill(_state(backbone), backbone)
        self.network.eval().to(device)

    def _fill(self, state: dict[str, Tensor], where: str | Path) -> None:
        """Give the backbone's slices `features.N.…` of torchvision's file."""
        own = {name.partition(".")[2]: name for name in self.network.net.state_dict()}
        found = {own[key]: tensor for name, tensor in state.items() if (key := name.removeprefix("features.")) in own}
        if set(found) != set(own.values()):
            raise Missing(f"{where} is not torchvision's squeezenet1_1: it lacks {sorted(set(own) - set(state))[:1]}")
        self.network.net.load_state_dict(found)

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> float:
        return float(self.network((2 * a - 1).to(self.device), (2 * b - 1).to(self.device)))


@dataclass(frozen=True)
class Metric:
    """A column of the table: its name, the factor it is reported with, whether larger is better, and how to measure."""

    name: str
    factor: float
    larger: bool
    measure: Callable[[Pair], float]


def metrics(structure: Structure | Missing, clip: ClipScore | Missing, perceptual: Lpips | Missing) -> list[Metric]:
    """All columns, in the order of PIE-Bench's tables; networks that could not be loaded are given as Missing."""

    def edited(pair: Pair) -> float:
        if pair.mask is None or not bool(pair.mask.any()):
            raise Missing("no mask" if pair.mask is None else "the mask holds no edit")
        return _there(clip)(pair.edited * pair.mask.to(pair.edited), _said(pair.target_prompt))

    return [
        Metric("structure", 1e3, False, lambda pair: _there(structure)(pair.source, pair.edited)),
        Metric("psnr", 1, True, lambda pair: psnr(*pair.background())),
        Metric("lpips", 1e3, False, lambda pair: _there(perceptual)(*pair.background())),
        Metric("mse", 1e4, False, lambda pair: mse(*pair.background())),
        Metric("ssim", 1e2, True, lambda pair: ssim(*pair.background())),
        Metric("clip whole", 1, True, lambda pair: _there(clip)(pair.edited, _said(pair.target_prompt))),
        Metric("clip edited", 1, True, edited),
        Metric("clip source", 1, True, lambda pair: _there(clip)(pair.source, _said(pair.source_prompt))),
        Metric("psnr, whole frame", 1, True, lambda pair: psnr(pair.source, pair.edited)),
        Metric("lpips, whole frame", 1e3, False, lambda pair: _there(perceptual)(pair.source, pair.edited)),
    ]  # fmt: skip


def loaded(make: Callable[[], Any]) -> Any:
    """What `make` returns, or the `Missing` it raises."""
    try:
        return make()
    except Missing as reason:
        return reason


def _there(network: Any) -> Any:
    if isinstance(network, Missing):
        raise network
    return network


def _said(prompt: str) -> str:
    if not prompt:
        raise Missing("no prompt")
    return prompt


def _pretrained(kind: str, network: str | None, option: str, example: str) -> Any:
    if network is None:
        raise Missing(f"no network is given: name a folder or hub id with {option}, e.g. {example}")
    import transformers

    try:
        found = getattr(transformers, kind).from_pretrained(network)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Missing(f"{network} cannot be loaded: {reason}") from None
    return found.eval() if isinstance(found, torch.nn.Module) else found


def _state(path: str | Path) -> dict[str, Tensor]:
    from personalize.errors import UserError
    from personalize.pickles import read_any

    try:
        return read_any(path, allow_pickle=True).tensors
    except UserError as error:
        raise Missing(str(error)) from None
