"""`personalize edit`: pictures for a grid of given strengths, or a search for the best strengths, with a sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from personalize.cli.checks import STRENGTHS, check_edit, source_picture
from personalize.cli.commands.marks import PictureWriter, details_of
from personalize.cli.edit_options import COMBINATIONS
from personalize.cli.redrawing import check_same, given_name, recorded
from personalize.cli.terminal import PlainConsole
from personalize.editing.config import DEFAULT_STRENGTHS, EditStrengths, Sampling
from personalize.editing.defaults import text_to_image_guidance
from personalize.editing.editor import Editor
from personalize.editing.search import Trial, ranked, search
from personalize.editing.stored_strengths import remember, remembered
from personalize.errors import UserError, said_if_stopped
from personalize.evaluation.scorers import find_scorer
from personalize.evaluation.scoring import Request
from personalize.formats.adapter_folders import MANIFEST
from personalize.io.atomic import Content
from personalize.io.figures import grid
from personalize.io.image_files import load_image
from personalize.io.json_files import json_bytes
from personalize.io.numbering import add_numbered
from personalize.io.progress import ticked

if TYPE_CHECKING:
    from personalize.adapters.adapter import Adapter
    from personalize.cli.edit_options import EditConfig

FASTER = ("torch_compile", "cuda_graph")  # options of a machine, not of a picture
SEARCH = (  # options that one picture does not need, or has values of its own for
    "auto", "budget", "clip_model", "identity_model", "source_image", "alpha", "beta", "gamma", "seed", "seeds",
    "num_images", *FASTER,
)  # fmt: skip
PREFIX = "edit-"  # of the pictures' names, before their number
COLUMNS = 4  # pictures in a row of the ranked sheet


@said_if_stopped("stopped: pictures are written when all are drawn; the same command begins anew")
def run(config: EditConfig, editor: Editor | None = None) -> Path:
    """Draw the pictures into the output folder, which is returned.  UserError where options contradict one another.

    `editor` takes the place of the one that the options describe, if that is loaded already.
    """
    check_edit(config)
    config, editor = starting_from(config, editor or Editor.configured(config, config.adapters))
    prompt = editor.align_prompt(config.prompt)
    if prompt != config.prompt:
        print(f"Worded like the caption: “{prompt}”")
    if config.from_ is not None:
        check_same(details_of("edit", config, editor, config.adapters), config.from_)
    for line in source_notes(config, editor.adapter):
        print(line)
    size = (config.height or editor.size[0], config.width or editor.size[1])
    faster = {name: getattr(config, name) for name in FASTER}
    sampling = Sampling(config.num_inference_steps, config.scheduler, config.guidance_scale, size, **faster)
    pictures = searched if config.auto else combinations
    written = add_numbered(config.output_dir, PREFIX, pictures(config, editor, prompt, sampling))
    drawn, sheet = [name for name in written.values() if name.startswith(PREFIX)], written["grid.png"]
    count = f"1 picture, {drawn[0]}," if len(drawn) == 1 else f"{len(drawn)} pictures, {drawn[0]} to {drawn[-1]},"
    print(f"{count} and {sheet} in {config.output_dir}")
    return config.output_dir


def starting_from(config: EditConfig, editor: Editor) -> tuple[EditConfig, Editor]:
    """`editor` with the one caption to start from, which is printed, and named by the options, if there are several.

    A sum of adapters without a source embedding starts from none of its captions unless one is named.
    UserError if a search would compare its pictures with that of another caption.
    """
    adapter = editor.adapter
    if adapter is None:
        return config, editor
    from_none = "merged_from" in adapter.info and adapter.source is None
    if config.source_caption is None and (len(adapter.captions) == 1 or from_none):
        return config, editor
    chosen = adapter.starting_from(config.source_caption, prompt=config.prompt)
    if len(adapter.captions) > 1:
        how = "" if config.source_caption else ", the nearest; --source_caption names another"
        print(f"Starts from “{chosen.captions[0]}”, one of {len(adapter.captions)} captions{how}")
    first, own = editor.caption, chosen.captions[0]
    if config.auto and config.source_image is None and own != first and adapter.info.get("pictures") != 1:
        raise UserError(
            f"--auto compares edits with {source_picture(config)}, the picture of “{first}”, and this edit starts from "
            f"“{own}”: give the picture of that caption with --source_image, or --source_caption '{first}'"
        )
    return replace(config, source_caption=own), Editor(editor.model, chosen)


def source_notes(config: EditConfig, adapter: Adapter | None) -> list[str]:
    """Lines on a source embedding that several adapters together leave out, and on options that are of one."""
    if adapter is None or adapter.source is not None:
        return []
    parts = adapter.info.get("merged_from", ()) if config.add else ()
    missed = [given_name(Path(part["name"])) for part in parts if part.get("left_out")]
    given = [f"--{name}" for name in ("alpha", "beta", "gamma") if getattr(config, name) and config.from_ is None]
    left = f"Adapters used together have no source embedding: that of {' and '.join(missed)} is left out"
    idle = f"Without a source embedding {' and '.join(given)} {'change' if len(given) > 1 else 'changes'} nothing"
    return [left] * bool(missed) + [idle] * bool(given)


def combinations(
    config: EditConfig, editor: Editor, prompt: str, sampling: Sampling
) -> Callable[[int], dict[str, Content]]:
    """Draw a picture for every combination of strengths and seeds; returns a function that names and lists the files.

    It takes the number of the first picture, and gives the pictures, a labelled grid and edits.json (`add_numbered`).
    """
    write, settings, seed = PictureWriter(config), list(edit_strengths(config)), config.seed or 0
    recalled = None
    if not any(getattr(config, name) not in ((), None) for name in STRENGTHS):
        recalled = remembered(editor.adapter.info if editor.adapter else {}, prompt, editor.caption)
    if recalled is not None:
        settings, seed = [recalled[0]], recalled[1] if config.seed is None else config.seed
    seeds = list(config.seeds) or [seed + index for index in range(config.num_images)]
    if recalled is not None:
        used = f"{recalled[0]}, seed {', '.join(map(str, seeds))}"
        print(f"Using what --auto chose for this prompt: {used}; give --beta or another to change it")
    common = picture_details(config, editor, prompt, sampling, seeds)  # reads files: before the pictures are drawn
    with editor:
        rows = [
            editor.edit(prompt, setting, seeds=seeds, negative_prompt=config.negative_prompt, sampling=sampling)
            for setting in ticked(settings, COMBINATIONS)
        ]
    drawn = redrawn_seeds(config, seeds)
    rows = [[row[seeds.index(number)] for number in drawn] for row in rows]
    sheet = grid(rows, columns=[f"seed {seed}" for seed in drawn], labels=[str(s) for s in settings], title=prompt)
    contents = [
        (write(picture, common(setting, number)), {"prompt": prompt, "seed": number, **asdict(setting)})
        for setting, row in zip(settings, rows, strict=True)
        for number, picture in zip(drawn, row, strict=True)
    ]
    marked = write(sheet)

    def files(first: int) -> dict[str, Content]:
        names = names_from(first, len(contents))
        entries = [{"file": name, **about} for name, (_, about) in zip(names, contents, strict=True)]
        pictures = {name: content for name, (content, _) in zip(names, contents, strict=True)}
        return {**pictures, "grid.png": marked, "edits.json": json_bytes(entries)}

    return files


def names_from(first: int, count: int) -> list[str]:
    """The names of so many pictures, the first of which has the number `first`."""
    return [f"{PREFIX}{number:03d}.png" for number in range(first, first + count)]


def redrawn_seeds(config: EditConfig, seeds: list[int]) -> list[int]:
    """The seeds whose pictures are wanted: of a batch that is drawn again for one picture (`--from`), that one's."""
    if config.from_ is None:
        return seeds
    details = recorded(config.from_)
    return [details.seed] if details.seed is not None and seeds == details.options.get("seeds") else seeds


