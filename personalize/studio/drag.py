"""The tab Drag: points by clicks, the automatic mask, the preview of the warp, and the filling."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from personalize.errors import UserError
from personalize.io.json_files import read_json
from personalize.studio.actions import carry_out, command_line, option, read
from personalize.studio.jobs import Job
from personalize.studio.parts import (
    QUIET,
    Studio,
    Tab,
    address,
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
)

KIND = "drag"
MODES = {
    "Move it as a whole": "move",
    "Stretch it, each part as far as it belongs to the point": "deform",
    "Move, turn and scale it (two pairs or more)": "region",
}


# the points of the canvas as `read_points` reads them
WRITTEN = """drawn => { const p = (drawn && drawn.points) || [], pairs = [];
  for (let i = 0; i < p.length; i += 2) pairs.push(p.slice(i, i + 2).map((one) => one.join(",")).join(" > "));
  return pairs.join("; "); }"""


def build(studio: Studio) -> Tab:
    """Make the tab's components and wire them."""
    start = studio.start if studio.start in studio.folder.pictures() else None
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=240):
            message = message_box()
            picture = picture_choice(studio, "drag-picture", value=start)
            board = canvas("Picture and points", ["point", "paint"], key="drag-board", start=start)
            connect(studio, picture, board, message)
            points = gr.Textbox(
                label="Points", info="x,y > x,y in pixels; several pairs with ; between them",
                elem_id="drag-points",
            )  # fmt: skip
        with gr.Column(scale=5, min_width=240):
            preview = gr.Image(
                label="Preview, not filled yet", interactive=False, elem_id="drag-preview", buttons=["fullscreen"],
                format="png",
            )  # fmt: skip
            state = gr.HTML('<div class="quiet">Click what is to move, and where it is to go.</div>')
            mode = gr.Radio(list(MODES), value=next(iter(MODES)), label="How")
            prompt = gr.Textbox(label="What the picture shows", placeholder="May stay empty", elem_id="drag-prompt")
            with gr.Accordion("More", open=False):
                grow = gr.Slider(-20, 20, 0, step=1, label="Extend the mask, in pixels")
                steps = gr.Slider(4, 50, 10, step=1, label="Denoising steps")
                seed = gr.Number(42, label="Seed", precision=0)
            fill = gr.Button("Fill", variant="primary", elem_id="drag-fill")
    with gr.Column(visible=False) as done:
        result = gr.ImageSlider(label="Before and after", interactive=False, elem_id="drag-result", format="png")
        about = gr.HTML("")
    command = command_box()
    settings = [picture, prompt, mode, grow, steps, seed]
    wire(studio, board, points, [preview, board, state, message, command], settings, fill)

    def show(job: Job) -> list[Any]:
        if job.state != "done":
            return [gr.skip(), gr.skip(), gr.skip(), outcome(job), job.command]
        folder = job.result["folder"]
        before, after = existing(job.result["before"], folder / "dragged.png")
        return [gr.Column(visible=True), gr.ImageSlider(value=(before, after)), summary(folder), "", job.command]

    fields = {"picture": picture, "board": board, "points": points, "prompt": prompt, "mode": mode}
    return Tab(KIND, [done, result, about, message, command], show, fields)


