"""Whether dynamic prompts and uniform attention maps do what they are for, on scenes whose true masks are known.

    python -m tests.bench.attention_maps                              # all, 50 scenes
    python -m tests.bench.attention_maps --only maps --scenes 8       # noun maps before and after dynamic prompts
    python -m tests.bench.attention_maps --only reconstruction --steps 10 20 50

Each finished cell is one JSON line.  figures.json is rewritten every time: each figure with its 95 % interval, its
target, and whether the value (or the interval's lower end) meets it.  U9 to U14 are the claims about uniform maps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from personalize.editing.config import DynamicSettings, UniformSettings
from personalize.editing.defaults import settings_for
from personalize.editing.dynamic_prompt_learning.leakage import (
    NounRegions,
    mean_noun_maps,
    report_attention,
)
from personalize.editing.dynamic_prompt_learning.stored_fit import fit_dynamic_prompt
from personalize.editing.photo_settings import PhotoSettings
from personalize.editing.real_image import EditResult, edit_photo
from personalize.editing.real_image_settings import EditRequest
from personalize.editing.uniform_attention import reconstruct, uniform_edit
from personalize.embedded.scenes import Scene, random_scene, render
from personalize.models.attention import hooked
from personalize.models.image_processor import PaddedImage
from personalize.models.stable_diffusion import EMBEDDED, Conditioning, StableDiffusion
from personalize.sampling.config import NullTextSettings
from personalize.sampling.denoise import Edit, denoise, denoise_with_history
from personalize.sampling.inversion import invert
from personalize.sampling.schedule import Schedule, make_schedule
from tests.bench.attention_figures import AUXILIARIES, PARTS, figures
from tests.bench.cells import Cells
from tests.bench.contract import Task, caption, random_task
from tests.bench.judge.judge import Judge, as_bytes, as_pixels
from tests.bench.map_measures import background_iou, map_measures
from tests.bench.picture_measures import iou, psnr
from tests.bench.world import weights_of, world_of


@dataclass(frozen=True)
class MapsBench:
    model: Path = EMBEDDED
    """A Stable Diffusion folder; its world.json, if there, says which nouns, styles and backgrounds it knows."""
    scenes: int = 50
    """Number of scenes of each part."""
    only: tuple[str, ...] = ()
    """Parts to run: maps, reconstruction, masks, auxiliaries (beside masks), swaps; all when empty."""
    null_text: bool = False
    """Maps: also fit dynamic prompts together with null-text inversion, which takes ten times as long."""
    inversion: Literal["direct", "null-text"] = "direct"
    """Swaps: the inversion before Prompt-to-Prompt; with null-text, null embeddings and nouns are fitted together."""
    local: bool = False
    """Swaps: the photo may change only where the swapped nouns attend (local blend), which takes right noun maps."""
    null_text_rate: float | None = None
    """Learning rate of null-text inversion, where the model has no calibrated one; 0.1 suits the leaky twin."""
    steps: tuple[int, ...] = (50,)
    """Denoising steps; the reconstruction is measured with each number, the other parts with the first."""
    split: str = "bench/attention-maps"
    """Data split of the scenes; settings are calibrated on the split calibration/attention-maps."""
    updates: int | None = None
    """Dynamic prompts: updates at each step.  This and the next four options default to the model's own settings."""
    balancing: float | None = None
    """Weight of the balancing loss."""
    disjoint: float | None = None
    """Weight of the disjoint loss."""
    background: float | None = None
    """Weight of the background loss."""
    cap: float | None = None
    """How far a token's row may move from its start, as a share of the row's norm."""
    words_only: bool = False
    """Leave padding tokens out of the balancing loss."""
    guidance_scale: float | None = None
    """Guidance of edits; by default as calibrated for the model, which for one that is not known is 7.5."""
    output_dir: Path = Path("runs/bench/attention_maps")
    """Where results go; finished cells found there are not measured again."""


