"""Which thing each noun of a photo's prompt looks at: surveyed while it is inverted, and mended by dynamic prompts.

survey → is it needed? → fit (on the trajectory, or beside null-text) → what each step of the edit is told
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

from personalize.attention import hooked
from personalize.background_mask import find_background
from personalize.concept_maps import overlay
from personalize.dynamic_prompts import (
    DynamicFit,
    DynamicPrompt,
    DynamicSettings,
    Leakage,
    fit_on_trajectory,
    leakage,
    thresholds,
)
from personalize.errors import UserError
from personalize.files import read_json, read_tensors, tensor_bytes, write_folder
from personalize.frames import Frame, Picture, opened
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import Step
from personalize.noun_groups import NounGroup, group_maps, noun_groups
from personalize.null_text import NullFit, NullTextSettings
from personalize.pictures import grid
from personalize.sampling import Edit, denoise
from personalize.text_maps import InversionMaps, stage_attention
from personalize.trajectories import Trajectory, tensor_hash

ROWS, ABOUT = "dynamic.safetensors", "dynamic.json"
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class NounRegions:
    """What the user says of the photo's things, in place of what would be found.

    nouns: words of the prompt, synonyms joined by "=".  background: a picture, white where no noun belongs; or "auto",
    or "none".  regions: noun → a picture, white where it belongs, or a box (left, top, right, bottom) in pixels.
    """

    nouns: Sequence[str] = ()
    background: Picture = "auto"
    regions: Mapping[str, Picture | Box] = field(default_factory=dict)


AUTO_REGIONS = NounRegions()


@dataclass(frozen=True)
class AttentionReport:
    """Where the words look before anything is done.

    attention: (t, h, w, l) in the order of sampling.  background: (h, w), for each group its own (k, h, w), or None.
    """

    groups: tuple[NounGroup, ...]
    attention: Tensor
    background: Tensor | None
    notes: tuple[str, ...] = ()

    @property
    def maps(self) -> Tensor:
        """(k, h, w): the mean map of each thing."""
        return group_maps(self.attention.mean(0), self.groups)

    def losses(self) -> list[Leakage]:
        """What the three losses are at each step."""
        found = (leakage(one, self.groups, self.background) for one in self.attention)
        return [Leakage(*(float(loss) for loss in losses)) for losses in found]

    def broken(self) -> dict[str, float]:
        """For each loss the share of the steps at which it is over its threshold."""
        count, pairs = len(self.attention), []
        for index, one in enumerate(self.losses()):
            pairs.append((vars(one), vars(thresholds(index, count))))
        return {name: sum(one[name] >= limit[name] for one, limit in pairs) / count for name in pairs[0][0]}

    @property
    def needed(self) -> bool:
        """Is a loss over its threshold at more than half of the steps?"""
        return max(self.broken().values()) > 0.5

    def sentences(self) -> list[str]:
        """The report: what was found, and whether dynamic prompts are needed."""
        mean = {name: sum(vars(one)[name] for one in self.losses()) / len(self.attention) for name in self.broken()}
        words = {"balancing": "no word wins", "disjoint": "nouns overlap", "background": "nouns on the background"}
        lines = [f"nouns: {', '.join(group.name for group in self.groups)}"]
        for name, share in self.broken().items():
            if name == "background" and self.background is None:
                lines.append("nouns on the background: unknown, there is no background mask")
                continue
            lines.append(f"{words[name]}: {mean[name]:.2f} on the mean, over the threshold at {share:.0%} of the steps")
        verdict = "dynamic prompts (--dpl) are likely to help" if self.needed else "dynamic prompts are not needed"
        return [*lines, *self.notes, verdict]


@torch.no_grad()
def report_attention(
    model: StableDiffusion, frame: Frame, trajectory: Trajectory, prompt: str, things: NounRegions = AUTO_REGIONS,
    maps: InversionMaps | None = None,
) -> AttentionReport:  # fmt: skip
    """Where the nouns of `prompt` look on `trajectory`; `maps` if they were collected while it was made.

    Raises:
        UserError: nouns that are not in the prompt, or masks and boxes that do not fit the picture.
    """
    groups = tuple(noun_groups(model, prompt, things.nouns))
    if maps is None or not maps.seen:
        maps = record_maps(model, trajectory)
    attention = maps.text().flip(0)
    mean, notes = group_maps(attention.mean(0), groups), ()
    size = (int(mean.shape[1]), int(mean.shape[2]))
    if things.regions:
        return AttentionReport(groups, attention, _outside(frame, groups, things.regions, size))
    if isinstance(things.background, str) and things.background == "none":
        return AttentionReport(groups, attention, None)
    if isinstance(things.background, str) and things.background == "auto":
        background, notes = find_background(maps.self_attention(), mean)
        return AttentionReport(groups, attention, background, notes)
    return AttentionReport(groups, attention, _cells(frame, opened(things.background), size))


def record_maps(model: StableDiffusion, trajectory: Trajectory) -> InversionMaps:
    """The maps of a trajectory that was made before: a prediction for each of its moves."""
    latents = trajectory.latents
    maps = InversionMaps(model, (int(latents.shape[-2]), int(latents.shape[-1])))
    up = list(reversed(trajectory.schedule(model).steps))
    for index, move in enumerate(up):
        step = Step(**vars(replace(move, noise=None)), index=index, count=len(up))
        with hooked(model.unet, [maps], step=step):
            model.predict(latents[index + 1].to(model.device), move.timestep, trajectory.conditioning)
    return maps


@torch.no_grad()
def fit_dynamic_prompt(
    model: StableDiffusion, trajectory: Trajectory, prompt: str, found: AttentionReport, settings: DynamicSettings,
    *, size: tuple[int, int] | None = None, guidance_scale: float = 7.5, null_text: NullTextSettings | None = None,
    cache: str | Path | None = None,
) -> tuple[DynamicPrompt, Trajectory]:  # fmt: skip
    """Dynamic nouns for every step of `trajectory`, and the trajectory to sample with them.

    On a "direct" trajectory they are fitted where it is.  With `null_text` null embeddings are fitted at the same
    steps, and are those of the trajectory returned.  Otherwise they are fitted along the guided replay.  `cache` keeps
    what was found, by the hash of all it was made of.
    """
    about = _about(trajectory, prompt, found, settings, guidance_scale, null_text)
    place = None if cache is None else Path(cache) / f"dynamic-{_key(about)[:16]}"
    if place is not None and (place / ABOUT).is_file():
        return _loaded(place, trajectory, about, found)
    fit, down = DynamicFit(model, prompt, found.groups, found.background, settings, size), trajectory.schedule(model)
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
        _save(place, about, fit.found, trajectory.null)
    return fit.found, trajectory


@torch.no_grad()
def mean_noun_maps(
    model: StableDiffusion, trajectory: Trajectory, groups: Sequence[NounGroup], told: Sequence[Conditioning]
) -> Tensor:
    """Mean maps (k, h, w) of the things on the trajectory, under what each step is told: one prediction a step.

    Those of `AttentionReport` are of the inversion, which shows the network each latent at the next level: compare like with
    like, the source's own conditioning with that of `DynamicPrompt.conditionings`.
    """
    maps, down = [], trajectory.schedule(model)
    for index, move in enumerate(down):
        step = Step(**vars(move), index=index, count=len(down))
        latents = trajectory.latents[len(down) - index].to(model.device)
        maps.append(group_maps(stage_attention(model, latents, step, told[index]), groups).cpu())
    return torch.stack(maps).mean(0)


def noun_map_sheet(photo: Image.Image, groups: Sequence[NounGroup], stages: Mapping[str, Tensor]) -> Image.Image:
    """One row for each stage ("before", "after"), one column for each thing: where its words look."""
    rows = [[overlay(photo, one) for one in maps] for maps in stages.values()]
    return grid(rows, columns=[group.name for group in groups], labels=list(stages), title="Where each noun looks")


def _outside(
    frame: Frame, groups: Sequence[NounGroup], regions: Mapping[str, Picture | Box], size: tuple[int, int]
) -> Tensor:
    """(k, h, w): for each thing where it does not belong; nowhere, for those without a region."""
    outside = torch.zeros(len(groups), *size, dtype=torch.bool)
    names = {word.lower(): number for number, group in enumerate(groups) for word in group.words}
    for noun, region in regions.items():
        if noun.lower() not in names:
            raise UserError(f"there is a region for {noun!r}, which is none of the nouns {', '.join(names)}")
        outside[names[noun.lower()]] = ~_cells(frame, _drawn(frame, region), size)
    return outside


def _drawn(frame: Frame, region: Picture | Box) -> Image.Image:
    if not isinstance(region, tuple):
        return opened(region)
    left, top, right, bottom = region
    width, height = frame.picture.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(f"the box {region} does not lie in the picture of {width}×{height} px: left,top,right,bottom")
    mask = Image.new("L", (width, height))
    mask.paste(255, tuple(round(side) for side in region))  # pyright: ignore[reportArgumentType]
    return mask


def _cells(frame: Frame, mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask picture as cells (h, w) of the maps: those at least half white."""
    fine = frame.mask_to_cells(mask)[None, None].float()
    return interpolate(fine, size, mode="area")[0, 0] >= 0.5


