"""The tab Learn: a picture, its caption and mask; what it will take; then progress, loss, replays, stop and go on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from personalize.cli import launch
from personalize.errors import UserError
from personalize.io.image_metadata import sidecar_caption
from personalize.studio.actions import command_line, option, read
from personalize.studio.jobs import Job
from personalize.studio.learn_result import live, result
from personalize.studio.parts import (
    Studio,
    Tab,
    awaited,
    canvas,
    command_box,
    facts,
    message_box,
    outcome,
    problem,
    shown,
)

KIND = "learn"
ONE, SEVERAL = "One subject", "Several subjects of one picture"
ON_TOP = ("low_memory", "fast", "dreambooth")  # presets that go on top of a base's own
OWN_BASE = "the package's own"
QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}


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

    def look(*values: Any) -> Iterator[tuple[Any, Any, Any]]:
        yield from checked(studio, given(values))

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
                None, label="Samples", precision=0, info="Empty: the preset's", elem_id="learn-samples"
            )
            fields["every"] = gr.Number(
                10, label="Updates between replays", precision=0, minimum=1, elem_id="learn-every"
            )
        with gr.Row():
            fields["rank"] = gr.Number(None, label="Rank", precision=0)
            fields["resolution"] = gr.Number(None, label="Resolution", precision=0)
            fields["seed"] = gr.Number(0, label="Seed", precision=0)
        fields["class_images"] = gr.Number(None, label="Class pictures (several subjects)", precision=0)
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
    pictures = fields["pictures"]

    def take(drawn: dict[str, Any], chosen: list[str]) -> tuple[Any, str]:
        try:
            kept = [str(studio.folder.keep_upload(sent)) for sent in drawn.get("sent", [])]
        except UserError as error:
            return gr.skip(), problem(error)
        value: list[Any] = list(dict.fromkeys([*(chosen if len(kept) > 1 else []), *kept]))
        return gr.Dropdown(choices=studio.folder.pictures(), value=value), ""

    def show(chosen: list[str], caption: str, name: str) -> tuple[Any, Any, Any, str]:
        if not chosen:
            return gr.skip(), gr.skip(), gr.skip(), ""
        try:
            path = studio.folder.picture(chosen[0])
        except UserError as error:
            return gr.skip(), gr.skip(), gr.skip(), problem(error)
        words = sidecar_caption(path) or caption
        return gr.HTML(picture=shown(path)), words, name or unused(studio, f"my-{path.stem}"), ""

    def subjects(mode: str, concepts: str) -> tuple[Any, Any]:
        layers = phrases(concepts) if mode == SEVERAL else []
        return gr.Textbox(visible=mode == SEVERAL), gr.HTML(layers=layers or ["mask"])

    board.upload(take, [board, pictures], [pictures, message], **QUIET)
    gr.on(
        [pictures.change, board.load],
        show,
        [pictures, fields["caption"], fields["name"]],
        [board, fields["caption"], fields["name"], message],
        **QUIET,
    )
    pictures.focus(
        lambda: gr.Dropdown(choices=studio.folder.pictures()), None, pictures, queue=False, show_progress="hidden"
    )
    gr.on(
        [fields["mode"].change, fields["concepts"].change], subjects, [fields["mode"], fields["concepts"]],
        [fields["concepts"], board], **QUIET,
    )  # fmt: skip


def unused(studio: Studio, name: str) -> str:
    """`name`, or the first of `name`-2, … that is no folder yet."""
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(one for one in names if not (studio.folder.root / one).exists())


def phrases(text: str) -> list[str]:
    """ "<cat1> cat, <dog1> dog" → ["<cat1> cat", "<dog1> dog"]."""
    return [part.strip() for part in re.split(r"[,;\n]", text or "") if part.strip()]


def words_of(studio: Studio, given: Mapping[str, Any]) -> list[str]:
    """The command line of a training.  UserError for what is missing."""
    pictures = [str(studio.folder.picture(path)) for path in given["pictures"] or []]
    if not pictures:
        raise UserError("there is no picture: drop one on the frame, or choose one of the list")
    if not (given["name"] or "").strip():
        raise UserError("the adapter has no name: write the folder it is to go to, such as my-cat")
    several = given["mode"] == SEVERAL
    masks = [
        mask and studio.folder.keep_mask(mask, f"mask-{number}")
        for number, mask in enumerate((given["board"] or {}).get("masks") or [], 1)
    ]
    words = ["train", "multi_concept" if several else "single_image", *(pictures[:1] if several else pictures)]
    words += option("config", *chosen_presets(given, "multi_concept" if several else "single_image"))
    if given["base"] not in (OWN_BASE, None):
        named = given["base"] if given["base"] == studio.bench.base else studio.folder.existing(given["base"])
        words += option("pretrained_model_name_or_path", named)
    words += several_words(given, masks, pictures) if several else single_words(given, masks, pictures)
    words += option("output_dir", studio.folder.inside(given["name"]))
    for name in ("rank", "resolution"):
        words += option(name, int(given[name]) if given[name] else None)
    words += option("seed", int(given["seed"]) if given["seed"] else None)
    return [*words, "--person"] if given["person"] else words


def chosen_presets(given: Mapping[str, Any], trainer: str) -> list[str]:
    """The presets that this trainer has, the base's own first."""
    known = launch.presets(trainer)
    wanted = [given["preset"], *(given["extra"] or [])]
    missing = [name for name in wanted if name not in (*known, "none", None)]
    if missing:
        raise UserError(f"there is no preset {missing[0]} for this: choose {', '.join(known)}")
    return [name for name in wanted if name in known]


