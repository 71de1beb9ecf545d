"""The tab Edit: dials to turn while looking, the base beside the adapter, a grid of two dials, and the search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from personalize.adapters.forgetting import RULES
from personalize.editing.config import DEFAULT_STRENGTHS
from personalize.errors import UserError
from personalize.io.json_files import parse_json
from personalize.io.plain_files import read_text
from personalize.studio.actions import carry_out, command_line, option, read
from personalize.studio.edit_pictures import (
    MIXES,
    draw_base,
    drawn_pictures,
    fields_of,
    pictures_text,
    seen_pictures,
    two_dials,
)
from personalize.studio.jobs import Job
from personalize.studio.parts import (
    QUIET,
    Studio,
    Tab,
    adapter_choice,
    command_box,
    existing,
    message_box,
    outcome,
    problem,
    refresh,
)

KIND = "edit"
DIALS = {"–": "", "alpha": "alpha", "beta": "beta", "gamma": "gamma", "forgotten": "forgotten", "rule": "rule",
         "strength": "strength", "seed": "seed"}  # fmt: skip
STEPS = 30  # fewer than the command's 50, for somebody waits; all else begins where the command does


def build(studio: Studio) -> Tab:
    """Make the tab's components and wire them."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=240):
            message = message_box()
            fields = make_fields(studio)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="edit-draw")
                choose = gr.Button("Choose for me", elem_id="edit-choose")
        with gr.Column(scale=6, min_width=240):
            pair = gr.ImageSlider(
                label="The base alone, and with the adapter", interactive=False, elem_id="edit-pair",
                format="png", max_height=440,
            )  # fmt: skip
            pictures = gr.Gallery(
                label="Pictures", columns=4, object_fit="contain", height="auto", elem_id="edit-pictures", format="png",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
            about = gr.HTML("")
            sheet = gr.Image(
                label="Sheet", interactive=False, visible=False, elem_id="edit-sheet", format="png",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
            strip = gr.Gallery(
                label="History: click a picture to get its settings back", columns=8, height=132, allow_preview=False,
                elem_id="edit-history", object_fit="cover", format="png", buttons=[],
            )  # fmt: skip
    command = command_box()
    inputs, names = list(fields.values()), list(fields)

    def start(search: bool) -> Any:
        return lambda *values: begin(studio, dict(zip(names, values, strict=True)), search)

    for button, search in ((draw, False), (choose, True)):
        button.click(start(search), inputs, [message, command], **QUIET)
    fields["prompt"].submit(start(False), inputs, [message, command], **QUIET)

    in_strip = gr.State([])  # the files that this page shows: others may have been drawn since

    def again(event: gr.SelectData, paths: list[str]) -> list[Any]:
        kept = fields_of(studio.queue, paths[event.index])
        return [kept.get(name, gr.skip()) for name in names]

    strip.select(again, in_strip, inputs, show_progress="hidden")

    def show(job: Job) -> list[Any]:
        earlier = seen_pictures(studio.queue)
        known = earlier, [path for path, _ in earlier]
        if job.state != "done":
            return [*[gr.skip()] * 4, *known, outcome(job), job.command]
        result = job.result
        files = [*(path for path, _ in drawn_pictures(result)), *(result["pair"] or ()), result["sheet"]]
        try:
            existing(*filter(None, files))
        except UserError as error:
            return [*[gr.skip()] * 4, *known, problem(error), job.command]
        large = gr.Image(value=str(result["sheet"]) if result["sheet"] else None, visible=bool(result["sheet"]))
        return [result["pair"], drawn_pictures(result), pictures_text(result), large, *known, "", job.command]

    return Tab(KIND, [pair, pictures, about, sheet, strip, in_strip, message, command], show, fields)


def make_fields(studio: Studio) -> dict[str, Any]:
    """The fields of an edit, by the names that `words_of` knows them by."""
    usual, fields = DEFAULT_STRENGTHS, {}
    fields["adapter"] = adapter_choice(studio, "edit-adapter")
    fields["prompt"] = gr.Textbox(label="Prompt", placeholder="What the picture should show", elem_id="edit-prompt")
    fields["mix"] = gr.Radio(list(MIXES), value=next(iter(MIXES)), label="How the edit is put to what was learned")
    with gr.Row():
        fields["alpha"] = gr.Slider(0, 1.5, usual.alpha, step=0.05, label="Alpha: source kept", elem_id="edit-alpha")
        fields["beta"] = gr.Slider(0, 2, usual.beta, step=0.05, label="Beta: edit added", elem_id="edit-beta")
    fields["gamma"] = gr.Slider(0, 1.5, 0.8, step=0.05, label="Gamma: from source to prompt", visible=False)
    fields["mix"].change(
        lambda mix: [gr.Slider(visible=(MIXES[mix] != "projection") == gamma) for gamma in (False, False, True)],
        fields["mix"], [fields["alpha"], fields["beta"], fields["gamma"]], show_progress="hidden", queue=False,
    )  # fmt: skip
    with gr.Row():
        rules = [(f"{name}: {rule.description}", name) for name, rule in RULES.items()]
        fields["rule"] = gr.Dropdown(
            rules, value="none", label="Forget", allow_custom_value=True, elem_id="edit-rule"
        )  # a sum of rules is none of the list
        fields["forgotten"] = gr.Slider(0, 1, 0.5, step=0.05, label="Share forgotten")
    fields["strength"] = gr.Slider(0, 1.5, usual.strength, step=0.05, label="Strength of the whole adapter")
    with gr.Row():
        fields["seed"] = gr.Number(0, label="Seed", precision=0)
        fields["count"] = gr.Number(
            1, label="Pictures", precision=0, minimum=1, maximum=16, info="Each with its own seed"
        )
    with gr.Accordion("A grid of two dials", open=False, elem_id="edit-grid"):
        for place, says in (("across", "0.6, 0.8, 1"), ("down", "0.8, 1.2")):
            with gr.Row():
                fields[f"dial_{place}"] = gr.Dropdown(
                    list(DIALS), value="–", label=f"Dial {place}", elem_id=f"edit-dial-{place}"
                )
                fields[f"values_{place}"] = gr.Textbox(
                    label="Its values", placeholder=says, elem_id=f"edit-values-{place}"
                )
    with gr.Accordion("More", open=False):
        fields["negative"] = gr.Textbox(label="Negative prompt", placeholder="What it should not show")
        fields["steps"] = gr.Slider(4, 100, STEPS, step=1, label="Denoising steps", elem_id="edit-steps")
        fields["beside"] = gr.Checkbox(True, label="Draw the base without the adapter too")
        fields["budget"] = gr.Slider(
            4, 64, 16, step=1, label="Pictures that “Choose for me” may draw", elem_id="edit-budget"
        )
        fields["clip"] = gr.Textbox(
            label="CLIP model that judges them", placeholder="The package's own model needs none"
        )
        fields["source_image"] = gr.Dropdown(
            studio.folder.pictures(), value=None, label="Learned picture that they are compared with",
            allow_custom_value=True, info="If empty, the one in the adapter's folder, of its first caption",
            elem_id="edit-source",
        )  # fmt: skip
        refresh(fields["source_image"], studio.folder.pictures)
    return fields


def values_of(text: str) -> list[str]:
    """ "0.6, 0.8" → ["0.6", "0.8"]."""
    return [part.strip() for part in (text or "").replace(";", ",").split(",") if part.strip()]


def dials_of(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """The dials of the grid with their values.  UserError for one without values or effect, or twice the same."""
    chosen: dict[str, list[str]] = {}
    for place in ("across", "down"):
        dial, values = DIALS.get(given[f"dial_{place}"] or "–", ""), values_of(given[f"values_{place}"])
        if not dial:
            continue
        if not values:
            raise UserError(f"the dial {dial} has no values: write some, such as 0.6, 0.8, 1")
        if dial in chosen:
            raise UserError(f"both dials are {dial}: choose another for one of them")
        chosen[dial] = values
    if "gamma" in chosen and (others := [dial for dial in chosen if dial in ("alpha", "beta")]):
        raise UserError(f"gamma takes the place of alpha and beta: the dial {others[0]} has no effect beside gamma")
    if "forgotten" in chosen and "rule" not in chosen and given["rule"] == "none":
        raise UserError("the dial forgotten has no effect while nothing is forgotten: choose a rule under Forget")
    return chosen


def forget_values(given: Mapping[str, Any], dials: Mapping[str, list[str]]) -> list[str]:
    """The forgetting rules, each with the share that is kept."""
    rules, shares = dials.get("rule", [given["rule"]]), dials.get("forgotten", [given["forgotten"]])
    try:
        kept = [1 - float(share) for share in shares]
    except ValueError:
        raise UserError(f"forgotten takes numbers from 0 to 1, got {', '.join(map(str, shares))}") from None
    return [rule if rule == "none" or share == 0 else f"{rule}={share:g}" for rule in rules for share in kept]


def words_of(studio: Studio, given: Mapping[str, Any], search: bool, *more: str) -> list[str]:
    """The command line of an edit, or of a search of strengths."""
    if not given["adapter"]:
        raise UserError("there is no adapter: learn one in the tab Learn, or choose one of the list")
    dials = {} if search else dials_of(given)
    words = ["edit", str(studio.folder.existing(given["adapter"])), f"--prompt={given['prompt'] or ''}"]
    words += option("negative_prompt", given["negative"] or None)
    if search:
        words += ["--auto", *option("budget", int(given["budget"])), *option("clip_model", given["clip"] or None)]
        words += option("seed", int(given["seed"] or 0))
        named = given.get("source_image")
        words += option("source_image", studio.folder.picture(named) if named else None)
    else:
        projection = MIXES.get(given["mix"], "projection") == "projection" or {"alpha", "beta"} & {*dials}
        names = ["alpha", "beta"] if projection and "gamma" not in dials else ["gamma"]
        for name in (*names, "strength"):
            words += option(
                name, *dials.get(name, [f"{given[name]:g}"] if (name, given[name]) != ("strength", 1) else [])
            )
        rules = forget_values(given, dials)
        words += option("forget", *(rules if rules != ["none"] else []))
        count = max(1, int(given["count"] or 1))
        seeds = dials.get("seed", [str(int(given["seed"] or 0) + number) for number in range(count)])
        words += option("seeds", *seeds)
    words += option("num_inference_steps", int(given["steps"]))
    return [*words, *studio.bench.base_words(), *more]


def begin(studio: Studio, given: dict[str, Any], search: bool) -> tuple[str, Any]:
    """Put an edit or a search into the queue: a message, and the command."""
    try:
        with studio.folder.folder_for("search" if search else "edit") as folder:
            words = words_of(studio, given, search, *option("output_dir", folder))
            options, _ = read(words)
            dials = {} if search else dials_of(given)
    except UserError as error:
        return problem(error), gr.skip()

    def work(job: Job) -> dict[str, Any]:
        carry_out(words, studio.bench, job)
        result = result_of(folder, search)
        if not search:
            result["pair"] = draw_base(studio.bench, options, result, job) if given["beside"] else None
            result["sheet"] = two_dials(dials, result, folder) if dials else None
        result["given"] = given
        return result

    title = "Choosing strengths" if search else "Edit"
    job = Job(KIND, f"{title}: {given['prompt'][:60]}", work, command_line(words), given)
    studio.queue.submit(job)
    return "", job.command


def result_of(folder: Path, search: bool) -> dict[str, Any]:
    """What the command has written: its pictures with their settings, best first after a search."""
    name = "ranking.json" if search else "edits.json"
    entries = parse_json(read_text(folder / name), folder / name)
    if search:
        entries = [row | {"prompt": entries["prompt"]} for row in entries["pictures"]]
    sheet = folder / "grid.png" if search else None
    return {"folder": folder, "entries": entries, "sheet": sheet, "pair": None}
