"""A studio without a page; and one that runs, a browser, and a page in it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from threading import Event

import pytest
from PIL import Image

from tests.support.studio_pages import CHROMIUM, ROOT, Page, environment, free_port

PICTURES = ROOT / "examples" / "pictures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A start folder with the pictures, and a scene whose object is dragged."""
    from personalize.embedded.scenes import Scene, SceneObject, render

    place = tmp_path_factory.mktemp("start")
    for name in ("cat.png", "cat.txt", "beach.png"):
        shutil.copy(PICTURES / name, place)
    before = Scene("grass", (SceneObject("apple", "3d", 0.32, 0.5, 0.36),))
    Image.fromarray(render(before, 128)[0]).save(place / "scene.png")
    two = Scene("grass", (SceneObject("cat", "3d", 0.27, 0.5, 0.36), SceneObject("dog", "3d", 0.73, 0.5, 0.36)))
    Image.fromarray(render(two, 128)[0]).save(place / "two.png")
    (place / "notes.txt").write_text("no picture")
    return place


@pytest.fixture(scope="module")
def address(folder):
    """A running studio; how long it took to answer is in `started`."""
    pytest.importorskip("gradio")
    port = free_port()
    words = [sys.executable, "-m", "personalize", "studio", "--no_open", "--port", str(port)]
    with open(folder.parent / "studio.log", "w") as log:
        server = subprocess.Popen(words, cwd=folder, env=environment(), stdout=log, stderr=log)
        began = time.monotonic()
        while time.monotonic() - began < 120:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, (folder.parent / "studio.log").read_text()
                time.sleep(0.05)
        print(f"\nstart to page: {time.monotonic() - began:.1f} s")
        yield f"http://127.0.0.1:{port}/"
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser(address):
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(browser, address):
    made = Page(browser, address)
    yield made
    assert made.outside == [], "requests to another host"
    assert made.errors == []


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A studio whose queue is busy, so that what is submitted waits."""
    pytest.importorskip("gradio")
    from personalize.studio.actions import Workbench
    from personalize.studio.folder import Folder
    from personalize.studio.jobs import Job, JobQueue
    from personalize.studio.parts import Studio

    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "beach.png"):
        shutil.copy(PICTURES / name, tmp_path)
    made = Studio(Folder(tmp_path), JobQueue(), Workbench(None))
    go_on = Event()
    made.queue.submit(Job("other", "other", lambda job: go_on.wait(60)))
    yield made
    made.queue.cancel_waiting()
    go_on.set()
