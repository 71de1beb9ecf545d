"""Whether the attention calibration loss keeps two concepts of one picture apart: its default weight against 0.

    python -m tests.bench.multi_concept                          # 4 scenes
    python -m tests.bench.multi_concept --scenes 20 --budget 8 --steps 50

Each scene has two objects in the style that the embedded model was not trained on.  Both arms learn both concepts of
each scene with the same seed, data and updates; weight 0 is Custom Diffusion.  Measured are the overlap of the two
class maps; the IoU of each map, cut at one half, with its object's true mask; how often a prompt for one concept shows
the other object; how often the judge sees what a prompt names; and its probability of the held-out style.  The controls
are the source picture, and the base without adapter with the class nouns in the prompts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.apply import applied
from personalize.adapters.subjects import Subject
from personalize.editing.defaults import text_to_image_guidance
from personalize.embedded.scenes import (
    HELD_OUT_STYLE,
    PLACES,
    Scene,
    captions,
    noun_phrase,
    place_phrase,
    random_scene,
    render,
)
from personalize.io.images import to_pixels
from personalize.models.map_filters import normalised
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.schedule import make_schedule
from personalize.training.concept_maps import concept_maps
from personalize.training.config import CALIBRATION_WEIGHT, MultiConceptConfig
from personalize.training.data.class_images import from_base
from personalize.training.data.concepts import ClassImage, ConceptPicture
from personalize.training.losses import separation
from personalize.training.multi_concept import multi_concept_run
from tests.bench.attention_auc import coverage
from tests.bench.cells import Cells
from tests.bench.contract import BASE, DO_NOTHING, picture_file
from tests.bench.intervals import mean_interval, paired_interval
from tests.bench.judge.judge import Judge, as_bytes
from tests.bench.picture_measures import iou
from tests.bench.world import weights_of, world_of

SPLIT = "bench-multi-concept"
CALIBRATED, PLAIN = "calibrated", "weight 0"
ARMS = (CALIBRATED, PLAIN)
TOKENS = ("<one>", "<two>")
FIGURES = {  # name: (description, whether higher or lower is better)
    "overlap": ("overlap of the class maps", "lower"),
    "iou_noun": ("IoU of class maps with true masks", "higher"),
    "iou_modifier": ("IoU of token maps with true masks", "higher"),
    "wrong_object": ("single prompts that show the other object", "lower"),
    "single_success": ("single prompts that come true", "higher"),
    "both_success": ("prompts for both that come true", "higher"),
    "style": ("the judge's probability of the true style", "higher"),
}


@dataclass(frozen=True)
class MultiConceptBench:
    model: Path = EMBEDDED
    """A Stable Diffusion folder; its world.json, if there, says which nouns and backgrounds it knows."""
    output_dir: Path = Path("runs/multi_concept")
    """Where cells.jsonl, table.md and figures.json go."""
    scenes: int = 4
    """Number of scenes; every arm learns each."""
    budget: int = 4
    """Pictures sampled for each prompt."""
    steps: int = 30
    """Denoising steps."""
    updates: int = 250
    """Updates of each training."""
    token_learning_rate: float = 2e-3
    """Learning rate of the new tokens' rows; at 5e-4 the embedded model hardly learns an object's look."""
    class_images: int = 48
    """Regularisation pictures, sampled by the base for each pair of classes."""
    nouns: tuple[str, ...] = ()
    """Nouns of the scenes, instead of those of world.json."""
    timed_updates: int = 20
    """Updates timed with and without calibration, alternately; 0 to skip."""
    threads: int = 2
    """Processor cores to use."""


class Bench:
    """The bench's model, its world, the judge, and the finished cells."""

    def __init__(self, options: MultiConceptBench, model: StableDiffusion | None = None) -> None:
        self.options, self.model, self.judge = options, model or StableDiffusion.load(options.model), Judge.load()
        self.world = world_of(options.model, nouns=options.nouns, styles=(HELD_OUT_STYLE,))
        names = ("budget", "steps", "updates", "token_learning_rate", "class_images")
        settings = {name: getattr(options, name) for name in names}
        stamp = {"weights": weights_of(self.model), "split": SPLIT, **self.world, **settings}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)

    def scene(self, index: int) -> Scene:
        return random_scene(index, split=SPLIT, objects=2, **self.world)

    def task(self, index: int) -> tuple[ConceptPicture, tuple[np.ndarray, ...], Scene]:
        """The picture to learn with its two concepts, its objects' true masks, and the scene."""
        scene = self.scene(index)
        image, masks = render(scene, self.model.resolution)
        subjects = tuple(Subject(token, word) for token, word in zip(TOKENS, scene.words, strict=True))
        prompt = f"a picture of a {subjects[0].phrase} and a {subjects[1].phrase} {place_phrase(scene.background)}"
        return ConceptPicture(Image.fromarray(image), subjects, prompt), masks, scene

    def examples(self, picture: ConceptPicture) -> list[ClassImage]:
        options = self.options
        cache = options.output_dir / "drawn"
        side = self.model.resolution
        return from_base(
            self.model, picture.class_prompt, options.class_images, size=(side, side), steps=options.steps, cache=cache
        )

    def config(self, arm: str, seed: int) -> MultiConceptConfig:
        weight = CALIBRATION_WEIGHT if arm == CALIBRATED else 0.0
        return MultiConceptConfig(
            initializer_token="class", max_train_steps=self.options.updates, calibration_weight=weight, seed=seed,
            token_learning_rate=self.options.token_learning_rate,
        )  # fmt: skip

    def pictures(self, prompt: str, adapter: Adapter | None, label: str) -> np.ndarray:
        """`budget` pictures of `prompt`, (b, H, W, 3) uint8, from the same seeds for every arm; also saved as files."""
        model, seeds = self.model, range(self.options.budget)
        with torch.no_grad(), applied(model, adapter):
            edit = Edit(model.prompts([prompt]), guidance_scale=text_to_image_guidance(model.name))
            latents = sample(model, edit, list(seeds), make_schedule(model, self.options.steps))
        drawn = as_bytes(model.decode(latents).cpu())
        file = picture_file(self.cells, f"{label}, {re.sub('[<>]', '', prompt)}")
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(list(drawn), 1)).save(file)
        return drawn


