"""A catalogue goes on: a hostile cell costs its row, outcomes are recorded as they come, two share the rows."""

from __future__ import annotations

import csv
import json
import os
import threading
import time
import unicodedata

import pytest
from PIL import Image

from personalize.errors import Notice, UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.training import catalogue
from personalize.training.catalogue import Catalogue, learn_catalogue
from personalize.training.catalogue_results import Results, write_table
from personalize.training.catalogue_table import read_items
from personalize.training.config import SingleImageConfig
from personalize.training.distributed import ProcessGroup
from tests.support.children import start_child

SHORT = SingleImageConfig(rank=2, targets="attention", max_train_samples=2, samples_per_update=1)


@pytest.fixture
def shop(tmp_path):
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "cat.png")
    return tmp_path


def table(shop, *lines):
    path = shop / "items.csv"
    path.write_text("\n".join(["image,caption,name", *lines]), encoding="utf-8")
    return path


def pretend(monkeypatch, seconds=0.0, failing=()):
    """Rows are learned in `seconds`, and leave but a manifest."""

    def train_row(model, item, shared):
        with open(shared.output_dir / "trained", "a") as file:
            file.write(f"{item.name}\n")
        time.sleep(seconds)
        if item.name in failing:
            raise RuntimeError("bad")
        (shared.output_dir / item.name).mkdir(parents=True, exist_ok=True)
        (shared.output_dir / item.name / MANIFEST).write_text("{}")
        return {"adapter": "", "caption": item.sources.caption, "updates": 1, "loss": 0.0}

    monkeypatch.setattr(catalogue, "_train_row", train_row)


def learned(shop, path):
    items, refused = read_items(path, SHORT)
    rows = learn_catalogue(items, refused, Catalogue(shop / "out", SHORT), object, ProcessGroup())
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{'x' * 5000}.png,a cat,x", "File name too long"),
        (f"{'d/' * 3000}x.png,a cat,x", "too long"),
        ("/dev/zero,a cat,x", "is a device or a pipe"),
        ("pipe,a cat,x", "is a device or a pipe"),
        ("a\0b.png,a cat,x", "no such file"),
        (f"cat.png,{'c' * 200_000},x", "column caption has more than 131072"),
        (f'"{"c" * 200_000}\n{"c" * 200_000}",a cat,x', "column image has more than 131072"),
        ("cat.png,a cat,CON", "cannot be called"), ("cat.png,a cat,nul.txt", "cannot be called"),
        ("cat.png,a cat,Com1", "cannot be called"), ("cat.png,a cat,x.", "cannot be called"),
        ("cat.png,a cat,Results", "cannot be called"), ("cat.png,a cat,RESULTS.csv", "cannot be called"),
        ("cat.png,a cat,ﬁne", "taken by line 2"), ("cat.png,a cat,FINE", "taken by line 2"),
        (f"cat.png,a cat,{'n' * 201}", "is too long"), (f"cat.png,a cat,{'名' * 70}", "is too long"),
    ],
)  # fmt: skip
def test_a_hostile_cell_costs_its_row_alone(shop, line, message):
    os.mkfifo(shop / "pipe")
    limit = csv.field_size_limit()
    items, refused = read_items(table(shop, "cat.png,a cat,fine", line, "cat.png,a cat,last"), SHORT)
    assert [item.name for item in items] == ["fine", "last"] and csv.field_size_limit() == limit
    (row,) = refused
    assert message in row["reason"] and "\n" not in row["reason"] and len(row["name"]) <= 200


def test_normal_forms_of_a_name_collide(shop):
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    items, refused = read_items(table(shop, *(f"cat.png,a cat,{name}" for name in forms)), SHORT)
    assert len(items) == 1 and "taken by line 2" in refused[0]["reason"]


