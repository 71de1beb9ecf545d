"""What the studio shows of files: served to a browser, in the history, and gone meanwhile, without a browser."""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from personalize.io.image_files import load_image
from personalize.studio.jobs import Job
from personalize.studio.server import add_files, address_of

gr = pytest.importorskip("gradio")

from fastapi import FastAPI  # noqa: E402

from personalize.studio import drag, edit, edit_pictures, page  # noqa: E402
from personalize.studio.parts import existing  # noqa: E402


def test_files_that_may_hold_scripts_are_downloads(studio, tmp_path):
    from starlette.testclient import TestClient

    for name in ("page.html", "x.svg", "read.me"):
        (tmp_path / name).write_text("<script>alert(1)</script>")
    (tmp_path / "folder").mkdir()
    application = FastAPI()
    add_files(application, studio.folder)
    with TestClient(application) as client:
        for name in ("page.html", "x.svg", "read.me"):
            headers = client.get(f"/file/{name}").headers
            assert headers["content-disposition"].startswith("attachment") and name in headers["content-disposition"]
            assert headers["x-content-type-options"] == "nosniff"
        shown = client.get("/file/cat.png").headers
        assert "content-disposition" not in shown and shown["content-type"] == "image/png"
        assert client.get("/file/gone.png").status_code == client.get("/file/folder").status_code == 404


def test_a_browser_gets_pictures_as_they_are_edited(studio, tmp_path):
    """Browsers do not turn WebP, so that points were set at other places than those of the picture; nor show TIFF."""
    from starlette.testclient import TestClient

    exif = Image.Exif()
    exif[0x0112] = 6
    drawn = Image.new("RGB", (64, 32), "red")
    drawn.paste("blue", (0, 0, 32, 32))
    for kind in ("webp", "jpeg", "tiff"):
        drawn.save(tmp_path / f"turned.{kind}", exif=exif, lossless=True)
    drawn.save(tmp_path / "plain.webp")
    application = FastAPI()
    add_files(application, studio.folder)
    before, after = existing("turned.webp", "cat.png")
    assert isinstance(before, Image.Image) and before.size == (32, 64) and after == "cat.png"
    with TestClient(application) as client:
        for name in ("turned.webp", "turned.tiff"):
            answer = client.get(f"/file/{name}", headers={"accept": "image/avif,image/webp,*/*;q=0.8"})
            seen = Image.open(BytesIO(answer.content))
            assert answer.headers["content-type"] == "image/png" and seen.size == load_image(tmp_path / name).size
            assert seen.tobytes() == load_image(tmp_path / name).tobytes()
            whole = client.get(f"/file/{name}", headers={"accept": "text/html,*/*"}).content
            assert whole == (tmp_path / name).read_bytes(), "a download is the file itself"
        for name in ("turned.jpeg", "plain.webp", "cat.png"):
            answer = client.get(f"/file/{name}", headers={"accept": "image/avif,image/webp,*/*;q=0.8"})
            assert answer.content == (tmp_path / name).read_bytes()


def test_the_address_that_is_printed_is_the_one_that_is_listened_at():
    assert address_of("127.0.0.1", 7860) == address_of("localhost", 7860) == "http://127.0.0.1:7860/"
    assert address_of("::1", 7861) == "http://[::1]:7861/"
    assert address_of("my-machine", 7860) == "http://my-machine:7860/"


def test_files_that_are_gone_cost_a_line_and_not_the_page(studio, tmp_path):
    """A result whose folder was removed ended every look at the queue in an error, so that no tab showed anything."""
    folder = Path("studio", "drag-001")
    folder.mkdir(parents=True)
    (folder / "drag.json").write_text('{"drags": [], "seconds": 1, "notes": []}')
    Image.new("RGB", (8, 8)).save(folder / "dragged.png")
    with gr.Blocks():
        tab = drag.build(studio)
    job = Job("drag", "Drag", lambda job: None, "personalize drag")
    job.state, job.result = "done", {"folder": folder, "before": "cat.png"}
    assert page.shown_result(tab, job)[-2:] == ["", "personalize drag"]
    shutil.rmtree(folder)
    values = page.shown_result(tab, job)
    assert len(values) == len(tab.outputs) and "dragged.png is gone" in values[-2] and values[-1] == "personalize drag"


def test_a_picture_that_is_gone_leaves_those_of_the_history(studio, tmp_path, monkeypatch):
    with gr.Blocks():
        tab = edit.build(studio)
    entry = {"alpha": 0.8, "beta": 1.2, "gamma": None, "forget": "none", "strength": 1.0, "prompt": "a dog", "seed": 0}
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    job = Job("edit", "Edit", lambda job: None, "personalize edit")
    entries = [entry | {"file": name} for name in ("0.png", "1.png")]
    job.state, job.result = "done", {"folder": tmp_path, "entries": entries, "sheet": None, "pair": None}
    monkeypatch.setattr(studio.queue, "history", lambda kind: [job])
    shown = tab.show(job)
    assert len(shown) == len(tab.outputs) and len(shown[1]) == len(shown[4]) == 2 and shown[-2] == ""
    (tmp_path / "0.png").unlink()
    shown = tab.show(job)
    assert len(shown[4]) == 1 and shown[5] == [str(tmp_path / "1.png")] and "0.png is gone" in shown[-2]


def test_the_history_is_of_the_pictures_that_are_there_and_known_by_their_file(studio, tmp_path):
    """A click restored what the page of another user had drawn meanwhile, whose pictures moved all to the right."""
    entry = {"alpha": 0.8, "beta": 1.2, "gamma": None, "forget": "none", "strength": 1.0}
    jobs = []
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        job = Job("edit", "Edit", lambda job: None, inputs={"prompt": f"prompt {number}"})
        job.result = {"folder": tmp_path, "entries": [entry | {"seed": number, "file": f"{number}.png"}]}
        jobs.insert(0, job)
    queue = SimpleNamespace(history=lambda kind: jobs)
    paths = [path for path, _ in edit_pictures.seen_pictures(queue)]
    assert [Path(path).name for path in paths] == ["1.png", "0.png"]
    assert edit_pictures.fields_of(queue, paths[1])["prompt"] == "prompt 0"
    (tmp_path / "1.png").unlink()
    assert [path for path, _ in edit_pictures.seen_pictures(queue)] == paths[1:]
    assert edit_pictures.fields_of(queue, "of yesterday") == {}
