"""What dynamic prompts and uniform maps are for, on scenes whose true masks are known: dpl.md 6.6, U9 to U12.

    python -m tests.bench.attention_maps                              # all, 50 scenes
    python -m tests.bench.attention_maps --only maps --scenes 8       # noun maps before and after dynamic prompts
    python -m tests.bench.attention_maps --only reconstruction --steps 10 20 50

One JSON line per finished cell; figures.json is written anew each time, each figure with its 95 % interval, what is
asked of it, and whether the interval or the value meets it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from personalize.attention import hooked
from personalize.calibrated import settings_for
from personalize.dynamic_prompts import DynamicSettings, disjoint_loss
from personalize.frames import Frame
from personalize.inversion import invert
from personalize.localization import NounRegions, fit_dynamic_prompt, mean_noun_maps, report_attention
from personalize.model import EMBEDDED, Conditioning, StableDiffusion
from personalize.moves import Schedule, make_schedule
from personalize.null_text import NullTextSettings
from personalize.photo import EditRequest, PhotoSettings, edit_photo
from personalize.sampling import Edit, denoise, denoise_with_history
from personalize.scenes import Scene, random_scene, render
from personalize.text_maps import InversionMaps
from personalize.uniform import UniformSettings, reconstruct, uniform_edit
from tests.bench.cells import Cells
from tests.bench.contract import caption, iou, psnr, random_task
from tests.bench.intervals import mean_interval, paired_interval, wilson
from tests.bench.judge import as_bytes, as_pixels
from tests.bench.world import weights_of, world_of

THETAS = [round(0.05 * step, 2) for step in range(1, 20)]
ASKED = {  # figure: (what is asked, of the value or of the interval's lower end)
    "iou gain, direct": (0.0, "low"), "iou gain, null-text": (0.0, "low"),
    "U9 gain over the caption": (0.0, "low"), "U9 win rate": (0.65, "value"), "U9 gain over w = 7.5": (3.0, "value"),
    "U9 steadier steps": (0.60, "value"), "U10 background gain": (0.5, "value"), "U10 change kept": (0.90, "value"),
    "U11 coverage": (0.80, "value"), "U11 iou": (0.40, "value"), "U12 background": (30.0, "value"),
}  # fmt: skip


@dataclass(frozen=True)
class MapsBench:
    model: Path = EMBEDDED
    """A Stable Diffusion folder; its world.json, if there, says which nouns, styles and backgrounds it knows."""
    scenes: int = 50
    """Scenes of each part."""
    only: tuple[str, ...] = ()
    """maps, reconstruction, masks; all when empty."""
    null_text: bool = False
    """Fit noun maps beside null-text too, which takes ten times as long."""
    steps: tuple[int, ...] = (50,)
    """Denoising steps; several for the reconstruction, the first for the rest."""
    split: str = "bench/attention-maps"
    """Scenes; settings are calibrated on those of calibration/attention-maps."""
    updates: int | None = None
    """Dynamic prompts: updates at each step; this and the next four are, if not given, what suits the model."""
    balancing: float | None = None
    """Weight of the balancing loss."""
    disjoint: float | None = None
    """Weight of the disjoint loss."""
    background: float | None = None
    """Weight of the background loss."""
    cap: float | None = None
    """How far a row may go from its word, as a share of the word's length."""
    words_only: bool = False
    """Padding does not compete in the balancing loss."""
    output_dir: Path = Path("runs/bench/attention_maps")
    """Where results go, and where finished ones are found again."""


