"""Single-image edits: searching the strengths (`--auto`) against fixed forgetting rules and the paper's full weights.

    python -m tests.bench.single_image --scenes 20         # on two CPU cores: some hours

Each scene has one object in the style that the embedded model was not trained on.  It is learned by LoRA, by LoRA with
timestep-dependent rank, with an orthogonal start and with both, and by full weights at some of the paper's rates; then
its background, its object and its style are edited.  Every arm samples the same number of pictures, of which the same
scorer keeps one; the scorer shares no data and no weights with the judge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.forgetting import parse_rule_sum
from personalize.cli.launch import presets
from personalize.cli.parser import read_yaml
from personalize.editing.config import EditStrengths, Sampling
from personalize.editing.defaults import text_to_image_guidance
from personalize.editing.editor import Editor
from personalize.editing.search import SWEEP, search
from personalize.editing.vector_projection import edit_conditioning
from personalize.embedded.scenes import HELD_OUT_STYLE, render
from personalize.evaluation.scene_scorer import SceneScorer
from personalize.evaluation.scoring import Request, Scorer
from personalize.formats.adapter_folders import MANIFEST
from personalize.io.images import psnr, to_image, to_pixels
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from personalize.sampling.denoise import Edit, sample
from personalize.sampling.schedule import make_schedule
from personalize.training.config import SingleImageConfig
from personalize.training.single_image import learn
from tests.bench import frontier
from tests.bench.cells import Cells
from tests.bench.contract import BASE, CONTROLS, DO_NOTHING, Arm, Task, do_nothing, evaluate, random_task
from tests.bench.full_weights import FullWeights, full_weights_applied, learn_full
from tests.bench.intervals import paired_interval
from tests.bench.judge.judge import Judge
from tests.bench.report import BenchOptions, contact_sheet, mean, table
from tests.bench.world import weights_of, world_of

KINDS = ("background", "object", "style")
NONE, DECODER, ENCODER, AUTO = "no forgetting", "decoder side", "encoder side", "--auto"
RULES = {
    NONE: ("none",),
    DECODER: ("decoderattn", "nodecoder=0.5", "decoderkv", "nodecoder"),
    ENCODER: ("encoderattn", "noencoder=0.5", "encoderkv", "noencoder"),
}
LORA, RANK, START, BOTH = "LoRA", "timestep rank", "orthogonal start", "timestep rank and orthogonal start"
VARIANTS = (LORA, RANK, START, BOTH)
VARIANT_RULES = (NONE, DECODER)  # the arms of every variant but LoRA, which has all
PAPER_RULES = ("none", "encoderattn", "none", "decoderattn")  # in the proportions of the published results
PAPER_ALPHAS, PAPER_BETAS = (0.7, 0.9), (1.2, 0.8, 1.4, 1.0)
FIGURES = {"success": 100.0, "psnr": 1.0, "colour": 1.0, "structure": 1.0}  # figure: the factor it is reported with


@dataclass(frozen=True)
class SingleImageBench(BenchOptions):
    model: Path = EMBEDDED
    """A Stable Diffusion folder; its world.json, if there, says which nouns, styles and backgrounds it knows."""
    output_dir: Path = Path("runs/single_image")
    """Where cells.jsonl, adapters, table.md, figures.json and the sheet go; finished cells are not run again."""
    scenes: int = 4
    """Number of scenes, the first ones included; each is learned and edited in three ways."""
    first_scene: int = 0
    """Scenes below it are left out: two processes can each take a part in one folder, before a run over all."""
    budget: int = 8
    """Pictures that every arm may sample for one edit."""
    scheduler: str = "dpm++_2m"
    """Sampler of every arm."""
    steps: int = 15
    """Denoising steps."""
    samples: int = 600
    """Training samples for each picture, by LoRA and by full weights; the preset for the embedded model has as many."""
    paper_rates: tuple[float, ...] = (2e-4, 1e-3)
    """Learning rates of the full weights; the paper's is 6e-5, for a model fifty times as large as the embedded one."""
    variants: tuple[str, ...] = VARIANTS[1:]
    """Ways to train that are compared with plain LoRA."""
    nouns: tuple[str, ...] = ()
    """Nouns of the scenes, instead of those of world.json."""
    split: str = "bench/single"
    """The scenes' split; the search was tuned on the first four of tune/single."""
    threads: int = 2
    """Processor cores to use."""


