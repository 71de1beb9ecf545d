"""Parts that several tabs are made of: the picture with its tools, messages, and the command line."""

from __future__ import annotations

import html
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from personalize.errors import UserError
from personalize.studio.actions import Workbench
from personalize.studio.folder import Folder
from personalize.studio.jobs import Job, JobQueue
from personalize.studio.viewing import png_for_browsers

HERE = Path(__file__).parent
# of an event: no bar over its outputs, and it waits for no other
QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
PATIENCE = 0.25  # seconds between two looks at a job that a page waits for


@dataclass
class Studio:
    """What all tabs share.  start: the adapter or picture named on the command line."""

    folder: Folder
    queue: JobQueue
    bench: Workbench
    start: str | None = None
    warmed: bool = False


@dataclass
class Tab:
    """A tab, as the page needs it.

    outputs: the components that show a job, the last two its message and its command.  show: their values for it.
    fields: what is restored from `Job.inputs`.
    """

    kind: str
    outputs: list[Any]
    show: Callable[[Job], Sequence[Any]]
    fields: Mapping[str, Any]


def text(name: str) -> str:
    """The text of a file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def canvas(
    label: str, tools: Sequence[str], *, layers: Sequence[str] = ("mask",), many: bool = False, key: str,
    start: str | None = None,
) -> gr.HTML:  # fmt: skip
    """A picture on which points are set and masks painted, in the beginning the picture `start`; see canvas.js."""
    markup = text("canvas.html").replace("TOOLS", " ".join(tools)).replace("MANY", str(many).lower())
    return gr.HTML(
        {}, label=label, html_template=markup, css_template=text("canvas.css"),
        js_on_load=text("canvas.js"), apply_default_css=False, layers=list(layers),
        picture=board_picture(Path(start)) if start else None, found=None, given=None, elem_id=key,
    )  # fmt: skip


def picture_choice(studio: Studio, key: str, *, value: str | None = None, label: str = "Picture") -> gr.Dropdown:
    """The list of the folder's pictures."""
    return gr.Dropdown(
        studio.folder.pictures(), value=value, label=label, allow_custom_value=True,
        info="In this folder; or drop one on the frame below", elem_id=key,
    )  # fmt: skip


def connect(studio: Studio, choice: gr.Dropdown, board: gr.HTML, message: gr.HTML) -> None:
    """What is chosen in `choice`, or dropped on `board`, is shown on the board."""

    def take(drawn: dict[str, Any]) -> tuple[Any, Any]:
        try:
            kept = [str(studio.folder.keep_upload(sent)) for sent in drawn.get("sent", [])][-1]
        except UserError as error:
            return gr.skip(), problem(error)
        return gr.Dropdown(choices=studio.folder.pictures(), value=kept), ""

    def show(path: str | None) -> tuple[Any, Any]:
        if not path:
            return gr.skip(), ""
        try:
            return gr.HTML(picture=board_picture(studio.folder.picture(path)), found=None), ""
        except UserError as error:
            return gr.skip(), problem(error)

    board.upload(take, board, [choice, message], show_progress="hidden")
    gr.on([choice.change, board.load], show, choice, [board, message], show_progress="hidden", queue=False)
    refresh(choice, studio.folder.pictures)


def refresh(choice: gr.Dropdown, known: Callable[[], list[str]]) -> None:
    """Read the folder again whenever the list is opened."""
    choice.focus(lambda: gr.Dropdown(choices=known()), None, choice, show_progress="hidden", queue=False)


def adapter_choice(studio: Studio, key: str, *, label: str = "Adapter") -> gr.Dropdown:
    """The list of the folder's adapters."""
    known = studio.folder.adapter_files()
    value = studio.start if studio.start in known else next(iter(studio.folder.adapters()), None)
    choice = gr.Dropdown(
        known, value=value, label=label, allow_custom_value=True, info="A folder or file in this folder", elem_id=key
    )
    refresh(choice, studio.folder.adapter_files)
    return choice


def board_picture(path: Path) -> dict[str, str]:
    """What a canvas needs of a picture file: its address and its name."""
    return {"url": address(path), "name": path.name}


def address(path: str | Path) -> str:
    """The address of a file in the folder; it changes with the file."""
    changed = Path(path).stat().st_mtime_ns if Path(path).exists() else 0
    return f"/file/{quote(Path(path).as_posix())}?{changed}"


def drawn_on(drawn: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    """What a canvas says, if that was drawn on the picture `path`: points and masks of another one are left out."""
    drawn = dict(drawn or {})
    same = str(drawn.get("picture") or "").partition("?")[0] == address(path).partition("?")[0]
    return drawn if same else {}


def data_url(picture: Image.Image) -> str:
    """A picture as an address that holds it."""
    stream = BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"


def command_box() -> gr.Textbox:
    return gr.Textbox(
        label="The command that does the same", interactive=False, lines=1, max_lines=6, buttons=["copy"],
        elem_classes=["command"],
    )  # fmt: skip


def message_box() -> gr.HTML:
    return gr.HTML("", elem_classes=["message"])


def problem(error: UserError | str) -> str:
    """One line about what is wrong."""
    return f'<div class="problem" role="alert">{html.escape(str(error))}</div>' if str(error) else ""


def facts(rows: Mapping[str, Any]) -> str:
    """A table of names and values; a value may be HTML if it is `Markup`."""
    cells = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in rows.items()
    )
    return f'<div class="facts"><table>{cells}</table></div>' if rows else ""


class Markup(str):
    """Text that is HTML already."""


def _cell(value: Any) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value))


def links(paths: Sequence[Path]) -> Markup:
    """Files of the folder to download."""
    return Markup(" · ".join(f'<a href="{address(path)}" download>{html.escape(path.name)}</a>' for path in paths))


def strip(pictures: Sequence[tuple[str | Path, str]]) -> str:
    """Pictures of the folder side by side, with a line below each."""
    figures = "".join(
        f'<figure><img src="{address(path)}" alt="{html.escape(name)}"><figcaption>{html.escape(name)}</figcaption>'
        "</figure>"
        for path, name in pictures
    )
    return f'<div class="strip">{figures}</div>' if figures else ""


def existing(*paths: str | Path) -> tuple[str | Image.Image, ...]:
    """Pictures that a page is to show, as a browser can.  UserError if one is gone: Gradio would show nothing then."""
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path} is gone, it was moved or removed: the picture is not shown")
    drawn = [png_for_browsers(Path(path)) for path in paths]
    return tuple(str(path) if png is None else Image.open(BytesIO(png)) for path, png in zip(paths, drawn, strict=True))


def page_of(request: gr.Request | None) -> str:
    """What tells one open page from another."""
    return str(request.session_hash) if request is not None else ""


def outcome(job: Job) -> str:
    """The message of a job that has ended: its error, or that it was cancelled."""
    if job.state == "failed":
        return problem(job.error)
    return '<div class="quiet">Cancelled; nothing was written.</div>' if job.state == "cancelled" else ""


def awaited(studio: Studio, job: Job) -> Iterator[str]:
    """Wait until `job` has ended, saying meanwhile what it waits for."""
    began = time.monotonic()
    while not job.ended.wait(PATIENCE):
        running = studio.queue.running
        if running is not None and running is not job and time.monotonic() - began > 1:
            place = studio.queue.position(job)
            yield f'<div class="quiet">Waits for “{html.escape(running.title)}”; {place} before this one.</div>'