def wire(
    studio: Studio, board: Any, points: Any, seen: list[Any], settings: list[Any], fill: gr.Button
) -> None:  # fmt: skip
    """Preview at every change of points, mask and settings; `seen` are the components that show it."""

    def see(request: gr.Request, drawn: dict[str, Any], *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from preview_of(studio, drawn, values, page_of(request))

    def see_typed(
        request: gr.Request, drawn: dict[str, Any], lines: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        if not (lines and values[0]):
            yield (gr.skip(),) * len(seen)
            return
        try:
            given = typed(studio, drawn, lines, values[0])
        except UserError as error:
            yield gr.skip(), gr.skip(), gr.skip(), problem(error), ""
            return
        drawing = gr.HTML(given={name: given[name] for name in ("picture", "points")})
        yield gr.skip(), drawing, gr.skip(), "", gr.skip()
        yield from preview_of(studio, given, values, page_of(request))

    prompt, mode, grow = settings[1:4]
    gr.on(
        [board.input, prompt.submit, prompt.blur, mode.change, grow.change], see, [board, *settings], seen,
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    gr.on([points.submit, board.load], see_typed, [board, points, *settings], seen, **QUIET)
    board.input(None, board, points, js=WRITTEN)  # in the browser, so that “Fill” finds the points of the last click
    _, _, _, message, command = seen
    fill.click(
        lambda drawn, lines, *values: start_fill(studio, drawn, lines, values), [board, points, *settings],
        [message, command], **QUIET,
    )  # fmt: skip


def read_points(lines: str) -> list[list[float]]:
    """ "10,20 > 40,20" and further lines → [[10, 20], [40, 20], …]; UserError for anything else."""
    found = []
    for line in filter(None, (part.strip() for part in re.split(r"[\n;]", lines or ""))):
        ends = [part.strip() for part in re.split(r">|→", line)]
        try:
            pair = [[float(number) for number in end.split(",")] for end in ends]
        except ValueError:
            pair = []
        if len(pair) != 2 or any(len(end) != 2 for end in pair):
            raise UserError(f"{line!r} is no pair of points: write x,y > x,y, for example 40,64 > 80,64")
        found += pair
    return found


def typed(studio: Studio, drawn: dict[str, Any] | None, lines: str, picture: str | None) -> dict[str, Any]:
    """What was drawn on the chosen picture, with the points in `lines` instead of its own."""
    points = read_points(lines)
    if not picture:
        return {"points": points}
    path = studio.folder.picture(picture)
    return {**drawn_on(drawn, path), "picture": address(path), "points": points}


def words_of(studio: Studio, drawn: dict[str, Any], values: tuple[Any, ...], *more: str) -> list[str]:
    """The command line of a drag.  UserError if there is no picture or no pair of points."""
    path, prompt, mode, grow, steps, seed = values
    if not path:
        raise UserError("there is no picture: drop one on the frame, or choose one of the list")
    picture = studio.folder.picture(path)
    drawn = drawn_on(drawn, picture)
    points = drawn.get("points") or []
    whole = points[: len(points) // 2 * 2]
    if not whole:
        raise UserError("there is no pair of points: click what is to move, then where it is to go")
    ends = [",".join(f"{value:g}" for value in point) for point in whole]
    mask = (drawn.get("masks") or [None])[0]
    return [
        "drag", str(picture), *option("from", *ends[::2]), *option("to", *ends[1::2]),
        *option("mask", studio.folder.keep_mask(mask) if mask else None), *option("prompt", prompt or None),
        *option("mode", MODES[mode] if MODES[mode] != "move" else None),
        *option("grow" if grow > 0 else "shrink", abs(int(grow)) or None),
        *option("num_inference_steps", int(steps) if steps != 10 else None),
        *option("seed", seed if seed != 42 else None),
        *studio.bench.base_words(), *more,
    ]  # fmt: skip


def preview_of(
    studio: Studio, drawn: dict[str, Any] | None, values: tuple[Any, ...], page: str = ""
) -> Iterator[tuple[Any, ...]]:
    """Preview, the picture with its mask, a line about it, a message, and the command."""
    drawn = drawn_on(drawn, Path(values[0])) if values[0] else {}
    if len(drawn.get("points") or []) < 2:
        yield None, gr.HTML(found=None), gr.skip(), "", ""
        return
    try:
        words = words_of(studio, drawn, values)
    except UserError as error:
        yield gr.skip(), gr.skip(), gr.skip(), problem(error), ""
        return

    def work(job: Job) -> Any:
        from personalize.cli.commands.drag import previewed

        options, _ = read(words)
        return previewed(options, studio.bench.editor_of(options))

    job = studio.queue.submit(Job("preview", "Preview of a drag", work, page=page))
    for waits in awaited(studio, job):
        yield gr.skip(), gr.skip(), waits, "", gr.skip()
    if job.state != "done":
        yield gr.skip(), gr.skip(), "", outcome(job), ""
        return
    found = job.result
    mask = data_url(found.mask)
    text = f'<div class="quiet">Moves {found.share:.0%} of the picture; previewed in {job.seconds:.2f} s.</div>'
    yield found.warped, gr.HTML(found=mask), text, "", command_line([*words, "--preview"])


def start_fill(studio: Studio, drawn: dict[str, Any] | None, lines: str, values: tuple[Any, ...]) -> tuple[str, Any]:
    """Put the drag of the points in `lines` into the queue."""
    try:
        drawn = typed(studio, drawn, lines, values[0])
        with studio.folder.folder_for("drag") as folder:
            words = words_of(studio, drawn, values, *option("output_dir", folder))
            read(words)
            picture = board_picture(studio.folder.picture(values[0]))
    except UserError as error:
        return problem(error), gr.skip()

    def work(job: Job) -> dict[str, Any]:
        carry_out(words, studio.bench, job)
        return {"folder": folder, "before": words[1]}

    board = gr.update(picture=picture, given={"picture": picture["url"], "points": drawn["points"]})
    inputs = {"picture": values[0], "board": board, "points": lines, "prompt": values[1], "mode": values[2]}
    job = studio.queue.submit(Job(KIND, f"Drag in {picture['name']}", work, command_line(words), inputs))
    return "", job.command


def summary(folder: Path) -> str:
    """Where the points arrived, in numbers, and the files."""
    values = read_json(folder / "drag.json")
    missed = ", ".join(f"{drag['missed_px']:g} px" for drag in values["drags"])
    rows = {
        "From the target": missed,
        "Moved": f"{values.get('share', 0):.1%} of the picture",
        "Time": f"{values['seconds']:.1f} s",
    }
    if values["notes"]:
        rows["Notes"] = "; ".join(values["notes"])
    return facts(rows | {"Files": links([folder / name for name in ("dragged.png", "mask.png", "overlay.png")])})
