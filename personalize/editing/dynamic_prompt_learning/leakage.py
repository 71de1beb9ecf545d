"""Report where the nouns of a photo's prompt attend, and whether dynamic prompts are needed.

`report_attention` records attention maps at every level of an inversion and computes the losses of dynamic prompt
learning on them. A loss that exceeds its threshold at more than half of the steps says that dynamic prompts may help;
`fit_dynamic_prompt` (`stored_fit`) fits them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.editing.config import DynamicSettings
from personalize.editing.defaults import settings_for
from personalize.editing.dynamic_prompt_learning.background import find_background
from personalize.editing.dynamic_prompt_learning.fit import Leakage, leakage, thresholds
from personalize.editing.dynamic_prompt_learning.noun_groups import NounGroup, group_maps, noun_groups
from personalize.editing.dynamic_prompt_learning.stage_maps import stage_attention
from personalize.editing.region import Box, mask_picture
from personalize.errors import UserError
from personalize.io.figures import grid, overlay
from personalize.io.images import to_image
from personalize.io.progress import ticked
from personalize.models.attention import hooked
from personalize.models.attention_maps import InversionMaps
from personalize.models.image_processor import PaddedImage, Picture, as_mask_image
from personalize.models.map_filters import normalised
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.models.transfer import sent
from personalize.models.words import composed
from personalize.sampling.schedule import Schedule
from personalize.sampling.trajectory import Trajectory


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
LOSSES = {"balancing": "no noun dominates", "disjoint": "nouns overlap", "background": "nouns on the background"}
"""What each loss of `Leakage` measures, in the words of a report."""


@dataclass(frozen=True)
class AttentionReport:
    """Where the words of a photo's prompt attend, before anything is fitted.

    groups: the k nouns.
    attention: cross-attention maps (t, h, w, l), in the order of sampling.
    background: boolean (h, w), or (k, h, w) with one for each noun, or None if it is unknown.
    notes: one-line remarks for the user.
    balancing_limit: threshold of the balancing loss, as in `DynamicSettings`.
    """

    groups: tuple[NounGroup, ...]
    attention: Tensor
    background: Tensor | None
    notes: tuple[str, ...] = ()
    balancing_limit: float | None = None

    @property
    def maps(self) -> Tensor:
        """The mean map of each noun over all steps, (k, h, w)."""
        return group_maps(self.attention.mean(0), self.groups)

    @cached_property
    def losses(self) -> list[Leakage]:
        """The three losses at each step."""
        steps = (leakage(one, self.groups, self.background) for one in self.attention)
        return [Leakage(*(float(loss) for loss in losses)) for losses in steps]

    def exceeded(self) -> dict[str, float]:
        """For each loss, the share of the steps at which it is not below its threshold."""
        counts = dict.fromkeys(LOSSES, 0)
        for index, losses in enumerate(self.losses):
            limits = thresholds(index, len(self.losses), self.balancing_limit)
            for name in LOSSES:
                counts[name] += getattr(losses, name) >= getattr(limits, name)
        return {name: count / len(self.losses) for name, count in counts.items()}

    @property
    def needed(self) -> bool:
        """Whether a loss is over its threshold at more than half of the steps."""
        return max(self.exceeded().values()) > 0.5

    def sentences(self) -> list[str]:
        """The report in words: nouns, mean losses, and whether dynamic prompts are needed."""
        lines = [f"nouns: {', '.join(group.name for group in self.groups)}"]
        for name, share in self.exceeded().items():
            if name == "background" and self.background is None:
                lines.append("nouns on the background: unknown, there is no background mask")
                continue
            mean = sum(getattr(losses, name) for losses in self.losses) / len(self.losses)
            lines.append(f"{LOSSES[name]}: {mean:.2f} on average, over the threshold at {share:.0%} of the steps")
        verdict = "dynamic prompts (--dpl) are likely to help" if self.needed else "dynamic prompts are not needed"
        return [*lines, *self.notes, verdict]


@torch.no_grad()
def report_attention(
    model: StableDiffusion, frame: PaddedImage, trajectory: Trajectory, prompt: str,
    regions: NounRegions = AUTO_REGIONS, settings: DynamicSettings | None = None,
) -> AttentionReport:  # fmt: skip
    """Report where the nouns of `prompt` attend on the inverted latents; costs one UNet prediction a step.

    `settings` give the threshold of the balancing loss; by default those for the base model.

    The maps are those of `record_maps`, so that a trajectory from a cache gives the same report as a new one.

    Raises:
        UserError: a noun is not in the prompt, or a mask or box does not fit the photo.
    """
    groups = tuple(noun_groups(model, prompt, regions.nouns))
    maps = record_maps(model, trajectory)
    attention = maps.cross_attention().flip(0)
    background, notes = _background(frame, groups, group_maps(attention.mean(0), groups), regions, maps)
    limit = settings_for(DynamicSettings, model.name).balancing_limit if settings is None else settings.balancing_limit
    return AttentionReport(groups, attention, background, notes, limit)


def check_regions(model: StableDiffusion, frame: PaddedImage, prompt: str, regions: NounRegions) -> None:
    """UserError, before anything is computed, for nouns, masks and boxes that `report_attention` would refuse."""
    groups, size = noun_groups(model, prompt, regions.nouns), (1, 1)
    if regions.regions:
        _outside_regions(frame, groups, regions.regions, size)
    elif not (isinstance(regions.background, str) and regions.background in ("auto", "none")):
        _cells(frame, as_mask_image(regions.background), size)


def _background(
    frame: PaddedImage, groups: Sequence[NounGroup], mean: Tensor, regions: NounRegions, maps: InversionMaps
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Where no noun belongs, as `AttentionReport.background`, and notes; `mean` (k, h, w) are the nouns' mean maps."""
    size = (int(mean.shape[1]), int(mean.shape[2]))
    if regions.regions:
        return _outside_regions(frame, groups, regions.regions, size), ()
    if isinstance(regions.background, str) and regions.background == "none":
        return None, ()
    if isinstance(regions.background, str) and regions.background == "auto":
        return find_background(maps.self_attention(), mean)
    return _cells(frame, as_mask_image(regions.background), size), ()