class Bench:
    """The bench's model, settings and finished cells."""

    def __init__(self, options: MapsBench, model: StableDiffusion | None = None) -> None:
        self.options, self.model = options, model or StableDiffusion.load(options.model)
        names = ("updates", "balancing", "disjoint", "background", "cap", "words_only")
        given = {name: getattr(options, name) for name in names}
        self.dynamic = settings_for(DynamicSettings, self.model.name, **given)
        self.null_text = settings_for(NullTextSettings, self.model.name, rate=options.null_text_rate)
        self.world, self.judge = world_of(options.model), Judge.load()
        stamp = {"weights": weights_of(self.model), **self.world, "split": options.split, "first": options.steps[0]}
        stamp |= {"dynamic": asdict(self.dynamic), "null_text": asdict(self.null_text)}
        stamp |= {"inversion": options.inversion, "local": options.local}
        self.guidance = PhotoSettings(guidance_scale=options.guidance_scale).guidance(self.model.name)
        stamp |= {"guidance_scale": self.guidance}
        self.cache = options.output_dir / "cache"  # a scene's maps and its swap share a fit
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)

    def scene(self, seed: int, objects: int) -> Scene:
        return random_scene(seed, split=self.options.split, objects=objects, **self.world)

    @torch.no_grad()
    def maps(self, seed: int) -> dict[str, Any]:
        """Noun maps of a scene with two objects: without dynamic prompts, with them, and with them and null-text."""
        scene, model, steps = self.scene(seed, 2), self.model, self.options.steps[0]
        picture, masks = render(scene, model.resolution)
        prompt, frame = caption(scene), PaddedImage.of(model, Image.fromarray(picture))
        size = (model.resolution,) * 2
        inverted = invert(model, frame.pixels, prompt, "direct", steps=steps, cache=self.cache)
        report = report_attention(model, frame, inverted, prompt, nouns_of(scene), self.dynamic)
        plain = mean_noun_maps(model, inverted, report.groups, [inverted.conditioning] * steps)
        row: dict[str, Any] = {"plain": map_measures(plain, masks)}
        row["background"] = background_iou(report.background, masks)
        for name, null in {"direct": None, **({"null-text": self.null_text} if self.options.null_text else {})}.items():
            rows, after = fit_dynamic_prompt(
                model, inverted, prompt, report, self.dynamic, size=size, guidance_scale=self.guidance, null_text=null,
                cache=self.cache,
            )  # fmt: skip
            conditionings = rows.conditionings(model, [prompt], size)
            row[name] = map_measures(mean_noun_maps(model, after, report.groups, conditionings), masks)
            row[name] |= {"units": steps + rows.forward_passes + 2 * rows.backward_passes, "drift": max(rows.drift)}
        return {"part": "maps", "seed": seed, **row}

    @torch.no_grad()
    def reconstruction(self, seed: int, steps: int) -> dict[str, Any]:
        """U9: the same picture inverted and replayed with uniform maps, and with the caption at w = 1 and w = 7.5.

        "null" is the empty prompt with ordinary maps: uniform maps differ from it by the maps alone.  "ceiling" is the
        autoencoder's round trip.
        """
        scene, model = self.scene(seed, 1), self.model
        picture = render(scene, model.resolution)[0]
        clean = model.encode(as_pixels(picture[None]).to(model.device))
        up, down = make_schedule(model, steps, inverse=True), make_schedule(model, steps)
        prompt = model.prompts([caption(scene)], (model.resolution,) * 2)
        plain = Edit(prompt, guidance_scale=1)
        null = Edit(model.null(1, (model.resolution,) * 2), guidance_scale=1)
        noisy = denoise(model, clean, plain, up)
        replayed = {
            "uniform": reconstruct(model, clean, up, down), "caption": denoise(model, noisy, plain, down),
            "null": denoise(model, denoise(model, clean, null, up), null, down),
            "guided": denoise(model, noisy, Edit(prompt), down), "ceiling": clean,
        }  # fmt: skip
        row: dict[str, Any] = {}
        for name, z in replayed.items():
            decoded = as_bytes(model.decode(z).cpu())[0]
            row[name] = {"db": psnr(decoded, picture), "mse": float((z - clean).square().mean())}
        uniform = uniform_edit(model, (model.resolution,) * 2)
        drifts = [prediction_drift(model, clean, edit, up) for edit in (uniform, plain)]
        row["steadier"] = sum(ours < theirs for ours, theirs in zip(*drifts, strict=True)) / steps
        return {"part": "reconstruction", "seed": seed, "steps": steps, **row}

    @torch.no_grad()
    def masks(self, seed: int) -> dict[str, Any]:
        """U10 to U12: one object is replaced by Prompt-to-Prompt and direct inversion, with uniform maps or without."""
        task, before, true, outside = self.swap(seed)
        model, steps = self.model, self.options.steps[0]
        choices = {"plain": None, "uniform": UniformSettings()}
        edits = {name: self.swapped(task, before, choice) for name, choice in choices.items()}
        pictures = {name: np.asarray(edit.image) for name, edit in edits.items()}
        region = edits["uniform"].region
        assert region is not None
        clean = model.encode(as_pixels(before[None]).to(model.device))
        replayed = reconstruct(model, clean, make_schedule(model, steps, inverse=True), make_schedule(model, steps))
        reconstruction = as_bytes(model.decode(replayed).cpu())[0]
        change = {name: float(np.abs(p.astype(float) - before)[true].mean()) for name, p in pictures.items()}
        mask = np.kron(region.numpy(), np.ones((model.factor, model.factor), bool))
        kept = outside & ~mask
        return {
            "part": "masks", "seed": seed, "plain_db": psnr(pictures["plain"], before, outside),
            "uniform_db": psnr(pictures["uniform"], before, outside), "change": change,
            "coverage": float((mask & true).sum() / true.sum()), "iou": iou(mask, true),
            "background_db": psnr(pictures["uniform"], reconstruction, kept) if kept.any() else None,
        }  # fmt: skip

    @torch.no_grad()
    def auxiliaries(self, seed: int) -> dict[str, Any]:
        """U14: the same edit with the auxiliary reconstruction from the stored inversion, and with the photo itself."""
        task, before, true, outside = self.swap(seed)
        row: dict[str, Any] = {"part": "auxiliaries", "seed": seed}
        for name in AUXILIARIES:
            picture = np.asarray(self.swapped(task, before, UniformSettings(auxiliary=name)).image)
            change = float(np.abs(picture.astype(float) - before)[true].mean())
            row[name] = {"db": psnr(picture, before, outside), "change": change}
        return row

    def swap(self, seed: int) -> tuple[Task, np.ndarray, np.ndarray, np.ndarray]:
        """A task with one object to replace, its picture, the object's mask, and what lies outside of old and new."""
        task = random_task("object", seed, split=self.options.split, objects=1, **self.world)
        before, (true,) = render(task.before, self.model.resolution)
        return task, before, true, ~(true | render(task.after, self.model.resolution)[1][0])

    def swapped(self, task: Task, before: np.ndarray, uniform: UniformSettings | None) -> EditResult:
        return edit_photo(
            self.model, Image.fromarray(before), task.source_prompt, EditRequest(task.target_prompt),
            PhotoSettings("direct", self.options.steps[0], guidance_scale=self.guidance, uniform=uniform),
        )  # fmt: skip

    @torch.no_grad()
    def swaps(self, seed: int) -> dict[str, Any]:
        """One of two objects is replaced by Prompt-to-Prompt, with dynamic prompts or without.

        other_db, background_db: PSNR with the photo inside the other object's true mask, and outside of both objects.
        swapped: whether the judge sees the new object and not the old one.
        """
        task = random_task("object", seed, split=self.options.split, objects=2, **self.world)
        before, masks = render(task.before, self.model.resolution)
        changed = masks[task.index] | render(task.after, self.model.resolution)[1][task.index]
        other = masks[1 - task.index]
        outside = ~(changed | other)
        swapped = task.swapped_words if self.options.local else []
        row: dict[str, Any] = {}
        for name, choice in (("plain", None), ("dynamic", self.dynamic)):
            edited = edit_photo(
                self.model, Image.fromarray(before), task.source_prompt,
                EditRequest(task.target_prompt, local=swapped, regions=nouns_of(task.before)),
                PhotoSettings(
                    self.options.inversion, self.options.steps[0], guidance_scale=self.guidance, dynamic=choice,
                    null_text=self.null_text,
                ),
                cache=self.cache,
            )  # fmt: skip
            picture = np.asarray(edited.image)
            (seen,) = self.judge(picture[None])
            old, new = (scene.objects[task.index].noun for scene in (task.before, task.after))
            row[name] = {
                "other_db": psnr(picture, before, other & ~changed), "background_db": psnr(picture, before, outside),
                "swapped": new in seen.nouns and old not in seen.nouns,
            }  # fmt: skip
        return {"part": "swaps", "seed": seed, **row}


