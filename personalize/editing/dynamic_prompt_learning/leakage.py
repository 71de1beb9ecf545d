"""Report where the nouns of a photo's prompt attend, and fit a dynamic prompt that makes each attend to its own object.

1.  `report_attention` collects attention maps of the inversion and says whether dynamic prompts are needed.
2.  `fit_dynamic_prompt` fits the nouns' embeddings, on the inverted latents or together with null embeddings.
3.  The edit uses the resulting `DynamicPrompt.conditionings`, one for each step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.dynamic_prompt_learning.background import find_background
from personalize.editing.dynamic_prompt_learning.fit import (
    DynamicFit,
    DynamicPrompt,
    DynamicSettings,
    Leakage,
    fit_on_trajectory,
    leakage,
    thresholds,
)
from personalize.editing.dynamic_prompt_learning.noun_groups import NounGroup, group_maps, noun_groups
from personalize.editing.dynamic_prompt_learning.stage_maps import stage_attention
from personalize.errors import UserError
from personalize.io.atomic import write_folder
from personalize.io.figures import grid, overlay
from personalize.io.tensor_files import read_json, read_tensors, tensor_bytes
from personalize.models.attention import hooked
from personalize.models.attention_maps import InversionMaps
from personalize.models.image_processor import PaddedImage, Picture, as_image
from personalize.models.map_filters import normalised
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.null_text import NullFit, NullTextSettings
from personalize.sampling.schedule import Step
from personalize.sampling.trajectory import Trajectory, tensor_hash

ROWS, ABOUT = "dynamic.safetensors", "dynamic.json"
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class NounRegions:
    """The nouns of a photo's prompt and where they belong, as far as the user gives them.

    nouns: words of the prompt, synonyms joined by "="; by default the nouns found in it.
    background: an image, white where no noun belongs; "auto" estimates it, "none" does without.
    regions: noun → an image, white where the noun belongs, or a box (left, top, right, bottom) in pixels; they take the
        place of the background.
    """

    nouns: Sequence[str] = ()
    background: Picture = "auto"
    regions: Mapping[str, Picture | Box] = field(default_factory=dict)


AUTO_REGIONS = NounRegions()


@dataclass(frozen=True)
class AttentionReport:
    """Where the words of a photo's prompt attend, before anything is fitted.

    groups: the k nouns.
    attention: cross-attention maps (t, h, w, l), in the order of sampling.
    background: boolean (h, w), or (k, h, w) with one for each noun, or None if it is unknown.
    notes: one-line remarks for the user.
    """

    groups: tuple[NounGroup, ...]
    attention: Tensor
    background: Tensor | None
    notes: tuple[str, ...] = ()

    @property
    def maps(self) -> Tensor:
        """The mean map of each noun over all steps, (k, h, w)."""
        return group_maps(self.attention.mean(0), self.groups)

    def losses(self) -> list[Leakage]:
        """The three losses at each step."""
        steps = (leakage(one, self.groups, self.background) for one in self.attention)
        return [Leakage(*(float(loss) for loss in losses)) for losses in steps]

    def exceeded(self) -> dict[str, float]:
        """For each loss, the share of the steps at which it is not below its threshold."""
        count, pairs = len(self.attention), []
        for index, one in enumerate(self.losses()):
            pairs.append((vars(one), vars(thresholds(index, count))))
        return {name: sum(one[name] >= limit[name] for one, limit in pairs) / count for name in pairs[0][0]}

    @property
    def needed(self) -> bool:
        """Whether a loss is over its threshold at more than half of the steps."""
        return max(self.exceeded().values()) > 0.5

    def sentences(self) -> list[str]:
        """The report in words: nouns, mean losses, and whether dynamic prompts are needed."""
        mean = {name: sum(vars(one)[name] for one in self.losses()) / len(self.attention) for name in self.exceeded()}
        words = {"balancing": "no noun dominates", "disjoint": "nouns overlap", "background": "nouns on the background"}
        lines = [f"nouns: {', '.join(group.name for group in self.groups)}"]
        for name, share in self.exceeded().items():
            if name == "background" and self.background is None:
                lines.append("nouns on the background: unknown, there is no background mask")
                continue
            lines.append(f"{words[name]}: {mean[name]:.2f} on average, over the threshold at {share:.0%} of the steps")
        verdict = "dynamic prompts (--dpl) are likely to help" if self.needed else "dynamic prompts are not needed"
        return [*lines, *self.notes, verdict]


@torch.no_grad()
def report_attention(
    model: StableDiffusion, frame: PaddedImage, trajectory: Trajectory, prompt: str,
    regions: NounRegions = AUTO_REGIONS, maps: InversionMaps | None = None,
) -> AttentionReport:  # fmt: skip
    """Report where the nouns of `prompt` attend during an inversion.

    `maps` are its attention maps if they were collected; otherwise they are computed, with a UNet prediction a step.

    Raises:
        UserError: a noun is not in the prompt, or a mask or box does not fit the photo.
    """
    groups = tuple(noun_groups(model, prompt, regions.nouns))
    if maps is None or not maps.recorded:
        maps = record_maps(model, trajectory)
    attention = maps.cross_attention().flip(0)
    mean, notes = group_maps(attention.mean(0), groups), ()
    size = (int(mean.shape[1]), int(mean.shape[2]))
    if regions.regions:
        return AttentionReport(groups, attention, _outside_regions(frame, groups, regions.regions, size))
    if isinstance(regions.background, str) and regions.background == "none":
        return AttentionReport(groups, attention, None)
    if isinstance(regions.background, str) and regions.background == "auto":
        background, notes = find_background(maps.self_attention(), mean)
        return AttentionReport(groups, attention, background, notes)
    return AttentionReport(groups, attention, _cells(frame, as_image(regions.background), size))


def record_maps(model: StableDiffusion, trajectory: Trajectory) -> InversionMaps:
    """The attention maps of a stored inversion, computed again with one UNet prediction for each step."""
    latents = trajectory.latents
    maps = InversionMaps(model, (int(latents.shape[-2]), int(latents.shape[-1])))
    up = list(reversed(trajectory.schedule(model).steps))
    for index, transition in enumerate(up):
        step = Step(**vars(replace(transition, noise=None)), index=index, count=len(up))
        with hooked(model.unet, [maps], step=step):
            model.predict(latents[index + 1].to(model.device), transition.timestep, trajectory.conditioning)
    return maps


@torch.no_grad()
def fit_dynamic_prompt(
    model: StableDiffusion, trajectory: Trajectory, prompt: str, report: AttentionReport, settings: DynamicSettings,
    *, size: tuple[int, int] | None = None, guidance_scale: float = 7.5, null_text: NullTextSettings | None = None,
    cache: str | Path | None = None,
) -> tuple[DynamicPrompt, Trajectory]:  # fmt: skip
    """Fit the nouns' embeddings for every step of `trajectory`; returns them and the trajectory to sample with them.

    After direct inversion they are fitted on the inverted latents. With `null_text`, null embeddings are fitted at the
    same steps, and the returned trajectory has them. Otherwise they are fitted while the source is sampled with
    guidance. `cache` is a folder where the result is stored under the hash of all inputs, and read from.
    """
    about = _inputs(trajectory, prompt, report, settings, guidance_scale, null_text)
    place = None if cache is None else Path(cache) / f"dynamic-{_hash(about)[:16]}"
    if place is not None and (place / ABOUT).is_file():
        return _load(place, trajectory, about, report)
    fit, down = DynamicFit(model, prompt, report.groups, report.background, settings, size), trajectory.schedule(model)
    if null_text is not None:
        nulls = NullFit(model, trajectory.latents, fit.latest, trajectory.null[:1], guidance_scale, null_text)
        denoise(model, trajectory.start(), Edit(fit, nulls, guidance_scale), down)
        trajectory = _with_null(trajectory, Conditioning.cat(nulls.rows).to("cpu"))
    elif trajectory.method == "direct":
        fit_on_trajectory(fit, trajectory.latents, down)
    else:
        edit = replace(trajectory.edit(guidance_scale=guidance_scale), conditioning=fit)
        denoise(model, trajectory.start(), edit, down)
    if place is not None:
        _save(place, about, fit.result, trajectory.null)
    return fit.result, trajectory


@torch.no_grad()
def mean_noun_maps(
    model: StableDiffusion,
    trajectory: Trajectory,
    groups: Sequence[NounGroup],
    conditionings: Sequence[Conditioning],
) -> Tensor:
    """Mean attention maps (k, h, w) of the nouns on the inverted latents, with one conditioning for each step.

    Costs one UNet prediction a step. The maps of an `AttentionReport` cannot be compared with these, because inversion
    predicts at the timestep of the next noisier level: to compare a `DynamicPrompt` with the source prompt, call this
    for both.
    """
    maps, down = [], trajectory.schedule(model)
    for index, transition in enumerate(down):
        step = Step(**vars(transition), index=index, count=len(down))
        latents = trajectory.latents[len(down) - index].to(model.device)
        maps.append(group_maps(stage_attention(model, latents, step, conditionings[index]), groups).cpu())
    return torch.stack(maps).mean(0)


def noun_map_sheet(photo: Image.Image, groups: Sequence[NounGroup], stages: Mapping[str, Tensor]) -> Image.Image:
    """A sheet of the nouns' attention maps over the photo: a row for each of `stages`, a column for each noun."""
    rows = [[overlay(photo, normalised(one)) for one in maps] for maps in stages.values()]
    return grid(rows, columns=[group.name for group in groups], labels=list(stages), title="Where each noun looks")