def train_and_measure(bench: Bench, index: int, arm: str) -> dict[str, Any]:
    """The row of one cell: train `arm` on scene `index`, and measure its attention maps and pictures."""
    picture, masks, scene = bench.task(index)
    started = time.perf_counter()
    with multi_concept_run(bench.model, picture, bench.config(arm, index), class_images=bench.examples(picture)) as run:
        for _ in run.steps():
            pass
        adapter = run.adapter()
        seconds = time.perf_counter() - started
        maps = concept_maps(bench.model, to_pixels(picture.image), picture.prompt, picture.subjects, noises=4)
    row = {"overlap": float(separation(maps.nouns)), "seconds": round(seconds, 1)}
    for name, kind in (("iou_noun", maps.nouns), ("iou_modifier", maps.modifiers)):
        row[name] = float(np.mean([map_iou(one, mask) for one, mask in zip(kind, masks, strict=True)]))
    phrases = [f"a {subject.phrase}" for subject in picture.subjects]
    return row | judge_prompts(
        bench, index, scene, phrases, lambda prompt: bench.pictures(prompt, adapter, f"{index} {arm}")
    )


def map_iou(attention: torch.Tensor, mask: np.ndarray) -> float:
    """IoU of a map (h, w), scaled to [0, 1] and cut at one half, with the cells of which `mask` covers half."""
    marked = normalised(attention).numpy() > 0.5
    true = coverage(mask, *marked.shape) > 0.5
    return iou(marked, true)


