"""Scorers for pictures of real models: CLIP judges the edit, LPIPS or DINOv2 the distance from the source picture.

The networks are loaded from a folder or hub id that the user names.  Pictures of the embedded model need none: the
package has its own scorer for them (`personalize.evaluation.scene_scorer`).
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
from personalize.evaluation.networks import load_clip, load_lpips, load_vit, load_vit_processor
from personalize.evaluation.scene_scorer import SceneScorer
from personalize.evaluation.scoring import Request, Scorer, Scores, clip_score
from personalize.io.images import to_pixels

LPIPS_SIDE = 512  # px: pictures are resized to this, for LPIPS depends on the size
LPIPS_NETS = ("alex", "vgg")


def find_scorer(
    base: str, clip_model: str | None = None, identity_model: str | None = None, device: Any = "cpu"
) -> Scorer:
    """The scorer for pictures of the base model `base`: CLIP if a model is named, the package's own for "embedded".

    identity_model: a DINOv2 folder or hub id, or "alex" (the default) or "vgg" for LPIPS, of the extra `metrics`.

    Raises:
        UserError: another base without a CLIP model, an identity model without one, or a model that cannot be loaded.
    """
    if clip_model is not None:
        return ClipScorer(clip_model, identity_distance(identity_model or LPIPS_NETS[0], device), device)
    if identity_model is not None:
        raise UserError("--identity_model goes with --clip_model: name both, or neither on the embedded model")
    if base != "embedded":
        raise UserError(
            f"pictures of {base or 'this base'} need a CLIP model to be judged: name a folder or hub id, e.g. "
            "--clip_model openai/clip-vit-large-patch14"
        )
    return SceneScorer.load()


class Distance:
    """A distance of pictures from their source, with two thresholds.

    copy_distance: a picture without the edit that is nearer than this is a copy of the source.
    lost_distance: a picture farther away than this has lost the source's identity.
    measure: distances (n − 1,) from the first of n pictures to each of the others.
    """

    def __init__(
        self,
        name: str,
        copy_distance: float,
        lost_distance: float,
        measure: Callable[[Sequence[Image.Image]], Tensor],
    ) -> None:
        self.name, self._measure = name, measure
        self.copy_distance, self.lost_distance = copy_distance, lost_distance

    def __call__(self, source: Image.Image, pictures: Sequence[Image.Image]) -> list[float]:
        """The distance of each picture from `source`, ≥ 0; the source itself has 0."""
        return self._measure([source, *pictures]).clamp_min(0).tolist()


def identity_distance(model: str, device: Any = "cpu") -> Distance:
    """LPIPS for "alex" or "vgg"; else 1 − cosine of class tokens, by the DINOv2 model in that folder or on the hub.

    Raises:
        UserError: LPIPS is not installed, or the model cannot be loaded.

    References: Zhang et al., arXiv 1801.03924 (LPIPS); Oquab et al., arXiv 2304.07193 (DINOv2).
    """
    if model in LPIPS_NETS:
        return Distance(f"LPIPS ({model})", 0.25, 0.65, _lpips(model, device))
    return Distance(f"DINO ({model})", 0.15, 0.6, _dino(model, device))


def _lpips(net: str, device: Any) -> Callable[[Sequence[Image.Image]], Tensor]:
    try:
        model = load_lpips(net, device)
    except UserError as error:
        raise UserError(f"{error}; or name a DINOv2 folder or hub id with --identity_model") from None

    @torch.inference_mode()
    def measure(pictures: Sequence[Image.Image]) -> Tensor:
        size = (LPIPS_SIDE, LPIPS_SIDE)
        rows = [interpolate(to_pixels(p), size, mode="bilinear", antialias=True) for p in pictures]
        source = rows[0].to(device)
        return torch.cat([model(source, row.to(device)).flatten() for row in rows[1:]]).cpu()

    return measure


def _dino(folder: str, device: Any) -> Callable[[Sequence[Image.Image]], Tensor]:
    model = load_vit("identity_model", folder, device)
    processor = load_vit_processor("identity_model", folder)

    @torch.inference_mode()
    def measure(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device)
        class_tokens = model(pixel_values=pixels).last_hidden_state[:, 0].float().cpu()
        return 1 - cosine_similarity(class_tokens[:1], class_tokens[1:])

    return measure


class ClipScorer:
    """Scores the edit by CLIP and identity by a `Distance`.

        edit = softmax(s cos(picture, prompt), s cos(picture, caption))[0]        identity = 1 − distance

    s is CLIP's learned scale.  A picture that CLIP finds nearer to the source's caption than to the prompt has
    edit < ½.  `facts` hold the cosine of picture and prompt, CLIPScore, and that cosine minus the source picture's.
    """

    def __init__(self, model: str | Path, distance: Distance, device: Any = "cpu") -> None:
        self.model, self.processor = load_clip(model, device)
        self.distance, self.device = distance, device
        self.name = f"CLIP ({model}) and {distance.name}"
        self.copy_distance, self.lost_distance = distance.copy_distance, distance.lost_distance

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], request: Request) -> list[Scores]:
        texts = [request.prompt, request.caption or "a picture"]
        inputs = self.processor(
            text=texts, images=[request.source, *pictures], return_tensors="pt", padding=True, truncation=True
        ).to(self.device)
        output = self.model(**inputs)
        image, text = output.image_embeds.float(), output.text_embeds.float()
        edit = output.logits_per_image.float().softmax(-1)[1:, 0]
        cosine = cosine_similarity(image, text[:1])
        clip_scores, gain = clip_score(image[1:], text[:1]), cosine[1:] - cosine[0]
        return [
            Scores(
                float(edit[i]), 1 - min(1.0, distance), distance,
                {"clip_cosine": float(cosine[1 + i]), "clip_score": float(clip_scores[i]), "clip_gain": float(gain[i])},
            )
            for i, distance in enumerate(self.distance(request.source, pictures))
        ]  # fmt: skip
