"""Fuzz of what runs leave and read: a checkpoint is what was written or is passed over; a bad row costs itself."""

import csv
import json
import os
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from personalize.cli.commands import edit_table
from personalize.cli.edit_options import EditTableConfig
from personalize.errors import UserError
from personalize.io.image_folders import read_folder
from personalize.io.numbering import folded
from personalize.training import checkpoints
from personalize.training.catalogue_results import COLUMNS, FAILED, FORMULA, Results, outcome, write_table
from personalize.training.catalogue_table import read_items
from personalize.training.checkpoints import Checkpoint
from personalize.training.config import SingleImageConfig
from tests.support.fuzz import BYTES, MEMORY, ODD, PLACES, VALUES, attempt, dumped, fuzzed, replanted, spliced

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
EXTRA = "theirs.txt"
FILES = (checkpoints.STATE, checkpoints.TRAINABLE, checkpoints.OPTIMIZER)
CELLS = [
    "=1+1",
    "@x",
    "con",
    "N1",
    "n1.",
    "..",
    "a/b",
    "\0",
    '"',
    "x|y",
    "|",
    "1e400",
    "nan",
    "é",
    "e\u0301",
    "~",
    *ODD,
]
CATALOGUE = [["image", "caption", "name", "rank"], ["a.png", "a cat", "n1", "4"], ["a.png", "a dog", "n2", ""]]
PHOTOS = [["file", "source", "target", "seed"], ["a.png", "a cat", "a dog", "3"]]
METADATA = [["file_name", "text"], ["a.png", "a cat"], ["b.png", "a dog"]]


def trained(update):
    parameters = {"a": torch.nn.Parameter(torch.arange(4.0)), "b.c": torch.nn.Parameter(torch.ones(2, 3))}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.1)
    for _ in range(update):
        optimizer.zero_grad()
        sum((p**3).sum() for p in parameters.values()).backward()
        optimizer.step()
    return parameters, optimizer


def checkpoint(update):
    parameters, optimizer = trained(update)
    return Checkpoint(update, {n: p.detach() for n, p in parameters.items()}, optimizer.state_dict(), {"rank": 2})