class Bench:
    """The bench's model, its world, judge and scorer, and the finished cells."""

    def __init__(
        self, options: SingleImageBench, model: StableDiffusion | None = None, scorer: Scorer | None = None
    ) -> None:
        self.options, self.model = options, model or StableDiffusion.load(options.model, dtype=torch.float32)
        self.judge, self.scorer = Judge.load(), scorer or SceneScorer.load()
        self.world = world_of(options.model, nouns=options.nouns)
        preset = read_yaml(presets("single_image")["embedded"], SingleImageConfig) if options.model == EMBEDDED else {}
        self.config = SingleImageConfig(**{**preset, "max_train_samples": options.samples})
        settings = {name: getattr(options, name) for name in ("budget", "scheduler", "steps", "samples")}
        stamp = {"weights": weights_of(self.model), "split": options.split, **self.world, **settings}
        self.cells = Cells(options.output_dir / "cells.jsonl", stamp)
        self.sampling = Sampling(options.steps, options.scheduler)
        self.full = lru_cache(maxsize=len(options.paper_rates))(self._full)
        self.editor = lru_cache(maxsize=1)(self._editor)

    def task(self, kind: str, index: int) -> Task:
        """The edit of the given kind of scene `index`; the scene is the same for every kind."""
        world = self.world | {"styles": (HELD_OUT_STYLE,), "new_styles": self.world["styles"]}
        return random_task(kind, index, split=self.options.split, **world)

    def source(self, index: int) -> Image.Image:
        return Image.fromarray(render(self.task(KINDS[0], index).before, self.model.resolution)[0])

    def _editor(self, index: int, variant: str = LORA) -> Editor:
        """An editor with the adapter of scene `index`, which is trained unless an earlier run has saved it."""
        name = f"scene-{index}" if variant == LORA else f"scene-{index}-{variant.replace(' ', '-')}"
        folder = self.options.output_dir / "adapters" / name
        if not (folder / MANIFEST).is_file():
            caption, config = self.task(KINDS[0], index).source_prompt, variant_config(self.config, variant)
            learn(self.model, to_pixels(self.source(index)), caption, config).save(folder)
        return Editor(self.model, Adapter.load(folder))

    def _full(self, index: int, rate: float) -> FullWeights:
        caption = self.task(KINDS[0], index).source_prompt
        return learn_full(self.model, to_pixels(self.source(index)), caption, rate, samples=self.options.samples)

    def request(self, task: Task) -> Request:
        source = Image.fromarray(render(task.before, self.model.resolution)[0])
        return Request(task.target_prompt, task.source_prompt, source)

    def select(self, task: Task, candidates: Sequence[np.ndarray]) -> int:
        """The selector of every arm: the candidate with the scorer's highest score."""
        scores = self.scorer([Image.fromarray(one) for one in candidates], self.request(task))
        return int(np.argmax([one.score for one in scores]))

    def arms(self) -> dict[str, Arm]:
        arms: dict[str, Arm] = {DO_NOTHING: do_nothing, BASE: self._base}
        arms |= {name: self._grid(name) for name in RULES}
        arms |= {f"{one}, {rule}": self._grid(rule, one) for one in self.options.variants for rule in VARIANT_RULES}
        arms[AUTO] = self._auto
        return arms | {paper(rate): self._paper(rate) for rate in self.options.paper_rates}

    def _base(self, task: Task, before: np.ndarray, budget: int) -> list[np.ndarray]:
        return arrays(Editor(self.model).base(task.target_prompt, seeds=range(budget), sampling=self.sampling))

    def _grid(self, name: str, variant: str = LORA) -> Arm:
        def arm(task: Task, before: np.ndarray, budget: int) -> list[np.ndarray]:
            with self.editor(number(task), variant) as editor:
                drawn = [
                    editor.edit(task.target_prompt, setting, seeds=[seed], sampling=self.sampling)[0]
                    for setting, seed in spread(grid_of(name), budget)
                ]
            return arrays(drawn)

        return arm

    def _auto(self, task: Task, before: np.ndarray, budget: int) -> list[np.ndarray]:
        editor, request = self.editor(number(task), LORA), self.request(task)
        found = search(editor, request, self.scorer, budget=budget, sampling=self.sampling)
        return arrays([trial.picture for trial in found])

    def _paper(self, rate: float) -> Arm:
        def arm(task: Task, before: np.ndarray, budget: int) -> list[np.ndarray]:
            learned = self.full(number(task), rate)
            return arrays([self.sample_full(learned, task.target_prompt, *one) for one in spread(paper_grid(), budget)])

        return arm

    def sample_full(self, learned: FullWeights, prompt: str, setting: EditStrengths, seed: int) -> Image.Image:
        """One picture sampled with full weights, from the same edited conditioning as the editor's."""
        model = self.model
        with torch.no_grad():
            conditioning = edit_conditioning(
                model, learned.source, model.prompts([prompt]),
                alpha=setting.alpha, beta=setting.beta, gamma=setting.gamma,
            )  # fmt: skip
        with full_weights_applied(model, learned, parse_rule_sum(setting.forget)):
            edit = Edit(conditioning, guidance_scale=text_to_image_guidance(model.name))
            latents = sample(model, edit, [seed], make_schedule(model, self.sampling.steps, self.sampling.scheduler))
        return to_image(model.decode(latents))

    def reconstruction(self, index: int) -> dict[str, float]:
        """PSNR in dB of the replayed source: by LoRA, by full weights at each rate, and the autoencoder's own."""
        pixels, caption = to_pixels(self.source(index)), self.task(KINDS[0], index).source_prompt
        replay = EditStrengths(alpha=1.0, beta=0.0)
        replays = {"autoencoder": self.model.decode(self.model.encode(pixels)).cpu()}
        for variant in (LORA, *self.options.variants):
            replays[variant] = to_pixels(self.editor(index, variant).reconstruct(sampling=self.sampling)[0])
        for rate in self.options.paper_rates:
            replays[paper(rate)] = to_pixels(self.sample_full(self.full(index, rate), caption, replay, 0))
        return {name: round(psnr(one, pixels), 3) for name, one in replays.items()}


