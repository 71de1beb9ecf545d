"""The tab Learn: a picture, its caption and mask; what it will take; then progress, loss, replays, stop and go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from personalize.cli import launch
from personalize.errors import UserError
from personalize.io.image_metadata import sidecar_caption
from personalize.studio.actions import command_line, read
from personalize.studio.jobs import Job
from personalize.studio.learn_result import live, result
from personalize.studio.learn_words import ON_TOP, ONE, OWN_BASE, SEVERAL, phrases, words_of
from personalize.studio.parts import (
    QUIET,
    Studio,
    Tab,
    awaited,
    board_picture,
    canvas,
    command_box,
    facts,
    message_box,
    outcome,
    page_of,
    problem,
)

KIND = "learn"


def build(studio: Studio) -> Tab:
    """Make the tab's components and wire them."""
    fields: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=240):
            message = message_box()
            fields["mode"] = gr.Radio([ONE, SEVERAL], value=ONE, label="What is learned", elem_id="learn-mode")
            start = studio.start if studio.start in studio.folder.pictures() else None
            fields["pictures"] = gr.Dropdown(
                studio.folder.pictures(), value=[start] if start else [], label="Pictures", multiselect=True,
                info="In this folder; or drop one or several on the frame", elem_id="learn-pictures",
            )  # fmt: skip
            board = canvas("Picture and mask", ["paint"], many=True, key="learn-board", start=start)
            gr.HTML(
                '<div class="quiet">Painted: the subject. Elsewhere the loss counts a tenth. May stay unpainted.</div>'
            )
        with gr.Column(scale=5, min_width=240):
            more_fields(studio, fields)
            with gr.Row():
                check = gr.Button("Check", elem_id="learn-check")
                begin = gr.Button("Learn", variant="primary", elem_id="learn-start")
            expected = gr.HTML("", elem_id="learn-expected")
    with gr.Column(visible=False) as run:
        with gr.Row():
            stop = gr.Button("Stop and keep", elem_id="learn-stop", visible=False)
            go_on = gr.Button("Go on", elem_id="learn-go-on", visible=False)
        progress = gr.HTML("", elem_id="learn-progress")
    command = command_box()
    wire_fields(studio, fields, board, message)
    inputs, names = [board, *fields.values()], ["board", *fields]

    def given(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(names, values, strict=True))

    def look(request: gr.Request, *values: Any) -> Iterator[tuple[Any, Any, Any]]:
        yield from checked(studio, given(values), page_of(request))

    check.click(look, inputs, [expected, message, command], **QUIET)
    begin.click(lambda *values: start_run(studio, given(values)), inputs, [message, command], **QUIET)
    stop.click(lambda: stop_run(studio), None, None, queue=False)
    go_on.click(lambda: continue_run(studio), None, [message, command], **QUIET)

    def show(job: Job) -> list[Any]:
        running, stopped = job.state == "running", bool((job.result or {}).get("stopped"))
        text = result(job) if job.state == "done" else live(job)
        buttons = [
            gr.Button(visible=running, interactive=not job.stopping),
            gr.Button(visible=job.state == "done" and stopped),
        ]
        return [gr.Column(visible=True), *buttons, text, outcome(job), job.command]

    return Tab(KIND, [run, stop, go_on, progress, message, command], show, {**fields, "board": board})


def more_fields(studio: Studio, fields: dict[str, Any]) -> None:
    """The fields about words, base and settings."""
    fields["caption"] = gr.Textbox(
        label="What it shows", placeholder="a picture of a cat", elem_id="learn-caption",
        info="Read from the .txt beside the picture, if there is one",
    )  # fmt: skip
    fields["concepts"] = gr.Textbox(
        label="Subjects", placeholder="<cat1> cat, <dog1> dog", visible=False, elem_id="learn-concepts",
        info="For each its new word and what it is; the words above name them",
    )  # fmt: skip
    fields["token"] = gr.Textbox(
        label="New word", placeholder="<rex> dog", elem_id="learn-token",
        info="May stay empty. A word that is learned for the subject; what it shows must say it",
    )  # fmt: skip
    with gr.Row():
        fields["base"] = gr.Dropdown(bases(studio), value=bases(studio)[0], label="Base model", elem_id="learn-base")
        presets = [name for name in launch.presets("single_image") if name not in ON_TOP]
        fields["preset"] = gr.Dropdown(
            ["none", *presets], value=preset_of(studio), label="Preset", elem_id="learn-preset"
        )
    fields["name"] = gr.Textbox(label="Folder of the adapter", placeholder="my-cat", elem_id="learn-name")
    with gr.Accordion("More", open=False):
        fields["extra"] = gr.CheckboxGroup(list(ON_TOP), label="Presets on top")
        with gr.Row():
            fields["samples"] = gr.Number(
                None, label="Samples", precision=0, info="0: the preset's", elem_id="learn-samples"
            )
            fields["every"] = gr.Number(
                10, label="Updates between replays", precision=0, minimum=1, elem_id="learn-every"
            )
        with gr.Row():
            fields["rank"] = gr.Number(None, label="Rank", precision=0, info="0: the preset's")
            fields["resolution"] = gr.Number(None, label="Resolution", precision=0, info="0: the base's")
            fields["seed"] = gr.Number(0, label="Seed", precision=0)
        fields["class_images"] = gr.Number(
            None,
            label="Class pictures",
            precision=0,
            elem_id="learn-classes",
            info="Of several subjects. 0: the preset's",
        )
        fields["captioner"] = gr.Textbox(
            label="BLIP model that captions", placeholder="A folder or hub id; may stay empty"
        )
        fields["person"] = gr.Checkbox(False, label="It shows a recognisable person, who has consented")