def record_maps(model: StableDiffusion, trajectory: Trajectory) -> InversionMaps:
    """The attention maps at every level of an inversion: one UNet prediction for each step, at its own latents.

    These are the latents and timesteps at which the embeddings of nouns are fitted. The inversion itself predicts at
    the next cleaner latents, so that its maps would be others.
    """
    latents = trajectory.latents
    maps = InversionMaps(model, (int(latents.shape[-2]), int(latents.shape[-1])))
    up = Schedule(tuple(reversed(trajectory.schedule(model).steps)))
    for step in ticked(up.numbered()):
        with hooked(model.unet, [maps], step=step):
            model.predict(sent(latents[step.index + 1], model.device), step.timestep, trajectory.conditioning)
    return maps


@torch.no_grad()
def mean_noun_maps(
    model: StableDiffusion,
    trajectory: Trajectory,
    groups: Sequence[NounGroup],
    conditionings: Sequence[Conditioning],
) -> Tensor:
    """Mean attention maps (k, h, w) of the nouns on the inverted latents, with one conditioning for each step.

    Costs one UNet prediction a step. With the source prompt's conditioning these are the maps of `AttentionReport`.
    """
    maps, down = [], trajectory.schedule(model)
    for step in ticked(down.numbered()):
        latents = sent(trajectory.latents[step.count - step.index], model.device)
        maps.append(group_maps(stage_attention(model, latents, step, conditionings[step.index]), groups))
    return torch.stack(maps).mean(0).cpu()


def noun_map_sheet(frame: PaddedImage, groups: Sequence[NounGroup], stages: Mapping[str, Tensor]) -> Image.Image:
    """A sheet of the nouns' attention maps over the photo: a row for each of `stages`, a column for each noun.

    The maps (k, h, w) cover the padded photo, and are drawn over that before it is cut.
    """
    photo, (height, width) = to_image(frame.pixels), frame.size
    rows = [[overlay(photo, normalised(one)).crop((0, 0, width, height)) for one in maps] for maps in stages.values()]
    return grid(rows, columns=[group.name for group in groups], labels=list(stages), title="Where each noun looks")


def _outside_regions(
    frame: PaddedImage, groups: Sequence[NounGroup], regions: Mapping[str, Picture | Box], size: tuple[int, int]
) -> Tensor:
    """Where each noun does not belong, boolean (k, h, w); False everywhere for a noun without a region.

    A noun and its synonyms belong in all of their regions.
    """
    outside, seen = torch.zeros(len(groups), *size, dtype=torch.bool), set[int]()
    names = {word.lower(): number for number, group in enumerate(groups) for word in group.words}
    for noun, region in regions.items():
        if composed(noun).lower() not in names:
            raise UserError(f"there is a region for {noun!r}, which is none of the nouns {', '.join(names)}")
        number, elsewhere = names[composed(noun).lower()], ~_cells(frame, mask_picture(frame, region), size)
        outside[number] = outside[number] & elsewhere if number in seen else elsewhere
        seen.add(number)
    return outside


def _cells(frame: PaddedImage, mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask as boolean cells (h, w) of the attention maps: True where at least half of the cell is white."""
    fine = frame.mask_to_cells(mask)[None, None].float()
    return interpolate(fine, size, mode="area")[0, 0] >= 0.5