def picture_details(
    config: EditConfig, editor: Editor, prompt: str, sampling: Sampling, seeds: Sequence[int] = ()
) -> Callable[[EditStrengths, int], dict[str, Any]]:
    """A function that returns what draws the picture of these strengths and this seed again; see `details_of`.

    seeds: those that are drawn in one batch, which decides the last bits of each; by default the picture's alone.
    """
    height, width = sampling.size or editor.size
    guidance = text_to_image_guidance(editor.model.name) if sampling.guidance_scale is None else sampling.guidance_scale
    facts = {
        "prompt": prompt, "negative_prompt": config.negative_prompt, "steps": sampling.steps,
        "scheduler": sampling.scheduler, "guidance_scale": guidance, "size": f"{width}x{height}",
    }  # fmt: skip
    common = details_of("edit", config, editor, config.adapters, **facts)

    def details(strengths: EditStrengths, seed: int) -> dict[str, Any]:
        mix = {"alpha": [strengths.alpha], "beta": [strengths.beta]}
        chosen = mix if strengths.gamma is None else {"gamma": [strengths.gamma]}
        options = {key: value for key, value in common["options"].items() if key not in SEARCH}
        options |= {
            **chosen, "forget": [strengths.forget or "none"], "strength": strengths.strength,
            "seeds": list(seeds or (seed,)), "prompt": prompt, "num_inference_steps": sampling.steps,
            "scheduler": sampling.scheduler, "guidance_scale": guidance, "height": height, "width": width,
        }  # fmt: skip
        return {**common, "seed": seed, "strengths": asdict(strengths), "options": options}

    return details


