"""Scorers for real models: CLIP says whether the edit is there, LPIPS or DINOv2 how far the picture is from the source.

Everything is loaded from a folder or hub id that the user names; on the embedded model the package has a scorer of its
own (`personalize.scene_scorer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from personalize.errors import UserError
from personalize.images import to_pixels
from personalize.scene_scorer import SceneScorer
from personalize.scoring import Reading, Request, Scorer, clip_score

LPIPS_SIDE = 512  # pixels: one size for all, so that figures compare
LPIPS_NETS = ("alex", "vgg")


def find_scorer(
    base: str, clip_model: str | None = None, identity_model: str | None = None, device: Any = "cpu"
) -> Scorer:
    """The scorer for pictures of the base model named `base`: the package's own on the embedded model, else CLIP.

    `identity_model` is a DINOv2 folder or hub id, or "alex" or "vgg" for LPIPS (the default, from the extra `metrics`).

    Raises:
        UserError: neither the embedded model nor a CLIP model, or one that cannot be loaded.
    """
    if clip_model is not None:
        return ClipScorer(clip_model, identity(identity_model or LPIPS_NETS[0], device), device)
    if identity_model is not None:
        raise UserError("--identity_model goes with --clip_model: name both, or neither on the embedded model")
    if base != "embedded":
        raise UserError(
            f"pictures of {base or 'this base'} need a CLIP model to be judged: name a folder or hub id, e.g. "
            "--clip_model openai/clip-vit-large-patch14"
        )
    return SceneScorer.load()


class Distance:
    """Distance of pictures from a source, with what counts as a copy of it and as a loss of it.

    `copy`: below this distance a picture without the edit is a copy; `lost`: above it the source is gone.
    """

    def __init__(self, name: str, copy: float, lost: float, measure: Callable[[Sequence[Image.Image]], Tensor]) -> None:
        self.name, self.copy, self.lost, self._measure = name, copy, lost, measure

    def __call__(self, source: Image.Image, pictures: Sequence[Image.Image]) -> list[float]:
        """Distances, 0 for the source itself."""
        return self._measure([source, *pictures]).clamp_min(0).tolist()


def identity(model: str, device: Any = "cpu") -> Distance:
    """LPIPS ("alex" or "vgg"), or 1 − cosine of the class tokens of the DINOv2 model in a folder or on the hub.

    References: Zhang et al., arXiv 1801.03924 (LPIPS); Oquab et al., arXiv 2304.07193 (DINOv2).
    """
    if model in LPIPS_NETS:
        return Distance(f"LPIPS ({model})", 0.25, 0.65, _lpips(model, device))
    return Distance(f"DINO ({model})", 0.15, 0.6, _dino(model, device))


def _lpips(net: str, device: Any) -> Callable[[Sequence[Image.Image]], Tensor]:
    try:
        import lpips  # pyright: ignore[reportMissingImports]  # of the extra
    except ImportError:
        raise UserError(
            "identity is measured with LPIPS, which is not installed: pip install 'personalize[metrics]', or name a "
            "DINOv2 folder or hub id with --identity_model"
        ) from None
    try:
        model = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False).to(device)
    except (OSError, RuntimeError) as error:  # its backbone is fetched by torchvision
        raise _unloadable("identity_model", net, error) from None

    @torch.inference_mode()
    def measure(pictures: Sequence[Image.Image]) -> Tensor:
        size = (LPIPS_SIDE, LPIPS_SIDE)
        rows = [interpolate(to_pixels(p), size, mode="bilinear", antialias=True) for p in pictures]
        source = rows[0].to(device)
        return torch.cat([model(source, row.to(device)).flatten() for row in rows[1:]]).cpu()

    return measure


def _dino(folder: str, device: Any) -> Callable[[Sequence[Image.Image]], Tensor]:
    from transformers import AutoImageProcessor, Dinov2Model

    model, processor = _load("identity_model", folder, Dinov2Model, AutoImageProcessor, device)

    @torch.inference_mode()
    def measure(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device)
        features = model(pixel_values=pixels).pooler_output.float().cpu()
        return 1 - cosine_similarity(features[:1], features[1:])

    return measure


class ClipScorer:
    """CLIP for the edit, a `Distance` for identity.

        edit = softmax over (prompt, caption) of  CLIP's scale · cos(picture, text),  the prompt's part
        identity = 1 − distance

    So a picture that CLIP would rather call by the caption has edit < ½.  `facts` hold the raw cosine, CLIPScore, and
    the gain of the cosine over the source picture's own.
    """

    def __init__(self, model: str | Path, distance: Distance, device: Any = "cpu") -> None:
        from transformers import AutoProcessor, CLIPModel

        self.model, self.processor = _load("clip_model", str(model), CLIPModel, AutoProcessor, device)
        self.distance, self.device = distance, device
        self.name = f"CLIP ({model}) and {distance.name}"
        self.copy, self.lost = distance.copy, distance.lost

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], request: Request) -> list[Reading]:
        texts = [request.prompt, request.caption or "a picture"]
        inputs = self.processor(
            text=texts, images=[request.source, *pictures], return_tensors="pt", padding=True, truncation=True
        ).to(self.device)
        found = self.model(**inputs)
        image, text = found.image_embeds.float(), found.text_embeds.float()
        edit = found.logits_per_image.float().softmax(-1)[1:, 0]
        cosine = cosine_similarity(image, text[:1])
        scores, gain = clip_score(image[1:], text[:1]), cosine[1:] - cosine[0]
        return [
            Reading(
                float(edit[i]), 1 - min(1.0, far), far,
                {"clip_cosine": float(cosine[1 + i]), "clip_score": float(scores[i]), "clip_gain": float(gain[i])},
            )
            for i, far in enumerate(self.distance(request.source, pictures))
        ]  # fmt: skip


def _load(option: str, folder: str, kind: Any, processor: Any, device: Any) -> tuple[Any, Any]:
    """A frozen transformers model in fp32 and its processor."""
    try:
        model = kind.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False).to(device)
        return model, processor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise _unloadable(option, folder, error) from None


def _unloadable(option: str, folder: str, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"--{option} {folder} cannot be loaded: {reason}; give a folder or hub id with such a model")
