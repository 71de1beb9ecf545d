"""The tab Files: what an adapter file is, who reads it and what is wrong with it; convert, merge, bake forgetting."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from personalize.adapters.forgetting import RULES
from personalize.errors import UserError
from personalize.io.plain_files import visible
from personalize.studio.actions import command_line, option, read
from personalize.studio.jobs import Job
from personalize.studio.learn_result import reader_table
from personalize.studio.parts import (
    QUIET,
    Markup,
    Studio,
    Tab,
    adapter_choice,
    awaited,
    command_box,
    facts,
    links,
    message_box,
    outcome,
    page_of,
    problem,
)

KIND = "files"
LAYOUTS = {
    "A1111, Forge, ComfyUI, InvokeAI (kohya)": "kohya",
    "diffusers": "diffusers",
    "PEFT (a folder)": "peft",
}
MOST = 4  # adapters in one merge


def build(studio: Studio) -> Tab:
    """Make the tab's components and wire them."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=240):
            message = message_box()
            file = adapter_choice(studio, "files-file", label="File or adapter folder")
            drop = gr.File(label="Or drop a file here", height=140, elem_id="files-drop")
            look = gr.Button("Inspect", variant="primary", elem_id="files-inspect")
            convert, converted = convert_fields()
            bake, baked = bake_fields()
            merge, merged = merge_fields(studio)
        with gr.Column(scale=5, min_width=240):
            about = gr.HTML(
                '<div class="quiet">“Inspect” says what a file is and who can read it.</div>', elem_id="files-about"
            )
            chart = gr.Image(
                label="What it changes",
                interactive=False,
                visible=False,
                format="png",
                elem_id="files-chart",
                buttons=["download", "fullscreen"],
            )
    command = command_box()

    def take(sent: str | None) -> tuple[Any, str]:
        try:
            kept = str(studio.folder.keep_upload(sent, "adapters")) if sent else None
        except UserError as error:
            return gr.skip(), problem(error)
        return (gr.Dropdown(choices=studio.folder.adapter_files(), value=kept), "") if kept else (gr.skip(), "")

    def inspect(request: gr.Request, path: str | None) -> Iterator[tuple[Any, ...]]:
        yield from inspected(studio, path, page_of(request))

    drop.upload(take, drop, [file, message], **QUIET)
    look.click(inspect, file, [about, chart, message, command], **QUIET)
    actions: list[tuple[gr.Button, list[Any], Callable[..., list[str]]]] = [
        (convert, converted, convert_words), (bake, baked, bake_words), (merge, merged, merge_words),
    ]  # fmt: skip
    for button, fields, words in actions:
        button.click(
            lambda path, *values, words=words: begin(studio, lambda: words(studio, path, *values)), [file, *fields],
            [message, command], **QUIET,
        )  # fmt: skip

    def show(job: Job) -> list[Any]:
        if job.state != "done":
            return [gr.skip(), outcome(job), job.command]
        return [written(job.result), "", job.command]

    return Tab(KIND, [about, message, command], show, {})


def convert_fields() -> tuple[gr.Button, list[Any]]:
    with gr.Accordion("Convert", open=True, elem_id="files-convert-box"):
        layout = gr.Dropdown(list(LAYOUTS), value=next(iter(LAYOUTS)), label="For", elem_id="files-layout")
        with gr.Row():
            dtype = gr.Dropdown(["float32", "float16", "bfloat16"], value="float16", label="Precision")
            output = gr.Textbox(label="New file", placeholder="my-cat-kohya.safetensors", elem_id="files-output")
        button = gr.Button("Convert", elem_id="files-convert")
    return button, [layout, dtype, output]


def bake_fields() -> tuple[gr.Button, list[Any]]:
    with gr.Accordion("Bake forgetting into a file", open=False, elem_id="files-bake-box"):
        rules = [(f"{name}: {rule.description}", name) for name, rule in RULES.items() if name != "none"]
        rule = gr.Dropdown(rules, value="nodecoder", label="Forget")
        with gr.Row():
            share = gr.Slider(0, 1, 0.5, step=0.05, label="Share forgotten")
            strength = gr.Slider(0, 1.5, 1, step=0.05, label="Strength")
        output = gr.Textbox(label="New file", placeholder="my-cat-free.safetensors", elem_id="files-baked")
        button = gr.Button("Bake", elem_id="files-bake")
    return button, [rule, share, strength, output]


def merge_fields(studio: Studio) -> tuple[gr.Button, list[Any]]:
    with gr.Accordion("Merge with others", open=False):
        fields: list[Any] = [gr.Slider(-1, 2, 1, step=0.05, label="Weight of the one above")]
        for number in range(2, MOST + 1):
            with gr.Row():
                choice = adapter_choice(studio, f"files-merge-{number}", label=f"Adapter {number}")
                choice.value = None
                fields += [choice, gr.Slider(-1, 2, 1, step=0.05, label="Its weight")]
        fields += [gr.Number(0, label="Rank of the result", info="0: the sum of the ranks, exactly", precision=0),
                   gr.Textbox(label="New folder", placeholder="both", elem_id="files-merged")]  # fmt: skip
        button = gr.Button("Merge", elem_id="files-merge")
    return button, fields