def variant_config(config: SingleImageConfig, variant: str) -> SingleImageConfig:
    """`config` with timestep-dependent rank, from half of the rank on, an orthogonal start, or both."""
    least = config.rank // 2 if variant in (RANK, BOTH) else None
    return replace(config, min_rank=least, orthogonal_start=variant in (START, BOTH))


def paper(rate: float) -> str:
    """The name of the arm of full weights at `rate`."""
    return f"paper, rate {rate:g}"


def number(task: Task) -> int:
    """The number of the scene that `task` edits."""
    return int(task.name.rpartition("/")[2])


def arrays(pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(picture) for picture in pictures]


def grid_of(name: str) -> list[EditStrengths]:
    """The settings of the arm `name` in their order; with encoder forgetting beta is smaller, as in the paper."""
    less = 0.3 if name == ENCODER else 0.0
    return [
        EditStrengths(a, round(b - less, 2), forget=rule)
        for (a, b), rule in zip(SWEEP, cycle(RULES[name]), strict=False)
    ]


def paper_grid() -> list[EditStrengths]:
    """The paper's ranges of strengths and its forgetting strategies, in the proportions of its published results."""
    mixes = zip(cycle(PAPER_ALPHAS), PAPER_BETAS * 2, cycle(PAPER_RULES), strict=False)
    return [EditStrengths(a, b, forget=rule) for a, b, rule in mixes]


def spread(settings: Sequence[EditStrengths], budget: int) -> list[tuple[EditStrengths, int]]:
    """(setting, seed) for `budget` pictures: the settings in turn, each picture with a seed of its own."""
    return [(setting, seed) for seed, setting in enumerate(islice(cycle(settings), budget))]


def versus(rows: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]], kind: str = "") -> str:
    """A Markdown table of paired differences between two arms with 95 % intervals, of one `kind` of edit or of all."""
    lines = [
        "| arm | minus | n | success (points) | PSNR dB | colour ΔE | structure |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(row["arm"], row["task"]): row for row in rows if row["kind"] == kind or not kind}
    for arm, other in pairs:
        both = [(row, found[other, task]) for (name, task), row in found.items() if name == arm]
        cells = []
        for figure, factor in FIGURES.items():
            values = [[factor * float(row[figure]) for row in column] for column in zip(*both, strict=True)]
            difference, low, high = paired_interval(*values)
            cells.append(f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(f"| {arm} | {other} | {len(both)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def variant_pairs(variants: Sequence[str]) -> list[tuple[str, str]]:
    """Each variant's arms with LoRA's of the same forgetting."""
    return [(f"{variant}, {rule}", rule) for variant in variants for rule in VARIANT_RULES]


def run(options: SingleImageBench, model: StableDiffusion | None = None, scorer: Scorer | None = None) -> str:
    """Measure the cells that are not finished, write table.md, figures.json and sheet.png, and return the table."""
    bench = Bench(options, model, scorer)
    arms, rows, tasks, side = bench.arms(), [], [], bench.model.resolution
    for index in (numbers := range(options.first_scene, options.scenes)):
        ours = [bench.task(kind, index) for kind in KINDS]
        rows += evaluate(ours, arms, bench.cells, bench.judge, budget=options.budget, size=side, select=bench.select)
        bench.cells.once(f"reconstruction/{index}", lambda index=index: bench.reconstruction(index))
        tasks += ours
        print(f"scene {index} of {options.scenes}: done", flush=True)
    replays, changes = [bench.cells.rows[f"reconstruction/{i}"] for i in numbers], variant_pairs(options.variants)
    names, measured = [key for key in replays[0] if key != "key"], [arm for arm in arms if arm not in CONTROLS]
    text = table(rows, reference=NONE) + "\n" + versus(rows, [(AUTO, arm) for arm in arms if arm != AUTO])
    if changes:
        text += f"\nBackgrounds alone:\n\n{versus(rows, changes, 'background')}\nAll edits:\n\n{versus(rows, changes)}"
    places = frontier.points(rows, measured)
    text += "\n" + frontier.summary(places)
    text += "\nReconstruction, PSNR dB: " + ", ".join(f"{name} {mean(replays, name, 2)}" for name in names) + "\n"
    folder = options.output_dir
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps({"edits": rows, "replays": replays}, indent=1), encoding="utf-8")
    frontier.plot(places, folder / "frontier.png")
    contact_sheet(tasks, list(arms), bench.cells, size=min(128, side)).save(folder / "sheet.png")
    return text


def main(options: SingleImageBench) -> None:
    torch.set_num_threads(options.threads)
    print(run(options))


if __name__ == "__main__":
    main(tyro.cli(SingleImageBench, config=(tyro.conf.OmitArgPrefixes,)))
