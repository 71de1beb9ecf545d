"""`personalize studio`: the page on this machine's own address."""

from __future__ import annotations

import os
import socket
import webbrowser
from pathlib import Path
from secrets import token_urlsafe
from threading import Timer
from typing import TYPE_CHECKING, Any

from personalize.errors import UserError
from personalize.io.image_metadata import IMAGE_SUFFIXES
from personalize.studio.folder import OUTPUT, Folder
from personalize.studio.guard import LOOPBACK, Guard
from personalize.studio.viewing import png_for_browsers

if TYPE_CHECKING:
    from personalize.cli.options import StudioConfig

LARGEST_UPLOAD = 500_000_000  # bytes
PORTS = range(7860, 7880)  # tried in this order, if none is asked for


def run(config: StudioConfig) -> None:
    """Serve the page until Ctrl-C.  UserError if the address cannot be used."""
    import uvicorn

    folder = Folder(Path.cwd())
    start = None if config.start is None else str(folder.existing(inside_start(folder, config.start)))
    listener, port = listening_socket(config.host, config.port)
    token = token_urlsafe(24) if config.host not in LOOPBACK and config.auth is None else None
    application = guarded(build(folder, config.base, start), config, token)
    address = address_of(config.host, port) + (f"?token={token}" if token else "")
    print(f"Studio: {address}\nFolder: {folder.root}, results in {OUTPUT}/\nCtrl-C ends it.", flush=True)
    if config.open:
        Timer(1, webbrowser.open, (address,)).start()
    settings = uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=1)
    uvicorn.Server(settings).run(sockets=[listener])


def address_of(host: str, port: int) -> str:
    """The page's address in a browser; one of IPv6 stands in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host.replace('localhost', '127.0.0.1')}:{port}/"


def inside_start(folder: Folder, path: Path) -> Path:
    """A path of the command line, relative to the folder.  UserError if it lies elsewhere."""
    if not path.resolve().is_relative_to(folder.root):
        raise UserError(
            f"{path} is not in {folder.root}: the studio keeps to the folder it is started in, so start it there"
        )
    return path.resolve().relative_to(folder.root)


def build(folder: Folder, base: str | None = None, start: str | None = None) -> Any:
    """The application with the page, without a guard."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder.uploads)  # what is sent stays in the folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    from fastapi import FastAPI

    from personalize.studio import page
    from personalize.studio.actions import Workbench
    from personalize.studio.jobs import JobQueue
    from personalize.studio.parts import Studio

    studio = Studio(folder, JobQueue(), Workbench(base), start)
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    application.state.studio = studio
    add_files(application, folder)
    return gr.mount_gradio_app(
        application, page.build(studio), path="/", theme=page.theme(), css=page.CSS, ssr_mode=False,
        max_file_size=LARGEST_UPLOAD, footer_links=[], enable_monitoring=False, pwa=False, mcp_server=False,
    )  # fmt: skip


def add_files(application: Any, folder: Folder) -> None:
    """Serve the files of the folder under /file/: pictures to look at, others to download: they may hold scripts.

    What a page shows as a picture, by the header Accept, is one that its browser shows as it is read here.
    """
    from fastapi import Header
    from fastapi.responses import FileResponse, PlainTextResponse, Response

    @application.get("/file/{path:path}")
    def file(path: str, accept: str = Header("")) -> Any:
        try:
            found = folder.root / folder.existing(path)
        except UserError as error:
            return PlainTextResponse(str(error), status_code=404)
        if not found.is_file():
            return PlainTextResponse(f"{path} is no file", status_code=404)
        drawn = png_for_browsers(found) if accept.startswith("image/") else None
        if drawn is not None:
            return Response(drawn, media_type="image/png")
        name = None if found.suffix.lower() in IMAGE_SUFFIXES else found.name
        return FileResponse(found, filename=name, headers={"x-content-type-options": "nosniff"})


def guarded(application: Any, config: StudioConfig, token: str | None) -> Guard:
    """The application behind its guard: on loopback by name, elsewhere by password or token."""
    hosts = set(LOOPBACK) if config.host in LOOPBACK else None
    return Guard(application, hosts=hosts, password=config.auth, token=token, largest_upload=LARGEST_UPLOAD)


def listening_socket(host: str, port: int | None) -> tuple[socket.socket, int]:
    """A socket at the port, or at the first free one of `PORTS`.  UserError if there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason = ""
    for number in PORTS if port is None else (port,):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            return listener, listener.getsockname()[1]
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
    asked = f"{host}:{port}" if port is not None else f"{host}:{PORTS[0]} to {PORTS[-1]}"
    raise UserError(f"the studio cannot listen at {asked}, {reason}: name another --port, or --host")