def _about(
    trajectory: Trajectory, prompt: str, found: AttentionReport, settings: DynamicSettings, scale: float, null: NullTextSettings | None
) -> dict[str, Any]:
    background = None if found.background is None else tensor_hash([found.background])
    return {"trajectory": trajectory.key, "prompt": prompt, "groups": [asdict(group) for group in found.groups],
            "background": background, "settings": asdict(settings), "guidance_scale": scale,
            "null_text": None if null is None else asdict(null)}  # fmt: skip


def _key(about: Mapping[str, Any]) -> str:
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _save(place: Path, about: Mapping[str, Any], found: DynamicPrompt, null: Conditioning) -> None:
    tensors = {f"rows.{number}": torch.stack(rows) for number, rows in enumerate(zip(*found.rows, strict=True))}
    parts = {"embeds": null.embeds, "pooled": null.pooled, "time_ids": null.time_ids}
    tensors |= {f"null.{name}": part.cpu() for name, part in parts.items() if part is not None}
    logs = {"first": found.first, "last": found.last}
    told = {name: [asdict(one) for one in losses] for name, losses in logs.items()}
    told |= {"drift": found.drift, "passes": found.passes, "backward": found.backward}
    content = tensor_bytes(tensors)
    manifest = {"made_of": about, "sha256": sha256(content).hexdigest(), **told}
    write_folder(place, {ROWS: content, ABOUT: json.dumps(manifest, indent=1).encode()})


