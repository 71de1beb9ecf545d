"""The tab Photo: words as chips with where they look, a mask, before and after, and what was kept in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from personalize.errors import UserError
from personalize.io.image_files import load_image
from personalize.io.json_files import read_json
from personalize.io.progress import listening
from personalize.studio.actions import carry_out, command_line, option, read
from personalize.studio.folder import OUTPUT
from personalize.studio.jobs import Job
from personalize.studio.parts import (
    QUIET,
    Studio,
    Tab,
    awaited,
    board_picture,
    canvas,
    command_box,
    connect,
    data_url,
    drawn_on,
    existing,
    facts,
    links,
    message_box,
    outcome,
    page_of,
    picture_choice,
    problem,
    text,
)

KIND = "photo"
FOLDER = Path(OUTPUT, "photo")  # of all edits, so that a photo is inverted once
INVERSIONS = {
    "Exact and fast": "direct",
    "Without inversion, fewest steps": "none",
    "Freer, with noise of its own (DDPM)": "ddpm",
    "Fitted to the photo, slow (null-text)": "null-text",
    "By the negative prompt": "negative",
    "Plain DDIM": "ddim",
}
CONTROLLERS = {"Keep the layout (Prompt-to-Prompt)": "p2p", "Let the pose change, keep the looks (MasaCtrl)": "mutual"}


def build(studio: Studio) -> Tab:
    """Make the tab's components and wire them."""
    start = studio.start if studio.start in studio.folder.pictures() else None
    fields: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=240):
            message = message_box()
            fields["picture"] = picture_choice(studio, "photo-picture", value=start, label="Photo")
            board = canvas("Photo and mask", ["paint"], key="photo-board", start=start)
            gr.HTML('<div class="quiet">Painted: only there may the photo change. Unpainted: everywhere.</div>')
            connect(studio, fields["picture"], board, message)
        with gr.Column(scale=5, min_width=240):
            fields["source"] = gr.Textbox(
                label="What it shows", placeholder="a picture of a cat on the beach", elem_id="photo-source"
            )
            look = gr.Button("Read the words", elem_id="photo-read")
            chips = gr.HTML(
                {}, html_template=text("chips.html"), css_template=text("chips.css"), js_on_load=text("chips.js"),
                apply_default_css=False, words=[], elem_id="photo-chips",
            )  # fmt: skip
            # where words look, and what they are swapped for, is of one photo
            fields["picture"].change(lambda: gr.HTML(words=[]), None, chips, show_progress="hidden", queue=False)
            fields["target"] = gr.Textbox(
                label="What it is to show instead", placeholder="Or swap words above", elem_id="photo-target"
            )
            settings(fields)
            edit = gr.Button("Edit", variant="primary", elem_id="photo-edit")
    with gr.Column(visible=False) as done:
        pair = gr.ImageSlider(label="Before and after", interactive=False, elem_id="photo-result", format="png")
        about = gr.HTML("")
    command = command_box()
    inputs, names = [board, chips, *fields.values()], ["board", "chips", *fields]
    wire(studio, look, edit, (inputs, names), chips, message, command)

    def show(job: Job) -> list[Any]:
        if job.state != "done":
            return [gr.skip(), gr.skip(), gr.skip(), outcome(job), job.command]
        written = job.result["written"]
        pair = existing(job.result["before"], FOLDER / next(name for name in written if name.startswith("edited")))
        return [gr.Column(visible=True), pair, summary(written), "", job.command]

    return Tab(KIND, [done, pair, about, message, command], show, {**fields, "board": board})


def settings(fields: dict[str, Any]) -> None:
    """The fields of how it is edited."""
    fields["inversion"] = gr.Dropdown(list(INVERSIONS), value="Exact and fast", label="How the photo is read")
    fields["controller"] = gr.Radio(list(CONTROLLERS), value=next(iter(CONTROLLERS)), label="What is kept of it")
    fields["local"] = gr.Checkbox(False, label="Change only where the swapped words look")
    with gr.Accordion("More", open=False):
        fields["cross"] = gr.Slider(0, 1, 0.8, step=0.05, label="Words keep their places for this share of the steps")
        fields["self"] = gr.Slider(0, 1, 0.5, step=0.05, label="The layout is kept for this share of the steps")
        fields["steps"] = gr.Slider(4, 100, 50, step=1, label="Denoising steps", elem_id="photo-steps")
        fields["seed"] = gr.Number(0, label="Seed, for noise of its own", precision=0)


def wire(
    studio: Studio, look: gr.Button, edit: gr.Button, given: tuple[list[Any], list[str]], chips: Any, message: Any,
    command: Any,
) -> None:  # fmt: skip
    """What the two buttons do."""
    inputs, names = given

    def words_read(request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any]]:
        yield from read_words(studio, dict(zip(names, values, strict=True)), page_of(request))

    def begin(*values: Any) -> tuple[str, Any]:
        return start_edit(studio, dict(zip(names, values, strict=True)))

    look.click(words_read, inputs, [chips, message], **QUIET)
    edit.click(begin, inputs, [message, command], **QUIET)