def edit_strengths(config: EditConfig) -> Iterator[EditStrengths]:
    """All combinations of the given strengths; with `--gamma` by vector subtraction, otherwise by projection."""
    usual = DEFAULT_STRENGTHS
    alphas, betas = config.alpha or (usual.alpha,), config.beta or (usual.beta,)
    mixes = [(1.0, 1.0, gamma) for gamma in config.gamma] or [(a, b, None) for a, b in product(alphas, betas)]
    for mix, forget, strength in product(mixes, config.forget or (usual.forget,), config.strength or (usual.strength,)):
        yield EditStrengths(*mix, forget, strength)


def searched(
    config: EditConfig, editor: Editor, prompt: str, sampling: Sampling
) -> Callable[[int], dict[str, Content]]:
    """Search the strengths: the pictures from best to worst, a ranked sheet, and ranking.json, as by `combinations`.

    The best strengths are stored in the adapter's folder, if it is one alone, for the next `edit` with this prompt.
    """
    scorer = find_scorer(editor.model.name, config.clip_model, config.identity_model, editor.model.device)
    request = Request(prompt, editor.caption_for(prompt), load_image(source_picture(config)))
    write, common = PictureWriter(config), picture_details(config, editor, prompt, sampling)  # before anything is drawn
    candidates = search(
        editor, request, scorer, budget=config.budget, seed=config.seed or 0,
        negative_prompt=config.negative_prompt, sampling=sampling,
    )  # fmt: skip
    console = PlainConsole(soft_wrap=True)
    trials = ranked(ticked(candidates, "Searching", total=config.budget))
    best = trials[0]
    console.print(f"Best of {len(trials)}, by {scorer.name}: {best.strengths}, seed {best.seed}; {scores(best)}")
    if best.state != "good":
        console.print(f"No picture shows both the edit and the source (best: {_STATES[best.state]}); raise --budget.")
    console.print(stored(config, prompt, best, editor.caption))
    contents = [write(trial.picture, common(trial.strengths, trial.seed)) for trial in trials]
    sheet = write(ranked_sheet(trials, request))

    def files(first: int) -> dict[str, Content]:
        names = names_from(first, len(trials))
        report = json_bytes(ranking(trials, names, request, scorer.name), ensure_ascii=False)
        return {**dict(zip(names, contents, strict=True)), "grid.png": sheet, "ranking.json": report}

    return files


def stored(config: EditConfig, prompt: str, best: Trial, caption: str | None) -> str:
    """Store the best strengths in the adapter's folder: a line that says so, or why not: the pictures count more."""
    adapter, why = config.adapter, "Not stored for the next `edit` with this prompt"
    if config.add:
        return f"{why}: these are strengths of several adapters together"
    if not (adapter / MANIFEST).is_file():
        return f"{why}: {adapter} is no adapter folder of personalize"
    try:
        remember(adapter, prompt, best.strengths, best.seed, _figures(best) | {"caption": caption})
    except UserError as error:
        return f"{why}: {error}"
    return f"Stored in {adapter}: the next `edit` with this prompt uses it."


_STATES = {"copy": "a copy of the source", "lost": "the source is lost", "neither": "it has neither"}


def ranked_sheet(trials: Sequence[Trial], request: Request) -> Image.Image:
    """The source, then all pictures from best to worst, with strengths and scores below each."""
    pictures = [request.source, *(trial.picture for trial in trials)]
    texts = ["source", *(f"{place}. {trial.strengths}  seed {trial.seed}\n{scores(trial)}"
                         for place, trial in enumerate(trials, 1))]  # fmt: skip
    rows = [range(start, min(start + COLUMNS, len(pictures))) for start in range(0, len(pictures), COLUMNS)]
    return grid(
        [[pictures[i] for i in row] for row in rows], captions=[[texts[i] for i in row] for row in rows],
        title=request.prompt,
    )  # fmt: skip


def scores(trial: Trial) -> str:
    return f"edit {trial.scores.edit:.2f}  identity {trial.scores.identity:.2f}"


def ranking(trials: Sequence[Trial], names: Sequence[str], request: Request, scorer: str) -> dict[str, object]:
    """The contents of ranking.json; `names` are the pictures' files."""
    rows = [
        {"rank": place, "file": name, "seed": trial.seed, **asdict(trial.strengths),
         **_figures(trial), "state": trial.state, "facts": dict(trial.scores.facts)}
        for place, (trial, name) in enumerate(zip(trials, names, strict=True), 1)
    ]  # fmt: skip
    return {"prompt": request.prompt, "caption": request.caption, "scorer": scorer, "pictures": rows}


def _figures(trial: Trial) -> dict[str, float]:
    return {name: round(getattr(trial.scores, name), 4) for name in ("score", "edit", "identity", "distance")}