def _loaded(
    place: Path, trajectory: Trajectory, about: Mapping[str, Any], found: AttentionReport
) -> tuple[DynamicPrompt, Trajectory]:
    told, tensors = read_json(place / ABOUT), read_tensors(place / ROWS).tensors
    content = sha256((place / ROWS).read_bytes()).hexdigest()
    if told["made_of"] != json.loads(json.dumps(about)) or told["sha256"] != content:
        raise UserError(f"{place} was made of something else or is damaged: remove it, it is made again")
    stacks = [tensors[f"rows.{number}"] for number in range(sum(name.startswith("rows.") for name in tensors))]
    rows = [tuple(stack[index] for stack in stacks) for index in range(len(stacks[0]))]
    first, last = ([Leakage(**one) for one in told[name]] for name in ("first", "last"))
    prompt = DynamicPrompt(about["prompt"], found.groups, rows, first, last, told["drift"], told["passes"],
                           told["backward"])  # fmt: skip
    if about["null_text"] is None:
        return prompt, trajectory
    parts = (tensors.get(f"null.{name}") for name in ("embeds", "pooled", "time_ids"))
    return prompt, _with_null(trajectory, Conditioning(*parts))  # pyright: ignore[reportArgumentType]


def _with_null(trajectory: Trajectory, null: Conditioning) -> Trajectory:
    return replace(trajectory, null=null, about={**trajectory.about, "method": "null-text"})
