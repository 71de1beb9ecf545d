"""A page of the studio in a real browser, and what is compared with it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.foreign_files import delta, modules

ROOT = Path(__file__).parents[2]
SHOTS = Path(os.environ.get("STUDIO_SCREENSHOTS", ROOT / "runs" / "studio"))
CHROMIUM = os.environ.get("PLAYWRIGHT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SLOW = 240_000  # ms: an action may wait for the model on a busy machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "2"} | os.environ | {"PYTHONPATH": str(ROOT)}


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
        self.page.wait_for_timeout(300)  # until the list has filtered: a key that comes before takes another entry
        field.press("Enter")

    def pick(self, name, text):
        """Choose an entry of a closed list by a click on it: a key may come before the list has filtered."""
        self.page.locator(f"#{name} input").first.click()
        self.page.locator(f"#{name}").get_by_role("option", name=text, exact=True).click()

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


def changes(path):
    """ΔW by module of the adapter at `path`."""
    from personalize.adapters.adapter import Adapter

    adapter = Adapter.load(path)
    return {name: delta(a, b, adapter.alpha / adapter.rank).numpy() for name, (a, b) in modules(adapter.lora).items()}


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
