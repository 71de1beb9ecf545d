"""The page: the tabs, and above them what is being done."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

from personalize.errors import UserError
from personalize.io.json_files import SURROGATE
from personalize.studio import drag, edit, files, learn, photo
from personalize.studio.jobs import Job
from personalize.studio.parts import Studio, Tab, problem, text

TICK = 0.5  # seconds between two looks at the queue


def theme() -> gr.themes.Base:
    """One accent colour, and fonts that every machine has: nothing is loaded from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="stone", radius_size="lg", spacing_size="md",
        font=[gr.themes.Font(name) for name in ("system-ui", "-apple-system", "Segoe UI", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "Menlo", "Consolas", "monospace")],
    ).set(button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_600",
          button_primary_text_color="white", block_shadow="none", block_label_text_size="*text_sm")  # fmt: skip


def build(studio: Studio) -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(
        title="Personalize studio", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        head(studio)
        with gr.Row(equal_height=True):
            now = gr.HTML(status(studio), elem_id="now", scale=9, min_width=240)
            cancel = gr.Button("Cancel", scale=1, min_width=100, elem_id="cancel", visible=False)
            empty = gr.Button("Cancel waiting", scale=1, min_width=100, elem_id="cancel-waiting", visible=False)
        made: list[Tab] = []
        with gr.Tabs(elem_id="tabs"):
            for name, module in TABS.items():
                with gr.Tab(name, id=name.lower(), render_children=True):
                    made.append(module.build(studio))
        seen = gr.State({})
        outputs = [seen, now, cancel, empty, *(component for tab in made for component in tab.outputs)]
        look: dict[str, Any] = {"outputs": outputs, "show_progress": "hidden", "queue": False}
        timer = gr.Timer(TICK)
        timer.tick(lambda before: tick(studio, made, before), seen, **look)
        page.load(lambda: tick(studio, made, {}), None, **look).then(lambda: warm(studio), None, None, queue=False)
        fields = [component for tab in made for component in tab.fields.values()]
        page.load(lambda: restored(studio, made), None, fields, show_progress="hidden", queue=False)
        cancel.click(lambda: studio.queue.cancel(), None, None, queue=False)
        empty.click(lambda: studio.queue.cancel_waiting(), None, None, queue=False)
    return page


def warm(studio: Studio) -> None:
    """Load the base model behind the first page."""
    if not studio.warmed:
        studio.warmed = True
        work = lambda job: studio.bench.editor(studio.bench.base, (), inpainting=True) and None  # noqa: E731
        studio.queue.submit(Job("base", "Loading the base model", work))


def head(studio: Studio) -> None:
    """The title, and where files go."""
    where = html.escape(SURROGATE.sub("\ufffd", str(studio.folder.root)))  # bytes that are no UTF-8
    gr.HTML(f'<div id="head"><h1>Personalize</h1><span>everything stays in {where}</span></div>')


def tick(studio: Studio, tabs: list[Tab], before: dict[str, Any]) -> list[Any]:
    """What has changed since `before`, which maps parts of the page to what they showed."""
    line, running, waiting = status(studio), studio.queue.running is not None, bool(studio.queue.waiting())
    now: dict[str, Any] = {"line": line, "running": running, "waiting": waiting}
    values: list[Any] = [line if before.get("line") != line else gr.skip()]
    values.append(gr.Button(visible=running) if before.get("running") != running else gr.skip())
    values.append(gr.Button(visible=waiting) if before.get("waiting") != waiting else gr.skip())
    for tab in tabs:
        job = studio.queue.latest(tab.kind)
        now[tab.kind] = job and (job.number, job.version)
        if job is None or before.get(tab.kind) == now[tab.kind]:
            values += [gr.skip()] * len(tab.outputs)
        else:
            values += shown_result(tab, job)
    return [now if now != before else gr.skip(), *values]


def shown_result(tab: Tab, job: Job) -> Sequence[Any]:
    """What `tab` shows of `job`; a line if its files are gone, so that all else on the page is still shown."""
    try:
        return tab.show(job)
    except (UserError, OSError) as error:
        return [*[gr.skip()] * (len(tab.outputs) - 2), problem(str(error)), job.command]


def restored(studio: Studio, tabs: list[Tab]) -> list[Any]:
    """The fields of every tab as they were for its latest job, for a page that is loaded again."""
    values = []
    for tab in tabs:
        job = studio.queue.latest(tab.kind)
        kept = {} if job is None else job.inputs
        values += [kept[name] if name in kept else gr.skip() for name in tab.fields]
    return values


def status(studio: Studio) -> str:
    """The job that runs, with its time left, and those that wait."""
    job, waiting = studio.queue.running, studio.queue.waiting()
    if job is None:
        return '<div role="status"><span class="quiet">Ready. One thing is done at a time.</span></div>'
    share, left = job.share, job.seconds_left
    detail = [f"{one.name} {one.finished} of {one.total}" if one.total else one.name for one in list(job.levels)[:2]]
    detail += [] if left is None else [f"{duration(left)} left"]
    if job.cancelling:
        detail = ["ends at the next step"]
    if waiting:
        detail.append(f"{len(waiting)} waiting: {', '.join(one.title for one in waiting[:3])}")
    rest = html.escape(" · ".join(filter(None, detail)))
    bar = f'<div class="bar" aria-hidden="true"><i style="width:{share:.1%}"></i></div>'
    return f'<div role="status"><b>{html.escape(job.title)}</b> <small>{rest}</small>{bar}</div>'


def duration(seconds: float) -> str:
    """ "45 s", "3 min"."""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


TABS = {"Learn": learn, "Edit": edit, "Photo": photo, "Drag": drag, "Files": files}
CSS = text("studio.css")