def single_words(given: Mapping[str, Any], masks: list[Any], pictures: list[str]) -> list[str]:
    """The options of a training on one subject."""
    if any(masks) and len(pictures) > 1:
        raise UserError("a painted mask belongs to one picture: choose one, or clear the mask")
    words = [f"--caption={given['caption']}"] if (given["caption"] or "").strip() else []
    if not words and not given["captioner"]:
        words = ["--caption="]  # which the command refuses, in its own words
    words += option("caption_model", given["captioner"] or None) + option("instance_mask", masks[0] if masks else None)
    return words + option("max_train_samples", int(given["samples"]) if given["samples"] else None)


def several_words(given: Mapping[str, Any], masks: list[Any], pictures: list[str]) -> list[str]:
    """The options of a training on several subjects of one picture."""
    if len(pictures) > 1:
        raise UserError("several subjects are learned from one picture that shows them all: choose one")
    named = phrases(given["concepts"])
    if not named:
        raise UserError("there are no subjects: write for each its new word and what it is, such as <cat1> cat")
    painted = [mask for mask in masks if mask]
    if painted and len(painted) != len(named):
        raise UserError(f"{len(painted)} of {len(named)} subjects are painted: paint each, or none")
    words = option("concepts", *named) + option("instance_prompt", given["caption"] or None) + option("masks", *painted)
    words += option("num_class_images", int(given["class_images"]) if given["class_images"] else None)
    steps = max(1, int(given["samples"]) // 8) if given["samples"] else None
    return [*words, *option("max_train_steps", steps), "--attention_maps"]


def checked(studio: Studio, given: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
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

    job = studio.queue.submit(Job("check", "Checking what it will take", work), instead=True)
    for waits in awaited(studio, job):
        yield gr.skip(), waits, gr.skip()
    yield facts(job.result or {}), outcome(job), command_line(words)


def start_run(studio: Studio, given: Mapping[str, Any]) -> tuple[str, Any]:
    """Put the training into the queue: a message, and the command."""
    try:
        words = words_of(studio, given)
        read(words)
        picture = shown(studio.folder.picture(given["pictures"][0]))
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