@pytest.fixture
def place(tmp_path):
    """A folder with two checkpoints, and one with two pictures and files of outcomes."""
    for update in (1, 2):
        checkpoints.save(tmp_path / "run", checkpoint(update))
    (tmp_path / "shop" / "results").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / "shop" / name)
    results = Results(tmp_path / "shop" / "results")
    for line in (2, 3):
        results.add(outcome(line, f"n{line}", FAILED, reason="=bad"))
        edit_table.append(tmp_path / "shop" / "results.jsonl", {"name": f"n{line}", "inputs": "0"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    return SimpleNamespace(top=tmp_path, run=tmp_path / "run", shop=tmp_path / "shop", before=before)


def same(found, update):
    """Is the checkpoint that of `update` updates, in everything?"""
    true = checkpoint(update)
    return (found.update, found.metadata) == (true.update, true.metadata) and all(
        torch.equal(found.trainable[name], tensor) for name, tensor in true.trainable.items()
    )


def with_state(kind, place, changes, spot, value):
    """The newest checkpoint's state with a changed value, sealed again or not, or with changed bytes."""
    path = place.run / "checkpoint-2" / checkpoints.STATE
    content = place.before[path]
    state = replanted(json.loads(content), spot, value)
    if kind == "sealed state" and isinstance(state, dict):
        state["checksum"] = checkpoints._hash({key: part for key, part in state.items() if key != "checksum"})
    path.write_bytes(spliced(content, changes) if kind == "state" and spot % 3 == 0 else dumped(state))


def with_files(kind, place, changes, spot):
    """Weights with changed bytes; or files that are gone, exchanged, or of another kind, and one of another program."""
    folder = place.run / "checkpoint-2"
    path = folder / FILES[spot % 3]
    if kind == "weights":
        path = folder / FILES[1 + spot % 2]
        path.write_bytes(spliced(place.before[path], changes))
        return
    (folder / EXTRA).write_text("theirs")
    path.unlink()
    other = FILES[spot // 3 % 3]
    if spot % 5 == 1:
        path.mkdir()
    elif spot % 5 == 2:
        path.symlink_to(other)
    elif spot % 5 == 3:
        shutil.copy(place.run / "checkpoint-1" / other, path)


def one_checkpoint(kind, place, changes, spot, value):
    """A changed newest checkpoint is passed over, or it is what it was; nothing of another program is removed."""
    folder = place.run / "checkpoint-2"
    shutil.rmtree(folder)
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(place.before[folder / name])
    if kind in ("weights", "files"):
        with_files(kind, place, changes, spot)
    else:
        with_state(kind, place, changes, spot, value)
    parameters, optimizer = trained(0)
    attempt(lambda: checkpoints.restore(checkpoints.load(folder), parameters, optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checkpoints.find(place.run, "latest")
    assert found is not None and (kind == "sealed state" or same(found, found.update))
    attempt(lambda: checkpoints.save(place.run, checkpoint(3), limit=2))
    assert not (kind == "files") or (folder / EXTRA).read_text() == "theirs"
    shutil.rmtree(place.run / "checkpoint-3", ignore_errors=True)
    restored(place, place.run / "checkpoint-1")


def restored(place, folder):
    """Files that a limit has removed are there again."""
    folder.mkdir(exist_ok=True)
    for path, content in place.before.items():
        if path.parent == folder and not path.is_file():
            path.write_bytes(content)


def written(path, table, changes, spot, value):
    """`table` as CSV with one cell changed, or with changed bytes."""
    cells = [list(row) for row in table]
    row = cells[spot % len(cells)]
    row[spot // 7 % len(row)] = CELLS[spot // 49 % len(CELLS)] if spot % 2 else str(value)
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file).writerows(cells)
    if spot % 3 == 0:
        path.write_bytes(spliced(path.read_bytes(), changes))


def one_table(kind, place, changes, spot, value):
    path = place.shop / ("metadata.csv" if kind == "metadata" else "items.csv")
    written(path, {"catalogue": CATALOGUE, "photos": PHOTOS, "metadata": METADATA}[kind], changes, spot, value)
    attempt(lambda: {"catalogue": rows_of_catalogue, "photos": rows_of_photos, "metadata": pictures}[kind](place))
    path.unlink()


def rows_of_catalogue(place):
    """Names are those of folders of their own inside the output; the table of outcomes holds no formula."""
    items, failed = read_items(place.shop / "items.csv", SingleImageConfig())
    names = [folded(item.name) for item in items]
    assert len(set(names)) == len(names) and all(os.path.basename(name) == name != ".." for name in names)
    assert all(row["reason"] and "\n" not in row["reason"] for row in failed)
    write_table(failed, place.shop / "results.csv")
    with (place.shop / "results.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS and len(rows) == len(failed)
    assert not any(cell.startswith(FORMULA) for row in rows for cell in row)


def rows_of_photos(place):
    rows = edit_table.read_rows(place.shop / "items.csv")
    names = [folded(row.name) for row in rows]
    assert len(set(names)) == len(names) and all(os.path.basename(name) == name != ".." for name in names)
    config = EditTableConfig(place.shop / "items.csv", output_dir=place.shop)
    for row in rows:
        attempt(lambda row=row: edit_table.row_options(row, config), lambda row=row: edit_table.row_hash(row, config))


def pictures(place):
    found = read_folder(place.shop)
    assert {image.path for image in found.images} <= {place.shop / "a.png", place.shop / "b.png"}


def one_of_results(kind, place, changes, spot, value):
    """Outcomes that were changed are learned again: none is believed that was not written."""
    path = place.shop / "results" / "process-0.jsonl"
    content, more = place.before[path], place.before[place.shop / "results.jsonl"]
    lines = content.splitlines(keepends=True)
    if spot % 2:
        lines[0] = dumped(replanted(json.loads(lines[0]), spot, value)) + b"\n"
    path.write_bytes(b"".join(lines) if spot % 2 else spliced(content, changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = Results(place.shop / "results").rows()
    true = {f"{row['line']}:{row['name']}": row for row in map(json.loads, content.splitlines())}
    assert all({**row, "sha256": true[key]["sha256"]} == true[key] for key, row in rows.items())
    (place.shop / "edits.jsonl").write_bytes(spliced(more, changes))
    attempt(lambda: edit_table.finished(place.shop / "edits.jsonl"))


KINDS = dict.fromkeys(("state", "sealed state", "weights", "files"), one_checkpoint)
KINDS |= dict.fromkeys(("catalogue", "photos", "metadata"), one_table) | {"results": one_of_results}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [50, pytest.param(1_250, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_changed_checkpoints_and_tables_are_refused_in_one_line(kind, examples, place):
    count, grown = fuzzed(lambda *drawn: KINDS[kind](kind, place, *drawn), BYTES, PLACES, VALUES, examples=examples)
    assert count >= examples and grown < MEMORY
    assert {path.name for path in place.top.iterdir()} == {"run", "shop"}  # names in files never became paths


def test_what_is_changed_is_read_before(place):
    """Without a change the newest checkpoint, every row and every outcome are there."""
    assert same(checkpoints.find(place.run, "latest"), 2)
    for table, name in ((CATALOGUE, "items.csv"), (METADATA, "metadata.csv")):
        with (place.shop / name).open("w", newline="") as file:
            csv.writer(file).writerows(table)
    items, failed = read_items(place.shop / "items.csv", SingleImageConfig())
    assert [item.name for item in items] == ["n1", "n2"] and not failed
    assert [image.columns["text"] for image in read_folder(place.shop).images] == ["a cat", "a dog"]
    assert set(Results(place.shop / "results").rows()) == {"2:n2", "3:n3"}
    with pytest.raises(UserError, match="has the columns image"):
        edit_table.read_rows(place.shop / "items.csv")