class Bench:
    """One run: model, scenes and finished cells."""

    def __init__(self, options: MapsBench, model: StableDiffusion | None = None) -> None:
        self.options, self.model = options, model or StableDiffusion.load(options.model)
        names = ("updates", "balancing", "disjoint", "background", "cap", "words_only")
        given = {name: getattr(options, name) for name in names}
        self.dynamic = settings_for(DynamicSettings, self.model.name, **given)
        self.null_text = settings_for(NullTextSettings, self.model.name)
        self.world = world_of(options.model)
        stamp = {
            "weights": weights_of(self.model), **self.world,
            "split": options.split, "first": options.steps[0],
            "dynamic": asdict(self.dynamic), "null_text": asdict(self.null_text),
        }  # fmt: skip
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)

    def scene(self, seed: int, objects: int) -> Scene:
        return random_scene(seed, split=self.options.split, objects=objects, **self.world)

    @torch.no_grad()
    def maps(self, seed: int) -> dict[str, Any]:
        """Noun maps of a scene of two things: as they are, on the direct trajectory mended, and beside null-text."""
        scene, model, steps = self.scene(seed, 2), self.model, self.options.steps[0]
        picture, masks = render(scene, model.resolution)
        prompt, frame = caption(scene), Frame.of(model, Image.fromarray(picture))
        size = (model.resolution,) * 2
        seen = InversionMaps(model, tuple(side // model.factor for side in size))
        made = invert(model, frame.pixels, prompt, "direct", steps=steps, hooks=(seen,))
        things = NounRegions([thing.noun.replace("_", " ") for thing in scene.objects])
        found = report_attention(model, frame, made, prompt, things, seen)
        plain = mean_noun_maps(model, made, found.groups, [made.conditioning] * steps)
        row: dict[str, Any] = {"plain": map_measures(plain, masks), "background": background_iou(found.background, masks)}
        for name, null in (("direct", None), ("null-text", self.null_text if self.options.null_text else None)):
            if name == "null-text" and null is None:
                continue
            rows, after = fit_dynamic_prompt(model, made, prompt, found, self.dynamic, size=size, null_text=null)
            told = rows.conditionings(model, [prompt], size)
            row[name] = map_measures(mean_noun_maps(model, after, found.groups, told), masks)
            row[name] |= {"units": steps + rows.forward_passes + 2 * rows.backward_passes, "drift": max(rows.drift)}
        return {"part": "maps", "seed": seed, **row}

    @torch.no_grad()
    def reconstruction(self, seed: int, steps: int) -> dict[str, Any]:
        """U9: uniform maps against the caption at w = 1 and at w = 7.5, from the same photo in as many steps.

        "null" is the empty prompt with ordinary maps: what is left of a difference from it is due to the maps alone.
        """
        scene, model = self.scene(seed, 1), self.model
        picture = render(scene, model.resolution)[0]
        clean = model.encode(as_pixels(picture[None]).to(model.device))
        up, down = make_schedule(model, steps, inverse=True), make_schedule(model, steps)
        told = model.prompts([caption(scene)], (model.resolution,) * 2)
        plain = Edit(told, guidance_scale=1)
        null = Edit(model.null(1, (model.resolution,) * 2), guidance_scale=1)
        noisy = denoise(model, clean, plain, up)
        found = {
            "uniform": reconstruct(model, clean, up, down), "caption": denoise(model, noisy, plain, down),
            "null": denoise(model, denoise(model, clean, null, up), null, down),
            "guided": denoise(model, noisy, Edit(told), down), "ceiling": clean,
        }  # fmt: skip
        row: dict[str, Any] = {}
        for name, z in found.items():
            shown = as_bytes(model.decode(z).cpu())[0]
            row[name] = {"db": psnr(shown, picture), "mse": float((z - clean).square().mean())}
        errors = [prediction_drift(model, clean, edit, up) for edit in (uniform_edit(model, (model.resolution,) * 2), plain)]
        row["steadier"] = sum(ours < theirs for ours, theirs in zip(*errors, strict=True)) / steps
        return {"part": "reconstruction", "seed": seed, "steps": steps, **row}

    @torch.no_grad()
    def masks(self, seed: int) -> dict[str, Any]:
        """U10 to U12: one object becomes another, by Prompt-to-Prompt after direct inversion, with and without."""
        task = random_task("object", seed, split=self.options.split, objects=1, **self.world)
        model, steps = self.model, self.options.steps[0]
        before, (true,) = render(task.before, model.resolution)
        outside = ~(true | render(task.after, model.resolution)[1][0])
        uniform = UniformSettings()
        pictures, region = {}, None
        for name, choice in (("plain", None), ("uniform", uniform)):
            made = edit_photo(
                model, Image.fromarray(before), task.source_prompt, EditRequest(task.target_prompt),
                PhotoSettings("direct", steps, uniform=choice),
            )  # fmt: skip
            pictures[name], region = np.asarray(made.image), made.region
        assert region is not None
        clean = model.encode(as_pixels(before[None]).to(model.device))
        again = reconstruct(model, clean, make_schedule(model, steps, inverse=True), make_schedule(model, steps))
        back = as_bytes(model.decode(again).cpu())[0]
        change = {name: float(np.abs(p.astype(float) - before)[true].mean()) for name, p in pictures.items()}
        found = np.kron(region.numpy(), np.ones((model.factor, model.factor), bool))
        kept = outside & ~found
        return {
            "part": "masks", "seed": seed, "plain_db": psnr(pictures["plain"], before, outside),
            "uniform_db": psnr(pictures["uniform"], before, outside), "change": change,
            "coverage": float((found & true).sum() / true.sum()), "iou": iou(found, true),
            "background_db": psnr(pictures["uniform"], back, kept) if kept.any() else None,
        }  # fmt: skip


def map_measures(maps: Tensor, masks: Sequence[np.ndarray]) -> dict[str, Any]:
    """IoU of noun maps (k, h, w) with their true masks at θ = 0.3 and at the best θ; overlap; mass off the things."""
    size = masks[0].shape
    large = interpolate(maps[None].float(), size, mode="bilinear", align_corners=False)[0].numpy()
    curve = [float(np.mean([iou(m / m.max() > theta, mask) for m, mask in zip(large, masks, strict=True)]))
             for theta in THETAS]  # fmt: skip
    off = [float(m[~mask].sum() / m.sum()) for m, mask in zip(large, masks, strict=True)]
    return {"iou": curve[THETAS.index(0.3)], "best": max(curve), "overlap": float(disjoint_loss(maps)),
            "off": float(np.mean(off))}  # fmt: skip


def background_iou(background: Tensor | None, masks: Sequence[np.ndarray]) -> float:
    """IoU of the guessed background (h, w) with the cells of which the things cover less than half; 0 without one."""
    if background is None:
        return 0.0
    things = torch.from_numpy(np.any(masks, axis=0))[None, None].float()
    share = interpolate(things, background.shape[-2:], mode="area")[0, 0]
    return iou(background.numpy(), (share < 0.5).numpy())


def prediction_drift(model: StableDiffusion, clean: Tensor, edit: Edit, up: Schedule) -> list[float]:
    """‖ε(z_t, t) − ε(z_{t−Δ}, t)‖ at every step of an inversion, which takes them for equal."""
    run, found = denoise_with_history(model, clean, edit, up), []
    assert isinstance(edit.conditioning, Conditioning)
    for index, move in enumerate(up):
        outputs = []
        for z, alpha in ((run.latents[index], move.alpha), (run.latents[index + 1], move.alpha_next)):
            with hooked(model.unet, edit.hooks):
                outputs.append(model.split(model.predict(z, move.timestep, edit.conditioning), z, alpha)[1])
        found.append(float((outputs[0] - outputs[1]).norm()))
    return found


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every figure of the rows there are: value, 95 % interval, n, what is asked, met or not."""
    found: dict[str, tuple[float, float, float, int]] = {}
    maps = [row for row in rows if row["part"] == "maps"]
    if right := [row["background"] for row in maps]:
        found["guessed background"] = (float(np.mean(right)), *mean_interval(right), len(right))
    for name in ("direct", "null-text"):
        if pairs := [(row[name]["iou"], row["plain"]["iou"]) for row in maps if name in row]:
            found[f"iou gain, {name}"] = (*paired_interval(*zip(*pairs, strict=True)), len(pairs))
            units = [float(row[name]["units"]) for row in maps if name in row]
            found[f"units, {name}"] = (float(np.mean(units)), *mean_interval(units), len(units))
            for key in ("best", "overlap", "off"):
                both = [(row[name][key], row["plain"][key]) for row in maps if name in row]
                found[f"{key} gain, {name}"] = (*paired_interval(*zip(*both, strict=True)), len(both))
    built = [row for row in rows if row["part"] == "reconstruction"]
    for steps in sorted({row["steps"] for row in built}):
        ours = [row for row in built if row["steps"] == steps]
        pairs = [(row["uniform"]["db"], row["caption"]["db"], row["guided"]["db"]) for row in ours]
        uniform, told, guided = zip(*pairs, strict=True)
        wins, n = sum(a > b for a, b in zip(uniform, told, strict=True)), len(pairs)
        found[f"U9 gain over the caption, {steps} steps"] = (*paired_interval(uniform, told), n)
        null = [row["null"]["db"] for row in ours]
        found[f"gain over the empty prompt, {steps} steps"] = (*paired_interval(uniform, null), n)
        found[f"U9 gain over w = 7.5, {steps} steps"] = (*paired_interval(uniform, guided), n)
        found[f"U9 win rate, {steps} steps"] = (wins / n, *wilson(wins, n), n)
        steady = [row["steadier"] for row in ours]
        found[f"U9 steadier steps, {steps} steps"] = (float(np.mean(steady)), *mean_interval(steady), n)
    edits = [row for row in rows if row["part"] == "masks"]
    if edits:
        n = len(edits)
        gain = paired_interval([row["uniform_db"] for row in edits], [row["plain_db"] for row in edits])
        kept = [row["change"]["uniform"] / row["change"]["plain"] for row in edits]
        found |= {"U10 background gain": (*gain, n), "U10 change kept": (float(np.mean(kept)), *mean_interval(kept), n)}
        for name, key in (("U11 coverage", "coverage"), ("U11 iou", "iou"), ("U12 background", "background_db")):
            values = [row[key] for row in edits if row[key] is not None]
            if values:
                found[name] = (float(np.mean(values)), *mean_interval(values), len(values))
    return {name: compare_with_target(name, *figure) for name, figure in found.items()}


def compare_with_target(name: str, value: float, low: float, high: float, n: int) -> dict[str, Any]:
    asked, of = ASKED.get(name) or ASKED.get(name.partition(", ")[0]) or (None, "value")
    tested = low if of == "low" else value
    finite = [None if not math.isfinite(end) else round(end, 4) for end in (low, high)]
    met = None if asked is None else bool(tested > asked if of == "low" else tested >= asked)
    return {"value": round(value, 4), "low": finite[0], "high": finite[1], "n": n, "asked": asked, "met": met}


def run(options: MapsBench, model: StableDiffusion | None = None) -> dict[str, dict[str, Any]]:
    """Measure what is missing and write everything that is known."""
    bench, rows = Bench(options, model), []
    wanted = options.only or ("maps", "reconstruction", "masks")
    for seed in range(options.scenes):
        if "maps" in wanted:
            key = f"maps/{'null-text/' if options.null_text else ''}{seed}"
            rows.append(bench.cells.once(key, lambda seed=seed: bench.maps(seed)))
        for steps in options.steps if "reconstruction" in wanted else ():
            key = f"reconstruction/{steps}/{seed}"
            rows.append(bench.cells.once(key, lambda seed=seed, steps=steps: bench.reconstruction(seed, steps)))
        if "masks" in wanted:
            rows.append(bench.cells.once(f"masks/{seed}", lambda seed=seed: bench.masks(seed)))
    found = figures(rows)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (options.output_dir / "figures.json").write_text(text, encoding="utf-8")
    print(text)
    return found


if __name__ == "__main__":
    run(tyro.cli(MapsBench, config=(tyro.conf.OmitArgPrefixes,)))