def _outside_regions(
    frame: PaddedImage, groups: Sequence[NounGroup], regions: Mapping[str, Picture | Box], size: tuple[int, int]
) -> Tensor:
    """Where each noun does not belong, boolean (k, h, w); False everywhere for a noun without a region."""
    outside = torch.zeros(len(groups), *size, dtype=torch.bool)
    names = {word.lower(): number for number, group in enumerate(groups) for word in group.words}
    for noun, region in regions.items():
        if noun.lower() not in names:
            raise UserError(f"there is a region for {noun!r}, which is none of the nouns {', '.join(names)}")
        outside[names[noun.lower()]] = ~_cells(frame, _mask_of(frame, region), size)
    return outside


def _mask_of(frame: PaddedImage, region: Picture | Box) -> Image.Image:
    """A region as a mask of the photo's size; UserError for a box outside of the photo."""
    if not isinstance(region, tuple):
        return as_image(region)
    left, top, right, bottom = region
    width, height = frame.picture.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(f"the box {region} does not lie in the picture of {width}×{height} px: left,top,right,bottom")
    mask = Image.new("L", (width, height))
    mask.paste(255, tuple(round(side) for side in region))  # pyright: ignore[reportArgumentType]
    return mask


def _cells(frame: PaddedImage, mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask as boolean cells (h, w) of the attention maps: True where at least half of the cell is white."""
    fine = frame.mask_to_cells(mask)[None, None].float()
    return interpolate(fine, size, mode="area")[0, 0] >= 0.5


def _inputs(
    trajectory: Trajectory, prompt: str, report: AttentionReport, settings: DynamicSettings, scale: float,
    null: NullTextSettings | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that a fitted dynamic prompt depends on, as JSON values."""
    background = None if report.background is None else tensor_hash([report.background])
    return {"trajectory": trajectory.key, "prompt": prompt, "groups": [asdict(group) for group in report.groups],
            "background": background, "settings": asdict(settings), "guidance_scale": scale,
            "null_text": None if null is None else asdict(null)}  # fmt: skip


def _hash(about: Mapping[str, Any]) -> str:
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _save(place: Path, about: Mapping[str, Any], dynamic: DynamicPrompt, null: Conditioning) -> None:
    """Write a dynamic prompt and the null embeddings into the folder `place`, with their inputs."""
    tensors = {f"rows.{number}": torch.stack(rows) for number, rows in enumerate(zip(*dynamic.rows, strict=True))}
    parts = {"embeds": null.embeds, "pooled": null.pooled, "time_ids": null.time_ids}
    tensors |= {f"null.{name}": part.cpu() for name, part in parts.items() if part is not None}
    logs = {"first": dynamic.first_losses, "last": dynamic.last_losses}
    record: dict[str, Any] = {name: [asdict(one) for one in losses] for name, losses in logs.items()}
    record |= {"drift": dynamic.drift, "passes": dynamic.forward_passes, "backward": dynamic.backward_passes}
    content = tensor_bytes(tensors)
    manifest = {"made_of": about, "sha256": sha256(content).hexdigest(), **record}
    write_folder(place, {ROWS: content, ABOUT: json.dumps(manifest, indent=1).encode()})


def _load(
    place: Path, trajectory: Trajectory, about: Mapping[str, Any], report: AttentionReport
) -> tuple[DynamicPrompt, Trajectory]:
    """Read what `_save` wrote; UserError if it is damaged or has other inputs."""
    record, tensors = read_json(place / ABOUT), read_tensors(place / ROWS).tensors
    content = sha256((place / ROWS).read_bytes()).hexdigest()
    if record["made_of"] != json.loads(json.dumps(about)) or record["sha256"] != content:
        raise UserError(f"{place} has other inputs than its name says, or is damaged: remove it, it is computed again")
    stacks = [tensors[f"rows.{number}"] for number in range(sum(name.startswith("rows.") for name in tensors))]
    rows = [tuple(stack[index] for stack in stacks) for index in range(len(stacks[0]))]
    first, last = ([Leakage(**one) for one in record[name]] for name in ("first", "last"))
    dynamic = DynamicPrompt(about["prompt"], report.groups, rows, first, last, record["drift"], record["passes"],
                            record["backward"])  # fmt: skip
    if about["null_text"] is None:
        return dynamic, trajectory
    parts = (tensors.get(f"null.{name}") for name in ("embeds", "pooled", "time_ids"))
    return dynamic, _with_null(trajectory, Conditioning(*parts))  # pyright: ignore[reportArgumentType]


def _with_null(trajectory: Trajectory, null: Conditioning) -> Trajectory:
    """`trajectory` with fitted null embeddings, as null-text inversion returns it."""
    return replace(trajectory, null=null, about={**trajectory.about, "method": "null-text"})
