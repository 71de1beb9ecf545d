"""The studio in a real Chromium: the whole job by clicks, wrong inputs, cancelling, two tabs, a reload, no request out.

    pip install '.[browser]' && apt-get install chromium && pytest -n 0 -m browser tests/studio

Screenshots are written to runs/studio/, or where STUDIO_SCREENSHOTS says.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.support.studio_pages import Page, changes, picture, same_command

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


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
    page.at("#learn-check").click()
    page.says("1 waiting: Checking what it will take")
    page.at("#cancel-waiting").click()
    page.at("#cancel-waiting").wait_for(state="hidden")
    page.at("#cancel").click()
    page.ready()
    page.says("Cancelled; nothing was written")
    assert not (folder / "my-cat" / "adapter.json").exists()


def test_the_cat_is_learned(page, folder):
    page.tab("Learn")
    if not page.page.locator("#learn-board canvas[aria-label^='cat.png']").is_visible():
        picture(page, "learn-pictures", "cat.png", "learn-board")
    page.open_more()
    page.at("#learn-check").click()
    page.says("as the base reads it")
    page.ready()
    page.fill("learn-samples", "16")  # after the check: a job that ends may restore what was given to it
    page.fill("learn-every", "2")
    page.has("learn-samples", "16")
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
    page.number("edit-steps", 3)
    page.pick("edit-dial-across", "alpha")
    page.fill("edit-values-across", "0.7, 1")
    page.pick("edit-dial-down", "beta")
    page.fill("edit-values-down", "0.8, 1.4")
    page.at("#edit-draw").click()
    page.at("#edit-sheet img").wait_for()
    page.shot("edit")
    entries = json.loads((folder / "studio" / "edit-001" / "edits.json").read_text())
    assert [(one["alpha"], one["beta"]) for one in entries] == [(0.7, 0.8), (0.7, 1.4), (1, 0.8), (1, 1.4)]
    shown = page.page.locator(".command textarea:visible, .command input:visible").first.input_value()
    own = np.asarray(Image.open(folder / "studio" / "edit-001" / "edit-003.png").convert("RGB"), np.int16)
    assert np.array_equal(own, same_command(folder, shown, "edit-003.png"))


def test_a_click_in_the_history_brings_settings_back_and_the_search_ranks_its_pictures(page, folder):
    page.fill("edit-prompt", "something else")
    page.page.locator("#edit-history button.thumbnail-item").nth(1).click()  # the second of the four
    page.has("edit-prompt", "a picture of a cat in the snow")
    page.has("edit-beta", "1.4")
    page.number("edit-budget", 4)
    page.at("#edit-choose").click()
    page.says("^Best")
    page.shot("edit-search")
    found = json.loads((folder / "studio" / "search-001" / "ranking.json").read_text())["pictures"]
    assert 2 <= len(found) <= 4 and [one["score"] for one in found] == sorted(one["score"] for one in found)[::-1]


def test_a_photo_is_edited_by_swapping_a_word(page, folder):
    page.tab("Photo")
    picture(page, "photo-picture", "beach.png", "photo-board")
    page.at("#photo-edit").click()
    page.says("say what the photo shows")
    page.fill("photo-source", "a picture of a cat on the beach")
    page.open_more()
    page.number("photo-steps", 5)
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
    page.open_more()
    page.fill("files-baked", "baked.safetensors")
    page.at("#files-bake").click()
    page.page.get_by_role("link", name="baked.safetensors").wait_for()
    page.choose("files-merge-2", "converted.safetensors")
    page.fill("files-merged", "both")
    page.at("#files-merge").click()
    page.page.get_by_role("link", name="both.safetensors").wait_for()
    cat, baked, both = (changes(folder / name) for name in ("converted.safetensors", "baked.safetensors", "both"))
    assert any(np.abs(cat[name] - baked.get(name, 0)).max() > 0 for name in cat), "half of the decoder is forgotten"
    for name, change in cat.items():  # the same twice, but that the converted file is in half precision
        np.testing.assert_allclose(both[name], 2 * change, atol=4e-3 * np.abs(change).max() + 1e-6)


def test_two_subjects_of_one_picture_are_brushed_and_learned(page, folder):
    page.tab("Learn")
    page.page.locator("#learn-pictures input").first.click()
    page.page.keyboard.press("Backspace")
    picture(page, "learn-pictures", "two.png", "learn-board")
    page.page.get_by_label("Several subjects of one picture").click()
    page.fill("learn-concepts", "<dog1> dog, <cat1> cat")
    page.fill("learn-caption", "a picture of a <cat1> cat and a <dog1> dog on grass")
    page.fill("learn-name", "two")
    page.open_more()
    page.fill("learn-samples", "16")
    page.number("learn-classes", 2)
    layers = page.at("#learn-board .pz-layer")
    for number, x in enumerate((0.73, 0.27)):
        layers.select_option(str(number))
        box = page.at("#learn-board canvas").bounding_box()
        page.page.mouse.move(box["x"] + box["width"] * (x - 0.1), box["y"] + box["height"] * 0.5)
        page.page.mouse.down()
        page.page.mouse.move(box["x"] + box["width"] * (x + 0.1), box["y"] + box["height"] * 0.5, steps=4)
        page.page.mouse.up()
    page.fill("learn-concepts", "<cat1> cat, <dog1> dog")  # in the other order: each keeps what was painted for it
    page.page.wait_for_function("document.querySelector('#learn-board .pz-layer').options[0].text.includes('cat')")
    page.at("#learn-start").click()
    page.page.locator("#learn-progress img.maps").wait_for()
    page.shot("learn-two")
    masks = [
        np.asarray(Image.open(path).convert("L")) > 127 for path in sorted(folder.glob("studio/masks-*/mask-*.png"))
    ]
    assert [round(float(mask.nonzero()[1].mean()) / 128, 1) for mask in masks[-2:]] == [0.3, 0.7]
    from personalize.adapters.adapter import Adapter

    assert set(Adapter.load(folder / "two").concepts) == {"<cat1>", "<dog1>"}


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