def nouns_of(scene: Scene) -> NounRegions:
    """The nouns that dynamic prompts fit: those of the scene's objects."""
    return NounRegions(scene.words)


def prediction_drift(model: StableDiffusion, clean: Tensor, edit: Edit, up: Schedule) -> list[float]:
    """‖ε(z_t, t) − ε(z_{t−Δ}, t)‖ at each step of a DDIM inversion, which assumes that the two are equal."""
    run, drifts = denoise_with_history(model, clean, edit, up), []
    assert isinstance(edit.conditioning, Conditioning)
    for index, move in enumerate(up):
        outputs = []
        for z, alpha in ((run.latents[index], move.alpha), (run.latents[index + 1], move.alpha_next)):
            with hooked(model.unet, edit.hooks):
                outputs.append(model.split(model.predict(z, move.timestep, edit.conditioning), z, alpha)[1])
        drifts.append(float((outputs[0] - outputs[1]).norm()))
    return drifts


def run(options: MapsBench, model: StableDiffusion | None = None) -> dict[str, dict[str, Any]]:
    """Measure the cells that are not finished, write all figures, and return them."""
    bench, rows = Bench(options, model), []
    wanted = options.only or PARTS
    for seed in range(options.scenes):
        if "maps" in wanted:
            key = f"maps/{'null-text/' if options.null_text else ''}{seed}"
            rows.append(bench.cells.once(key, lambda seed=seed: bench.maps(seed)))
        for steps in options.steps if "reconstruction" in wanted else ():
            key = f"reconstruction/{steps}/{seed}"
            rows.append(bench.cells.once(key, lambda seed=seed, steps=steps: bench.reconstruction(seed, steps)))
        for part, measure in (("masks", bench.masks), ("auxiliaries", bench.auxiliaries), ("swaps", bench.swaps)):
            if part in wanted:
                rows.append(bench.cells.once(f"{part}/{seed}", lambda seed=seed, measure=measure: measure(seed)))
    result = figures(rows)
    print(text := json.dumps(result, indent=1, ensure_ascii=False))
    (options.output_dir / "figures.json").write_text(text, encoding="utf-8")
    return result


if __name__ == "__main__":
    run(tyro.cli(MapsBench, config=(tyro.conf.OmitArgPrefixes,)))
