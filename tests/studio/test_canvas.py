"""What is drawn on pictures, in a real Chromium."""

from __future__ import annotations

import re

import pytest

from tests.support.studio_pages import SLOW, Page, picture

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


def test_another_picture_begins_without_the_points_and_masks_of_the_one_before(browser, address):
    from playwright.sync_api import expect

    page = Page(browser, address)
    page.tab("Drag")
    picture(page, "drag-picture", "scene.png", "drag-board")
    page.page.locator("#drag-board button[data-tool=point]").click()
    canvas = page.at("#drag-board canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for x in (0.25, 0.75):
        canvas.click(position={"x": box["width"] * x, "y": box["height"] * 0.5})
    page.page.wait_for_function(
        "() => document.querySelector('#drag-points textarea, #drag-points input').value.includes(' > ')"
    )
    picture(page, "drag-picture", "two.png", "drag-board")
    page.has("drag-points", "")
    page.tab("Photo")
    picture(page, "photo-picture", "cat.png", "photo-board")
    page.at("#photo-board canvas").click()
    picture(page, "photo-picture", "beach.png", "photo-board")
    page.fill("photo-source", "a picture of a cat")
    page.fill("photo-target", "a picture of a dog")
    page.open_more()
    page.number("photo-steps", 4)
    page.at("#photo-edit").click()
    command = page.page.locator(".command textarea:visible, .command input:visible").first
    expect(command).to_have_value(re.compile("steps=4"), timeout=SLOW)  # not the edit before it
    shown = command.input_value()
    assert "beach.png" in shown and "--mask" not in shown
    page.context.close()
    assert page.outside == page.errors == []


def test_the_first_button_of_the_mouse_alone_sets_points(browser, address):
    """The right one set a point too, and behind the browser's menu that followed the mouse."""
    page = Page(browser, address)
    page.tab("Drag")
    picture(page, "drag-picture", "scene.png", "drag-board")
    canvas = page.at("#drag-board canvas")
    box = canvas.bounding_box()
    for button, x in (("right", 0.2), ("middle", 0.3), ("left", 0.5)):
        canvas.click(button=button, position={"x": box["width"] * x, "y": box["height"] * 0.5})
    page.page.wait_for_function(
        "() => document.querySelector('#drag-points textarea, #drag-points input').value !== ''"
    )
    written = page.at("#drag-points textarea, #drag-points input").input_value()
    assert abs(int(written.split(",")[0]) - 64) <= 1 and ">" not in written
    page.context.close()
    assert page.outside == page.errors == []
