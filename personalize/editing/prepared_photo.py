"""What is computed from a photo before its edit is sampled: inversion, dynamic prompts, auxiliary reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from personalize.editing.config import UniformSettings
from personalize.editing.dynamic_prompt_learning.fit import DynamicPrompt
from personalize.editing.dynamic_prompt_learning.leakage import (
    AttentionReport,
    check_regions,
    mean_noun_maps,
    noun_map_sheet,
    report_attention,
)
from personalize.editing.dynamic_prompt_learning.stored_fit import fit_dynamic_prompt
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image_settings import EditRequest
from personalize.editing.region import EditRegion
from personalize.editing.uniform_attention import UniformBlend, auxiliary_estimates
from personalize.errors import UserError
from personalize.io.images import psnr
from personalize.io.progress import part
from personalize.models.image_processor import PaddedImage
from personalize.models.stable_diffusion import StableDiffusion
from personalize.sampling.inversion import invert
from personalize.sampling.schedule import make_schedule
from personalize.sampling.trajectory import Trajectory

FAR = 6.0  # dB: a reconstruction that loses so much to another one looks like another picture


@dataclass(frozen=True)
class PreparedImage:
    """A photo that is ready to be edited.

    report: where its nouns attend, if they are made dynamic; dynamic: their fitted embeddings.
    blend: the auxiliary reconstruction, if uniform attention maps are used.
    """

    trajectory: Trajectory
    report: AttentionReport | None = None
    dynamic: DynamicPrompt | None = None
    blend: UniformBlend | None = None


def prepare_image(
    model: StableDiffusion, frame: PaddedImage, source: str, targets: Sequence[str], request: EditRequest,
    settings: PhotoSettings, folder: str | Path | None, cache: str | Path | None, region: EditRegion | None, *,
    plain: bool,
) -> PreparedImage:  # fmt: skip
    """Invert a photo and, unless `plain`, fit its dynamic prompt and sample its auxiliary reconstruction."""
    dynamic, uniform = (None, None) if plain else (settings.dynamic, settings.uniform)
    mask = None if region is None else region.cells
    if dynamic is not None:
        check_regions(model, frame, source, request.regions)
    scale, null_text = settings.guidance(model.name), settings.null_text_settings(model.name)
    if uniform is not None:
        require_blended(model, settings, uniform)
    joint = dynamic is not None and settings.inversion == "null-text"  # null embeddings are fitted with the nouns
    trajectory = invert(
        model, frame.pixels, "" if settings.controller == "mutual" else source,
        "ddim" if joint else settings.inversion, steps=settings.steps, strength=settings.inverted_share,
        seed=settings.seed, null_text=null_text, fixed_point=settings.fixed_point, folder=folder, cache=cache,
        guidance_scale=scale if settings.inversion == "null-text" else None, beside=targets,
    )  # fmt: skip
    with part("Reconstructing with uniform maps"):
        blend = None if uniform is None else blend_of(model, frame, trajectory, uniform, mask)
    if dynamic is None:
        return PreparedImage(trajectory, blend=blend)
    with part("Reading attention maps"):
        report = report_attention(model, frame, trajectory, source, request.regions, dynamic)
    with part("Fitting dynamic prompts"):
        rows, trajectory = fit_dynamic_prompt(
            model, trajectory, source, report, dynamic, size=pixel_size(frame), guidance_scale=scale,
            null_text=null_text if joint else None, cache=cache,
        )  # fmt: skip
    return PreparedImage(trajectory, report, rows, blend)


def blend_of(
    model: StableDiffusion, frame: PaddedImage, trajectory: Trajectory, settings: UniformSettings, mask: Tensor | None
) -> UniformBlend:
    """The latent edit of uniform maps, with the auxiliary reconstruction of the photo; `mask` boolean (h, w)."""
    down = make_schedule(model, trajectory.about["steps"], strength=trajectory.about["strength"])
    up = make_schedule(model, trajectory.about["steps"], strength=trajectory.about["strength"], inverse=True)
    return UniformBlend(auxiliary_estimates(model, model.encode(frame.pixels), up, down, settings), settings, mask)


def auxiliary_notes(
    model: StableDiffusion, frame: PaddedImage, blend: UniformBlend | None, source: Tensor
) -> tuple[str, ...]:
    """A remark if the auxiliary reconstruction is much farther from the photo than the source's own, `source`.

    `source`: pixels (1, 3, H, W) in [−1, 1]. Without a caption some photos are inverted badly, and the edit would get
    its unedited parts from such a reconstruction.
    """
    if blend is None:
        return ()
    last = blend.auxiliary[min(blend.auxiliary)]
    own, auxiliary = (psnr(one, frame.pixels) for one in (source, model.decode(last).cpu()))
    if auxiliary > own - FAR:
        return ()
    return (
        f"the reconstruction with uniform maps, which unedited parts come from, has a PSNR of {auxiliary:.0f} dB from "
        f"the photo, where the source has {own:.0f}: compare --uniform_auxiliary stored, or leave --uniform out",
    )


def require_blended(model: StableDiffusion, settings: PhotoSettings, uniform: UniformSettings) -> None:
    """UserError if uniform maps would blend no step of the edit."""
    down = make_schedule(model, settings.steps, strength=settings.inverted_share)
    if not any(map(uniform.blends, down)):
        raise UserError("no step is below the uniform maps' limit: raise --uniform_until or the number of steps")


def dynamic_noun_sheet(model: StableDiffusion, frame: PaddedImage, prepared: PreparedImage) -> Image.Image:
    """A sheet with the attention map of each noun of the photo before and after dynamic prompts fitted it."""
    assert prepared.report is not None and prepared.dynamic is not None
    length = prepared.trajectory.conditioning.embeds.shape[1]
    dynamic = prepared.dynamic.conditionings(model, [prepared.dynamic.prompt], pixel_size(frame), length)
    stages = {"before": [prepared.trajectory.conditioning] * len(dynamic), "after": dynamic}
    groups, trajectory = prepared.report.groups, prepared.trajectory
    with part("Reading attention maps"):
        maps = {name: mean_noun_maps(model, trajectory, groups, one) for name, one in stages.items()}
    return noun_map_sheet(frame, groups, maps)


def pixel_size(frame: PaddedImage) -> tuple[int, int]:
    """Height and width of the padded photo in pixels."""
    return int(frame.pixels.shape[-2]), int(frame.pixels.shape[-1])