def judge_prompts(
    bench: Bench, index: int, scene: Scene, phrases: Sequence[str], draw: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    """What the judge sees in pictures of each concept alone and of both, on another background; as means.

    phrases: the two concepts' phrases in prompts.  draw: samples pictures of a prompt.
    """
    known = bench.world["backgrounds"]
    places = [place for place in PLACES if place in known and place != scene.background] or [*PLACES]
    place = places[index % len(places)]
    nouns = [thing.noun for thing in scene.objects]
    wrong, single, style = [], [], []
    for own, phrase in enumerate(phrases):
        for verdict in bench.judge(draw(f"a picture of {phrase} {place_phrase(place)}")):
            wrong.append(nouns[1 - own] in verdict.nouns)
            single.append(nouns[own] in verdict.nouns and verdict.background == place)
            style.append(verdict.style_probs[HELD_OUT_STYLE])
    both = [
        set(nouns) <= verdict.nouns and verdict.background == place
        for verdict in bench.judge(draw(f"a picture of {phrases[0]} and {phrases[1]} {place_phrase(place)}"))
    ]
    means = {"wrong_object": wrong, "single_success": single, "both_success": both, "style": style}
    return {name: float(np.mean(values)) for name, values in means.items()}


def make_controls(bench: Bench, index: int) -> None:
    """Measure both controls: the source picture for every prompt, and the base with the class nouns in the prompts."""
    scene = bench.scene(index)
    image = render(scene, bench.model.resolution)[0]
    phrases = [noun_phrase(thing.noun) for thing in scene.objects]
    same = np.stack([image] * bench.options.budget)
    bench.cells.once(f"{DO_NOTHING}/{index}", lambda: judge_prompts(bench, index, scene, phrases, lambda _: same))
    drawn = lambda prompt: bench.pictures(prompt, None, f"{index} base")  # noqa: E731
    bench.cells.once(f"{BASE}/{index}", lambda: judge_prompts(bench, index, scene, phrases, drawn))


def speed(bench: Bench) -> dict[str, Any]:
    """Median seconds of an update with and without calibration, alternating within one run, and their ratio."""
    picture, _, _ = bench.task(0)
    count = bench.options.timed_updates
    config = MultiConceptConfig(initializer_token="class", max_train_steps=2 * count + 2, swap_subjects=0.0)
    spent: dict[float, list[float]] = {CALIBRATION_WEIGHT: [], 0.0: []}
    with multi_concept_run(bench.model, picture, config, class_images=bench.examples(picture)) as run:
        steps = run.steps()
        for number in range(2 * count + 2):
            weight = 0.0 if number % 2 else CALIBRATION_WEIGHT
            run.objective.calibration_weight = weight  # pyright: ignore[reportAttributeAccessIssue]
            started = time.perf_counter()
            next(steps)
            if number > 1:  # the first of each kind warms up
                spent[weight].append(time.perf_counter() - started)
    slow, fast = (float(np.median(values)) for values in spent.values())
    return {"calibrated_s": slow, "plain_s": fast, "ratio": fast / slow, "n": count}


def table(rows: dict[str, dict[str, Any]], count: int) -> str:
    """A Markdown table of every figure of both arms and the controls, with the arms' paired difference."""
    arms = [*ARMS, DO_NOTHING, BASE]
    by_arm = {arm: [rows[f"{arm}/{index}"] for index in range(count)] for arm in arms}
    lines = [f"| n = {count} scenes | better | {' | '.join(arms)} | {CALIBRATED} − {PLAIN} (95 %) |"]
    lines.append("|---" * (len(arms) + 3) + "|")
    for name, (what, better) in FIGURES.items():
        cells = []
        for arm in arms:
            values = [row[name] for row in by_arm[arm] if name in row]
            low, high = mean_interval(values)
            cells.append(f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]" if values else "–")
        calibrated, plain = ([row[name] for row in by_arm[arm]] for arm in ARMS)
        difference, low, high = paired_interval(calibrated, plain)
        lines.append(f"| {what} | {better} | {' | '.join(cells)} | {difference:+.3f} [{low:+.3f}, {high:+.3f}] |")
    return "\n".join(lines) + "\n"


def run(options: MultiConceptBench, model: StableDiffusion | None = None) -> str:
    """Measure the cells that are not finished, write table.md and figures.json, and return the table."""
    bench = Bench(options, model)
    for index in range(options.scenes):
        for arm in ARMS:
            bench.cells.once(f"{arm}/{index}", lambda index=index, arm=arm: train_and_measure(bench, index, arm))
            print(f"scene {index}, {arm}: {bench.cells.rows[f'{arm}/{index}']}", flush=True)
        make_controls(bench, index)
    text = table(bench.cells.rows, options.scenes)
    if options.timed_updates:
        timed = bench.cells.once("speed", lambda: speed(bench))
        text += f"\nAn update with calibration runs at {timed['ratio']:.2f} × the speed without (n = {timed['n']}).\n"
    scenes = {index: captions(bench.scene(index))[0] for index in range(options.scenes)}
    figures = {"scenes": scenes, "cells": bench.cells.rows}
    (options.output_dir / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    return text


def main(options: MultiConceptBench) -> None:
    torch.set_num_threads(options.threads)
    print(run(options))


if __name__ == "__main__":
    main(tyro.cli(MultiConceptBench, config=(tyro.conf.OmitArgPrefixes,)))