def test_refused_rows_are_recorded_once(shop, monkeypatch):
    pretend(monkeypatch)
    for _ in range(3):
        assert learned(shop, table(shop, "gone.png,a cat,gone", "cat.png,a cat,cat"))["gone"]["status"] == "failed"
    lines = (shop / "out" / "results" / "process-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["gone", "cat"]


def test_two_catalogues_on_one_output_share_the_rows(shop, monkeypatch):
    """Also a row that one of them tries in vain is not tried again by the other."""
    pretend(monkeypatch, 0.2, failing={"n3"})
    path = table(shop, *(f"cat.png,a cat,n{number}" for number in range(8)))
    results = [child()[0] for child in [start_child(lambda: learned(shop, path)) for _ in range(2)]]
    assert sorted((shop / "out" / "trained").read_text().split()) == [f"n{number}" for number in range(8)]
    for rows in results:
        assert {name: row["status"] for name, row in rows.items()} == {
            f"n{number}": "failed" if number == 3 else "done" for number in range(8)
        }
    files = sorted(path.name for path in (shop / "out" / "results").iterdir())
    assert files == ["process-0-2.jsonl", "process-0.jsonl"], "each appends to its own, and no lock is left"


@pytest.fixture
def machines(shop):
    """A function that learns a table on two machines without a common disk; returns the outcomes that each knows."""

    def run(path):
        meeting, shared, found = threading.Barrier(2), [None, None], [None, None]

        class Machine(ProcessGroup):
            def all_gather(self, value):
                shared[self.index] = value
                meeting.wait()
                values = list(shared)
                meeting.wait()
                return values

        def learn(index):
            items, refused = read_items(path, SHORT)
            there = Catalogue(shop / f"machine-{index}", SHORT)
            rows = learn_catalogue(items, refused, there, object, Machine(index, 2))
            found[index] = {row["name"]: row["status"] for row in rows}

        threads = [threading.Thread(target=learn, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found

    return run


def test_machines_without_a_common_disk_learn_every_row(shop, machines, monkeypatch):
    """Each counted what itself lacked, so that after a restart rows were learned by none, with exit code 0."""
    pretend(monkeypatch)
    rows = [f"cat.png,a cat,n{number}" for number in range(4)]
    assert machines(table(shop, *rows[:3])) == [dict.fromkeys(("n0", "n1", "n2"), "done")] * 2
    before = {path: path.stat().st_mtime_ns for path in shop.glob(f"machine-*/*/{MANIFEST}")}
    assert machines(table(shop, *rows)) == [dict.fromkeys(("n0", "n1", "n2", "n3"), "done")] * 2
    after = {path: path.stat().st_mtime_ns for path in shop.glob(f"machine-*/*/{MANIFEST}")}
    assert len(after) == 4 and before.items() < after.items(), "each row once, and none again"


def test_a_row_that_no_process_learned_has_failed(shop, machines, monkeypatch):
    pretend(monkeypatch)
    rows = [f"cat.png,a cat,n{number}" for number in range(3)]
    real = catalogue.learn_rows
    monkeypatch.setattr(catalogue, "learn_rows", lambda *a: () if a[1][0].name == "n1" else real(*a))
    assert machines(table(shop, *rows)) == [{"n0": "done", "n1": "failed", "n2": "done"}] * 2


def test_a_row_whose_catalogue_was_killed_is_taken_over(shop, monkeypatch):
    pretend(monkeypatch, 60)
    path = table(shop, "cat.png,a cat,a", "cat.png,a cat,b")
    child = start_child(lambda: learned(shop, path))
    while not (shop / "out" / "trained").exists():
        time.sleep(0.01)
    os.kill(child.process, 9)
    os.waitpid(child.process, 0)
    pretend(monkeypatch)
    assert {row["status"] for row in learned(shop, path).values()} == {"done"}


def test_outcomes_of_rows_learned_together_are_recorded_as_they_are_saved(shop, monkeypatch):
    """A save that fails costs its row alone, and one that is killed at most the row at hand."""
    items, _ = read_items(table(shop, *(f"cat.png,a cat,n{number}" for number in range(3))), SHORT)
    monkeypatch.setattr(catalogue, "_train_rows_together", lambda _, items, *__: [([], None, 0.0)] * len(items))

    def save(model, item, *rest):
        if item.name == "n1":
            raise OSError(28, "No space left on device")
        if item.name == "n2":
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(catalogue, "_save", save)
    rows = catalogue.learn_rows(None, items, Catalogue(shop / "out", SHORT, adapters_per_batch=3))
    assert next(rows)["status"] == "done"
    assert "No space left" in next(rows)["reason"]
    with pytest.raises(KeyboardInterrupt):
        next(rows)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("own", [True, False])
def test_a_pipe_among_the_results_is_refused(tmp_path, own):
    """It was opened and waited for without end."""
    os.mkfifo(tmp_path / f"process-{0 if own else 1}.jsonl")

    def read():
        with pytest.raises(UserError, match="is a pipe or a device, expected a plain file"):
            Results(tmp_path).rows()
        return True

    assert start_child(read, seconds=30)()[0]


def test_an_altered_line_is_not_believed(tmp_path):
    results = Results(tmp_path)
    for name in ("a", "b"):
        results.add({"line": 2, "name": name, "status": "done"})
    results.path.write_bytes(results.path.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.warns(Notice, match="1 line.s. of the results in .* are damaged"):
        assert list(Results(tmp_path, 1).rows()) == ["2:a"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\tx", "\rx"])
def test_cells_that_spreadsheets_would_calculate_are_quoted(tmp_path, text):
    rows = [{"line": 2, "name": text, "status": "failed", "reason": text, "loss": -0.5}]
    (row,) = csv.DictReader(write_table(rows, tmp_path / "results.csv").open(newline=""))
    assert row["name"] == row["reason"] == f"'{text}".replace("\r", " ") and row["loss"] == "-0.5"