def bases(studio: Studio) -> list[str]:
    named = [studio.bench.base] if studio.bench.base else []
    return [*named, OWN_BASE, *studio.folder.bases()]


def preset_of(studio: Studio) -> str:
    return "none" if studio.bench.base else "embedded"


def wire_fields(studio: Studio, fields: dict[str, Any], board: Any, message: Any) -> None:
    """Pictures that are chosen or dropped are shown; the caption beside them is read; subjects get a mask each."""
    pictures, automatic = fields["pictures"], gr.State("")  # the name that was filled in here, not by the user

    def take(drawn: dict[str, Any], chosen: list[str]) -> tuple[Any, str]:
        try:
            kept = [str(studio.folder.keep_upload(sent)) for sent in drawn.get("sent", [])]
        except UserError as error:
            return gr.skip(), problem(error)
        value: list[Any] = list(dict.fromkeys([*(chosen if len(kept) > 1 else []), *kept]))
        return gr.Dropdown(choices=studio.folder.pictures(), value=value), ""

    def show(chosen: list[str], caption: str, name: str, given: str) -> tuple[Any, ...]:
        if not chosen:
            return (*[gr.skip()] * 4, "")
        try:
            path = studio.folder.picture(chosen[0])
        except UserError as error:
            return (*[gr.skip()] * 4, problem(error))
        words = sidecar_caption(path) or caption
        return gr.HTML(picture=board_picture(path)), words, *named(studio, path, name, given), ""

    def subjects(mode: str, concepts: str) -> tuple[Any, Any, Any]:
        layers = phrases(concepts) if mode == SEVERAL else []
        visible = gr.Textbox(visible=mode == SEVERAL), gr.Textbox(visible=mode == ONE)
        return *visible, gr.HTML(layers=layers or ["mask"])

    board.upload(take, [board, pictures], [pictures, message], **QUIET)
    gr.on(
        [pictures.change, board.load],
        show,
        [pictures, fields["caption"], fields["name"], automatic],
        [board, fields["caption"], fields["name"], automatic, message],
        **QUIET,
    )
    pictures.focus(
        lambda: gr.Dropdown(choices=studio.folder.pictures()), None, pictures, queue=False, show_progress="hidden"
    )
    gr.on(
        [fields["mode"].change, fields["concepts"].change], subjects, [fields["mode"], fields["concepts"]],
        [fields["concepts"], fields["token"], board], **QUIET,
    )  # fmt: skip


def named(studio: Studio, picture: Path, name: str, automatic: str) -> tuple[str, str]:
    """The adapter's name for `picture`, and the automatic one: a name that the user has written is kept."""
    if name not in ("", automatic):
        return name, automatic
    new = unused(studio, f"my-{picture.stem}")
    return new, new


def unused(studio: Studio, name: str) -> str:
    """`name`, or the first of `name`-2, … that is no folder yet, and will be none of a training in the queue."""
    names, taken = (name if number == 1 else f"{name}-{number}" for number in count(1)), submitted(studio)
    return next(one for one in names if Path(one) not in taken and not (studio.folder.root / one).exists())


def submitted(studio: Studio) -> set[Path]:
    """The folders of the trainings that run or wait."""
    jobs = [job for job in (studio.queue.running, *studio.queue.waiting()) if job is not None and job.kind == KIND]
    return {studio.folder.inside(job.inputs["name"]) for job in jobs}


def checked(studio: Studio, given: Mapping[str, Any], page: str = "") -> Iterator[tuple[Any, Any, Any]]:
    """What the training will take, a message, and the command."""
    try:
        words = words_of(studio, given)
        read(words)
    except UserError as error:
        yield "", problem(error), gr.skip()
        return

    def work(job: Job) -> Any:
        from personalize.studio.learning import check_run

        return check_run(words, studio.bench)

    job = studio.queue.submit(Job("check", "Checking what it will take", work, page=page))
    for waits in awaited(studio, job):
        yield gr.skip(), waits, gr.skip()
    yield facts(job.result or {}), outcome(job), command_line(words)


def start_run(studio: Studio, given: Mapping[str, Any]) -> tuple[str, Any]:
    """Put the training into the queue: a message, and the command."""
    try:
        words = words_of(studio, given)
        read(words)
        if (folder := studio.folder.inside(given["name"])) in submitted(studio):
            raise UserError(f"{folder} belongs to a training that runs or waits: write another name, or cancel that")
        picture = board_picture(studio.folder.picture(given["pictures"][0]))
    except UserError as error:
        return problem(error), gr.skip()
    return submit(studio, words, {**given, "board": gr.update(picture=picture)})


def submit(studio: Studio, words: list[str], inputs: dict[str, Any]) -> tuple[str, Any]:
    folder = studio.folder.new_folder("replays")

    def work(job: Job) -> dict[str, Any]:
        from personalize.studio.learning import learn

        return learn(words, studio.bench, job, int(inputs["every"] or 10), folder) | {"words": words}

    title = f"Learning {Path(inputs['pictures'][0]).name}"
    job = studio.queue.submit(Job(KIND, title, work, command_line(words), inputs))
    return "", job.command


def stop_run(studio: Studio) -> None:
    """Let the training that runs end after its update, with what it has learned."""
    job = studio.queue.running
    if job is not None and job.kind == KIND:
        job.stopping = True
        job.version += 1


def continue_run(studio: Studio) -> tuple[str, Any]:
    """Go on with the training that was stopped last, from its checkpoint."""
    job = studio.queue.latest(KIND)
    if job is None or not (job.result or {}).get("stopped"):
        return problem("there is no training that was stopped: learn one first"), gr.skip()
    words = [word for word in job.result["words"] if not word.startswith("--resume_from_checkpoint")]
    return submit(studio, [*words, "--resume_from_checkpoint=latest"], job.inputs)
