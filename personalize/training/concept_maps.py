"""Attention maps of each concept over the picture, as tensors and drawn as a sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from personalize.adapters.subjects import Subject
from personalize.adapters.textual_inversion import locate_subjects
from personalize.io.figures import grid, overlay
from personalize.io.images import to_image
from personalize.models.attention import hooked
from personalize.models.attention_maps import CalibrationMaps, calibration_layers
from personalize.models.map_filters import normalised
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent
from personalize.randomness import generator
from personalize.training.multi_concept import MultiConceptRun

TIMESTEPS = (100, 300, 500, 700)


@dataclass(frozen=True)
class ConceptMaps:
    """Mean attention maps (s, h, w) of the s class phrases and of the learned tokens; see `CalibrationMaps`."""

    nouns: Tensor
    modifiers: Tensor


@torch.no_grad()
def concept_maps(
    model: StableDiffusion,
    pixels: Tensor,
    prompt: str,
    subjects: Sequence[Subject],
    *,
    timesteps: Sequence[int] = TIMESTEPS,
    noises: int = 2,
    seed: int = 0,
) -> ConceptMaps:
    """Mean attention maps of `prompt` over `pixels` (1, 3, H, W), noised `noises` times to each of `timesteps`.

    The tokens must be in `model`, and the adapter too if its maps are wanted.  The same seed gives the same noise.
    """
    latents = model.encode(pixels)
    size = (int(latents.shape[-2]), int(latents.shape[-1]))
    store = CalibrationMaps(calibration_layers(model.unet, size))
    conditioning = model.prompts([prompt], (pixels.shape[-2], pixels.shape[-1]))
    length = conditioning.embeds.shape[1]
    tokens = torch.zeros(1, 2 * len(subjects), length, device=model.device)
    for index, place in enumerate(locate_subjects(model, prompt, subjects)):
        tokens[0, index, list(place.noun)] = 1
        tokens[0, len(subjects) + index, list(place.modifier)] = 1
    maps = []
    for number in range(noises):
        for timestep in timesteps:
            noise = torch.randn(latents.shape, generator=generator(seed, "maps", timestep, number))
            noisy = model.noised(latents, sent(noise, latents.device).to(latents), torch.tensor([timestep]))
            with hooked(model.unet, [store]):
                model.predict(noisy, timestep, conditioning)
            maps.append(store.of_tokens(tokens)[0])
    nouns, modifiers = torch.stack(maps).mean(0).cpu().split(len(subjects))
    return ConceptMaps(nouns, modifiers)


def map_sheet(image: Image.Image, subjects: Sequence[Subject], stages: dict[str, ConceptMaps]) -> Image.Image:
    """A sheet of overlays: one row for each stage ("before", "after"), a column for each token and class phrase."""
    rows = [[overlay(image, normalised(one)) for pair in zip(m.modifiers, m.nouns, strict=True) for one in pair]
            for m in stages.values()]  # fmt: skip
    columns = [text for subject in subjects for text in (subject.token, subject.noun)]
    return grid(rows, columns=columns, labels=list(stages), title="Where each word looks")


class MapSnapshots:
    """Records a run's attention maps before and after training, if `enabled`, and draws them for the model card."""

    def __init__(self, run: MultiConceptRun, *, enabled: bool) -> None:
        self.run, self.enabled = run, enabled
        self.image: Image.Image = to_image(run.fitted.pixels)
        self.subjects, self.maps = run.subjects, dict[str, ConceptMaps]()

    def record(self, name: str) -> None:
        """Record the maps as they are now under `name`; on the main process only."""
        if self.enabled and self.run.accelerator.is_main_process:
            pixels = self.run.fitted.pixels
            self.maps[name] = concept_maps(self.run.model, pixels, self.run.caption, self.subjects)

    def pictures(self) -> dict[str, Image.Image]:
        """The picture as "source", and the sheet of maps as "attention" if any were recorded."""
        sheet = {"attention": map_sheet(self.image, self.subjects, self.maps)} if self.maps else {}
        return {"source": self.image, **sheet}
