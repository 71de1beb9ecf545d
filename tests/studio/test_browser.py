"""The studio in a real Chromium: the whole job by clicks, wrong inputs, cancelling, two tabs, a reload, no request out.

    pip install '.[browser]' && apt-get install chromium && pytest -n 0 -m browser tests/studio

Screenshots are written to runs/studio/, or where STUDIO_SCREENSHOTS says.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples" / "pictures"
SHOTS = Path(os.environ.get("STUDIO_SCREENSHOTS", ROOT / "runs" / "studio"))
CHROMIUM = os.environ.get("PLAYWRIGHT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SLOW = 240_000  # ms: an action may wait for the model on a busy machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A start folder with the pictures, and a scene whose object is dragged."""
    from personalize.embedded.scenes import Scene, SceneObject, render

    place = tmp_path_factory.mktemp("start")
    for name in ("cat.png", "cat.txt", "beach.png"):
        shutil.copy(PICTURES / name, place)
    before = Scene("grass", (SceneObject("apple", "3d", 0.32, 0.5, 0.36),))
    Image.fromarray(render(before, 128)[0]).save(place / "scene.png")
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


class Page:
    """A page of the studio that records and blocks every request to another host, and every error of its scripts."""

    def __init__(self, browser, address, **settings):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | settings)
        self.outside, self.errors = [], []
        self.context.route("**/*", self._gate(address))
        self.page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: "js_on_load" in line.text and self.errors.append(line.text))
        self.page.goto(address)
        self.at("#now").wait_for()

    def _gate(self, address):
        def gate(route):
            if route.request.url.startswith(address):
                route.continue_()
            else:
                self.outside.append(route.request.url)
                route.abort()

        return gate

    def at(self, selector):
        return self.page.locator(selector).first

    def field(self, name):
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def tab(self, name):
        """Open a tab; a narrow page has those that do not fit in a menu, once it is laid out."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        menu = self.at("#tabs .overflow-menu > button")
        tab.or_(menu).locator("visible=true").first.wait_for()
        self.page.wait_for_timeout(400)
        if tab.is_visible():
            tab.click()
        else:
            menu.click()
            self.page.locator("#tabs .overflow-dropdown button", has_text=name).first.click()

    def has(self, name, text):
        """Wait until a field holds `text`."""
        for _ in range(200):
            if self.field(name).input_value() == text:
                return
            self.page.wait_for_timeout(100)
        assert self.field(name).input_value() == text

    def fill(self, name, text):
        field = self.field(name)
        field.fill(text)
        field.press("Tab")

    def choose(self, name, text):
        field = self.page.locator(f"#{name} input").first
        field.click()
        field.fill(text)
        field.press("Enter")

    def number(self, name, value):
        field = self.page.locator(f"#{name} input[type=number]").first
        field.fill(str(value))
        field.press("Tab")

    def open_more(self):
        for button in self.page.locator("button.label-wrap").all():
            if button.is_visible() and "open" not in (button.get_attribute("class") or "").split():
                button.click()

    def says(self, text):
        self.page.get_by_text(re.compile(text)).locator("visible=true").first.wait_for()

    def ready(self):
        self.at("#now").get_by_text("Ready").wait_for()

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def page(browser, address):
    made = Page(browser, address)
    yield made
    assert made.outside == [], "requests to another host"
    assert made.errors == []


def picture(page, field, name, board):
    page.choose(field, name)
    page.page.locator(f"#{board} canvas[aria-label^='{name}']").wait_for()


def same_command(folder, shown, name):
    """The pixels of the file `name` that the command line `shown` by the page writes, in another process."""
    words = shlex.split(shown)
    words = [word for word in words if not word.startswith("--output_dir")]
    out = folder.parent / f"again-{name}"
    done = subprocess.run(
        [sys.executable, "-m", *words, f"--output_dir={out}"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(out / name).convert("RGB"), np.int16)


def test_a_drag_moves_the_object_of_a_scene(page, folder):
    from personalize.embedded.scenes import Scene, SceneObject, render

    page.tab("Drag")
    picture(page, "drag-picture", "scene.png", "drag-board")
    canvas = page.at("#drag-board canvas")
    box = canvas.bounding_box()
    for x in (0.32, 0.66):  # on the apple, and where it is to go
        canvas.click(position={"x": box["width"] * x, "y": box["height"] * 0.5})
    page.at("#drag-preview img").wait_for()
    page.says("previewed in")
    again = page.at("#drag-board canvas").bounding_box()  # once more, with the picture read: within a second
    page.page.mouse.move(again["x"] + again["width"] * 0.66, again["y"] + again["height"] * 0.5)
    page.page.mouse.down()
    page.page.mouse.move(again["x"] + again["width"] * 0.68, again["y"] + again["height"] * 0.5)
    page.page.mouse.up()
    page.ready()
    text = page.page.get_by_text("previewed in").inner_text()
    print(text)
    page.at("#drag-fill").click()
    page.at("#drag-result img").wait_for()
    page.shot("drag")
    dragged = np.asarray(Image.open(folder / "studio" / "drag-001" / "dragged.png").convert("RGB"), np.int16)
    start = np.asarray(Image.open(folder / "scene.png"), np.int16)
    drags = json.loads((folder / "studio" / "drag-001" / "drag.json").read_text())["drags"][0]
    moved = (drags["to"][0] - drags["from"][0]) / 128
    after = Scene("grass", (SceneObject("apple", "3d", 0.32 + moved, 0.5, 0.36),))
    truth, masks = (np.asarray(one) for one in render(after, 128))
    there = masks[0] > 0.5
    error = np.abs(dragged - truth.astype(np.int16))[there].mean()
    before = np.abs(start - truth.astype(np.int16))[there].mean()
    assert error < before / 3, f"where the object is to be: {error:.1f} of 255 from the true scene, {before:.1f} before"


def test_the_command_shown_draws_the_same_drag(page, folder):
    shown = page.page.locator(".command textarea:visible, .command input:visible").first.input_value()
    assert shown.startswith("personalize drag scene.png --from=")
    own = np.asarray(Image.open(folder / "studio" / "drag-001" / "dragged.png").convert("RGB"), np.int16)
    assert np.array_equal(own, same_command(folder, shown, "dragged.png"))


def test_points_outside_and_no_points_are_one_line(page):
    page.fill("drag-points", "10,10 > 400,10")
    page.at("#drag-fill").click()
    page.says("target 400,10 is outside the picture")
    page.fill("drag-points", "ten > twenty")
    page.at("#drag-fill").click()
    page.says("no pair of points: write x,y > x,y")
    page.fill("drag-points", "")
    page.at("#drag-fill").click()
    page.says("there is no pair of points")


def test_a_text_file_as_picture_and_a_path_outside_are_one_line(page, folder):
    page.page.locator("#drag-board input[type=file]").set_input_files(folder / "notes.txt")
    page.says("notes.txt is not a picture")
    for path in ("../secret.png", "/etc/passwd"):
        page.choose("drag-picture", path)
        page.says("is outside the folder of the studio")


def test_learning_can_be_cancelled_reloaded_and_seen_from_a_second_tab(page, browser, address, folder):
    page.tab("Learn")
    page.at("#learn-start").click()
    page.says("there is no picture")
    picture(page, "learn-pictures", "cat.png", "learn-board")
    page.open_more()
    page.fill("learn-samples", "400")
    page.fill("learn-every", "100")
    page.at("#learn-start").click()
    page.at("#learn-progress .curve").wait_for()
    second = Page(browser, address)
    second.says("Learning cat.png")
    second.context.close()
    page.page.reload()
    page.at("#learn-progress .curve").wait_for()
    page.has("learn-caption", "a picture of a cat on a blue background")
    page.shot("learn-running")
    page.at("#cancel").click()
    page.ready()
    page.says("Cancelled; nothing was written")
    assert not (folder / "my-cat" / "adapter.json").exists()


def test_the_cat_is_learned(page, folder):
    page.tab("Learn")
    if not page.page.locator("#learn-board canvas[aria-label^='cat.png']").is_visible():
        picture(page, "learn-pictures", "cat.png", "learn-board")
    page.open_more()
    page.fill("learn-samples", "24")
    page.fill("learn-every", "3")
    page.at("#learn-check").click()
    page.says("as the base reads it")
    page.at("#learn-start").click()
    page.says("saved and verified")
    page.shot("learn")
    assert (folder / "my-cat" / "my-cat.safetensors").is_file()
    assert page.page.locator("#learn-progress .strip img").count() >= 3
    page.says("ComfyUI")


def test_it_is_edited_with_two_dials(page, folder):
    page.tab("Edit")
    page.choose("edit-adapter", "my-cat")
    page.at("#edit-draw").click()
    page.says("the prompt is empty")
    page.open_more()
    page.fill("edit-prompt", "a picture of a cat in the snow")
    page.number("edit-steps", 6)
    page.choose("edit-dial-across", "alpha")
    page.fill("edit-values-across", "0.7, 1")
    page.choose("edit-dial-down", "beta")
    page.fill("edit-values-down", "0.8, 1.4")
    page.at("#edit-draw").click()
    page.at("#edit-sheet img").wait_for()
    page.shot("edit")
    entries = json.loads((folder / "studio" / "edit-001" / "edits.json").read_text())
    assert [(one["alpha"], one["beta"]) for one in entries] == [(0.7, 0.8), (0.7, 1.4), (1, 0.8), (1, 1.4)]
    shown = page.page.locator(".command textarea:visible, .command input:visible").first.input_value()
    own = np.asarray(Image.open(folder / "studio" / "edit-001" / "edit-003.png").convert("RGB"), np.int16)
    assert np.array_equal(own, same_command(folder, shown, "edit-003.png"))


def test_a_photo_is_edited_by_swapping_a_word(page, folder):
    page.tab("Photo")
    picture(page, "photo-picture", "beach.png", "photo-board")
    page.at("#photo-edit").click()
    page.says("say what the photo shows")
    page.fill("photo-source", "a picture of a cat on the beach")
    page.open_more()
    page.number("photo-steps", 10)
    page.at("#photo-read").click()
    page.at("#photo-chips button[data-word=cat]").click()
    swap = page.at("#photo-chips .wd-swap")
    swap.fill("dog")
    swap.press("Enter")
    page.at("#photo-edit").click()
    page.at("#photo-result img").wait_for()
    page.shot("photo")
    record = json.loads((folder / "studio" / "photo" / "edit.json").read_text())
    assert record["target"] == "a picture of a dog on the beach"
    shown = page.page.locator(".command textarea:visible, .command input:visible").first.input_value()
    own = np.asarray(Image.open(folder / "studio" / "photo" / "edited.png").convert("RGB"), np.int16)
    assert np.array_equal(own, same_command(folder, shown, "edited.png"))


def test_a_file_is_inspected_and_converted(page, folder):
    page.tab("Files")
    page.choose("files-file", "my-cat")
    page.at("#files-inspect").click()
    page.says("Read by")
    page.shot("files")
    page.fill("files-output", "converted.safetensors")
    page.at("#files-convert").click()
    page.says("Written and verified")
    assert (folder / "converted.safetensors").is_file()
    page.at("#files-convert").click()
    page.says("exists already")


@pytest.mark.parametrize(("width", "scheme"), [(1920, "dark"), (390, "light"), (390, "dark")])
def test_nothing_overlaps_or_sticks_out_at_any_width(browser, address, width, scheme):
    page = Page(browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    for name in ("Learn", "Edit", "Photo", "Drag", "Files"):
        page.tab(name)
        page.page.wait_for_timeout(400)
        page.shot(f"{name.lower()}-{width}-{scheme}")
        wide = page.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"the tab {name} is {wide} px wide"
    assert page.outside == [] and page.errors == []
    page.context.close()