def photo_of(studio: Studio, given: Mapping[str, Any]) -> Path:
    """The photo and its description are there; UserError otherwise."""
    if not given["picture"]:
        raise UserError("there is no photo: drop one on the frame, or choose one of the list")
    if not (given["source"] or "").strip():
        raise UserError("say what the photo shows, e.g. “a cat on the beach”")
    return studio.folder.picture(given["picture"])


def read_words(studio: Studio, given: Mapping[str, Any], page: str = "") -> Iterator[tuple[Any, Any]]:
    """The chips with the maps of their words, and a message."""
    try:
        path = photo_of(studio, given)
    except UserError as error:
        yield gr.skip(), problem(error)
        return

    def work(job: Job) -> Any:
        from personalize.editing.photo_settings import PhotoSettings
        from personalize.editing.word_maps import word_maps

        with listening(job.part):
            return word_maps(
                studio.bench.editor(studio.bench.base, ()).model, load_image(path), given["source"],
                PhotoSettings(steps=int(given["steps"])), cache=FOLDER / "trajectories",
            )  # fmt: skip

    job = studio.queue.submit(Job("words", "Reading the words", work, page=page))
    for waits in awaited(studio, job):
        yield gr.skip(), waits
    if job.state != "done":
        yield gr.skip(), outcome(job)
        return
    maps = {word: data_url(one) for word, one in job.result.items()}
    yield gr.HTML(words=[{"text": word, "map": one} for word, one in maps.items()]), ""


def words_of(studio: Studio, given: Mapping[str, Any]) -> list[str]:
    """The command line of an edit of a photo."""
    path, chosen = photo_of(studio, given), given["chips"] or {}
    swaps = {} if (given["target"] or "").strip() else chosen.get("swaps") or {}
    mask = (drawn_on(given["board"], path).get("masks") or [None])[0]
    words = [
        "edit",
        str(path),
        f"--source={given['source']}",
        *option("target", (given["target"] or "").strip() or None),
    ]
    words += option("swap", *(f"{old}={new}" for old, new in swaps.items()))
    weights = (chosen.get("weights") or {}).items()
    words += option("weight", *(f"{swaps.get(word, word)}={factor:g}" for word, factor in weights))
    if given["local"]:
        if not swaps:
            raise UserError("no word is swapped, so that nowhere may change: swap words above, or paint where it may")
        words += option("local", *(f"{old}={new}" for old, new in swaps.items()))
    words += option("mask", studio.folder.keep_mask(mask) if mask else None)
    plain = {
        "inversion": (INVERSIONS.get(given["inversion"], given["inversion"]), "direct"),
        "controller": (CONTROLLERS.get(given["controller"], given["controller"]), "p2p"),
        "cross_replace_steps": (given["cross"], 0.8), "self_replace_steps": (given["self"], 0.5),
        "num_inference_steps": (int(given["steps"]), 50), "seed": (int(given["seed"] or 0), 0),
    }  # fmt: skip
    for name, (value, usual) in plain.items():
        words += option(name, value if value != usual else None)
    return [*words, *studio.bench.base_words(), *option("output_dir", FOLDER)]


def start_edit(studio: Studio, given: Mapping[str, Any]) -> tuple[str, Any]:
    """Put the edit into the queue: a message, and the command."""
    try:
        words = words_of(studio, given)
        read(words)
        picture = board_picture(studio.folder.picture(given["picture"]))
    except UserError as error:
        return problem(error), gr.skip()

    def work(job: Job) -> dict[str, Any]:
        before = {path.name for path in FOLDER.glob("*")}
        carry_out(words, studio.bench, job)
        written = sorted(path.name for path in FOLDER.glob("*") if path.name not in before and path.is_file())
        return {"before": words[1], "written": written}

    inputs = {**given, "board": gr.update(picture=picture)}
    job = studio.queue.submit(Job(KIND, f"Edit of {picture['name']}", work, command_line(words), inputs))
    return "", job.command


def summary(written: list[str]) -> str:
    """What was kept, in numbers, and the files."""
    record = read_json(FOLDER / next(name for name in written if name.startswith("edit-") or name == "edit.json"))
    first = next(name for name in written if name.startswith("edited"))
    size = load_image(FOLDER / first).size
    rows: dict[str, Any] = {"Now": record["target"], "Was": record["source"]}
    if record["untouched_pixels"]:
        share = record["untouched_pixels"][0] / (size[0] * size[1])
        rows["Kept to the pixel"] = f"{share:.1%} of the photo"
    rows["As read, the photo comes back with"] = f"{record['reconstruction_db']:.1f} dB"
    rows["Time"] = f"{record['seconds']:.1f} s"
    if record["notes"]:
        rows["Notes"] = "; ".join(record["notes"])
    return facts(rows | {"Files": links([FOLDER / name for name in written])})