def chosen(studio: Studio, path: str | None) -> str:
    if not path:
        raise UserError("there is no file: drop one, or choose one of the list")
    return str(studio.folder.existing(path))


def new(studio: Studio, output: str | None, what: str) -> Path:
    if not (output or "").strip():
        raise UserError(f"the new {what} has no name: write one")
    return studio.folder.inside(output or "")


def convert_words(studio: Studio, path: str, layout: str, dtype: str, output: str) -> list[str]:
    words = ["convert", chosen(studio, path), f"--to={LAYOUTS.get(layout, layout)}", f"--dtype={dtype}"]
    return [*words, *option("output", new(studio, output, "file"))]


def bake_words(studio: Studio, path: str, rule: str, share: float, strength: float, output: str) -> list[str]:
    forget = rule if share == 1 else f"{rule}={1 - share:g}"
    words = ["export", "lora", chosen(studio, path), f"--forget={forget}", f"--strength={strength:g}"]
    return [*words, *option("output", new(studio, output, "file"))]


def merge_words(studio: Studio, path: str, first: float, *others: Any) -> list[str]:
    *pairs, rank, output = others
    given = [(path, first), *((pairs[at], pairs[at + 1]) for at in range(0, len(pairs), 2) if pairs[at])]
    if len(given) < 2:
        raise UserError("a merge takes two adapters or more: choose another one")
    words = ["export", "merge", *(chosen(studio, one) for one, _ in given)]
    words += option("weights", *(f"{weight:g}" for _, weight in given)) + option("rank", int(rank) if rank else None)
    return [*words, *option("output", new(studio, output, "folder"))]


def begin(studio: Studio, make: Callable[[], list[str]]) -> tuple[str, Any]:
    """Put a conversion, an export or a merge into the queue: a message, and the command."""
    try:
        words = make()
        read(words)
    except UserError as error:
        return problem(error), gr.skip()

    def work(job: Job) -> Path:
        options, function = read(words)
        function(options)
        return Path(options.output)

    title = " ".join(word for word in words[:2] if not word.startswith("-")) if words[0] == "export" else words[0]
    job = studio.queue.submit(Job(KIND, title.capitalize(), work, command_line(words)))
    return "", job.command


def written(path: Path) -> str:
    """What was written, to download."""
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return facts({"Written and verified": str(path), "Files": links(files)})


def inspected(studio: Studio, path: str | None, page: str = "") -> Iterator[tuple[Any, ...]]:
    """What a file is, its chart, a message, and the command."""
    try:
        words = ["inspect", chosen(studio, path)]
        target = words[1]
        if Path(target).is_dir():  # an adapter's own folder holds the same LoRA in two layouts
            inner = sorted(visible(Path(target), "*.safetensors"), key=lambda one: one.name.startswith("source"))
            words[1] = str(inner[0]) if inner else target
        options, function = read(words)
    except UserError as error:
        yield gr.skip(), gr.skip(), problem(error), gr.skip()
        return

    def work(job: Job) -> Any:
        from personalize.formats.coverage import coverage_picture

        found = function(options)
        chart = coverage_picture(found.rows, Path(found.file).name) if getattr(found, "rows", None) else None
        return found, chart

    job = studio.queue.submit(Job("inspect", f"Inspecting {Path(target).name}", work, page=page))
    for waits in awaited(studio, job):
        yield gr.skip(), gr.skip(), waits, gr.skip()
    if job.state != "done":
        yield gr.skip(), gr.skip(), outcome(job), gr.skip()
        return
    found, chart = job.result
    yield description(found), gr.Image(value=chart, visible=chart is not None), "", command_line(words)


def description(found: Any) -> str:
    """An inspection as a table; of a folder of files, a line for each."""
    if isinstance(found, list):
        return facts({Path(one.file).name: str(one) for one in found})
    rows: dict[str, Any] = {
        "File": f"{Path(found.file).name}, {found.bytes / 1e6:.1f} MB", "Is": found.layout,
        "Base": f"{found.family or 'unknown'} ({found.family_by})", "Changes": counted(found.components),
        "Rank": ", ".join(found.ranks), "Alpha / rank": ", ".join(found.strengths),
        "Precision": ", ".join(found.dtypes),
        "Tokens": ", ".join(one["token"] for one in found.tokens), "Read by": reader_table(found.readers),
        "Problems": Markup("<br>".join(map(html.escape, found.problems))) if found.problems else "none found",
    }  # fmt: skip
    return facts({name: value for name, value in rows.items() if value})


def counted(components: Mapping[str, int]) -> str:
    return ", ".join(f"{count} modules of {name}" for name, count in components.items())
