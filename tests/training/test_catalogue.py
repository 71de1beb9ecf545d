"""The table of a catalogue, its rows' outcomes, and what a killed or a bad row leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.errors import UserError
from personalize.formats.adapter_folders import MANIFEST
from personalize.training import catalogue
from personalize.training.catalogue import Catalogue, is_finished, learn_catalogue
from personalize.training.catalogue_results import Results, write_table
from personalize.training.catalogue_table import read_items
from personalize.training.data.samples import SampleShard
from personalize.training.distributed import ProcessGroup
from tests.support.catalogues import SHORT, learned, table
from tests.support.tiny import tiny


@pytest.fixture
def shop(tmp_path):
    """A folder with three pictures, one of them broken."""
    for name, colour in (("cat", "orange"), ("dog", "brown")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "cat.png").read_bytes()[:60])
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def test_rows_have_names_captions_and_options(shop):
    path = table(shop, "cat.png,a photo of a cat,,4,", 'dog.png,"a dog, in the park",my-dog,,yes',
                 header="image,caption,name,rank,standalone")  # fmt: skip
    items, refused = read_items(path, SHORT)
    assert not refused and [item.name for item in items] == ["cat", "my-dog"]
    assert items[0].options == {"rank": 4} and items[1].options == {"standalone": True}
    assert items[1].sources.caption == "a dog, in the park" and items[1].line == 3
    shared = Catalogue(shop / "out", SHORT)
    assert shared.config_of(items[0]).rank == 4 and shared.config_of(items[1]) == replace(SHORT, standalone=True)


def test_accumulation_in_a_row_takes_the_place_of_the_tables_update(shop):
    """As on a command line; such rows failed beside every preset that says how many samples make an update."""
    header = "image,caption,train_batch_size,gradient_accumulation_steps,samples_per_update"
    path = table(shop, "cat.png,a cat,3,2,", "dog.png,a dog,3,2,6", header=header)
    config = replace(SHORT, max_train_samples=None, samples_per_update=4)
    items, refused = read_items(path, config)
    shared = Catalogue(shop / "out", config)
    assert not refused and [SampleShard.of(shared.config_of(item)).samples for item in items] == [6, 6]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("missing.png,a cat,x", "no such file"),
        (",a cat,x", "column image is empty"),
        ("cat.png,a cat,../x", "no plain file name"),
        ("cat.png,a cat,/etc/x", "no plain file name"),
        ("cat.png,a cat,..", "no plain file name"),
        ("cat.png,a cat,.x", "cannot be called"),
        ("cat.png,a cat,results", "cannot be called"),
        ("cat.png,a cat,GOOD", "taken by line 2"),
        ("cat.png,a cat, with a comma,x", "more cells than"),
    ],
)
def test_a_row_that_cannot_be_learned_is_refused_before_anything_is_loaded(shop, line, message):
    items, refused = read_items(table(shop, "dog.png,a dog,good", line), SHORT)
    assert [item.name for item in items] == ["good"]
    (row,) = refused
    assert row["line"] == 3 and row["status"] == "failed" and message in row["reason"] and "\n" not in row["reason"]


@pytest.mark.parametrize(
    ("column", "cell"), [("rank", "many"), ("rank", "0"), ("standalone", "perhaps"), ("rank", "2.5")]
)
def test_an_option_that_cannot_be_is_the_rows_own_mistake(shop, column, cell):
    items, refused = read_items(table(shop, f"dog.png,a dog,x,{cell}", header=f"image,caption,name,{column}"), SHORT)
    assert not items and column in refused[0]["reason"]


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        ("picture,caption", ["a,b"], "expected image, caption"),
        ("image,captoin", ["a,b"], "did you mean caption"),
        ("image,caption", [], "no row below"),
    ],
)
def test_a_table_that_cannot_be_is_refused_as_a_whole(shop, header, lines, message):
    with pytest.raises(UserError, match=message):
        read_items(table(shop, *lines, header=header), SHORT)
    (shop / "latin.csv").write_bytes("image,caption\nä,ö\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_items(shop / "latin.csv", SHORT)


def test_bad_rows_stop_no_other_and_each_has_its_line(shop, capsys):
    path = table(shop, "broken.png,a cat,broken", "cat.png,,wordless", "cat.png,a cat,cat", "gone.png,a dog,gone",
                 "dog.png,a dog,dog")  # fmt: skip
    rows = learned(shop, path)
    assert {name: row["status"] for name, row in rows.items()} == {
        "broken": "failed", "wordless": "failed", "cat": "done", "gone": "failed", "dog": "done",
    }  # fmt: skip
    assert "broken.png" in rows["broken"]["reason"] and "has no caption" in rows["wordless"]["reason"]
    assert Adapter.load(shop / "out" / "dog").info["caption"] == "a dog"
    assert not (shop / "out" / "broken").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line ")]
    assert len(said) == 5 and sum("failed" in line for line in said) == 3
    written = list(csv.DictReader(write_table(list(rows.values()), shop / "out" / "results.csv").open()))
    assert [row["name"] for row in written] == ["broken", "wordless", "cat", "gone", "dog"]


def test_finished_rows_are_not_learned_again_and_changed_ones_are(shop, pretended):
    path = table(shop, "cat.png,a cat,cat", "dog.png,a dog,dog")
    first = learned(shop, path, load=object)
    assert learned(shop, path, load=lambda: pytest.fail("the base was loaded for nothing")) == first
    again = learned(shop, table(shop, "cat.png,a cat,cat", "dog.png,a brown dog,dog"), load=object)
    assert again["cat"] == first["cat"] and again["dog"]["caption"] == "a brown dog"
    Image.new("RGB", (64, 64), "white").save(shop / "cat.png")
    newer = learned(shop, table(shop, "cat.png,a cat,cat", "dog.png,a brown dog,dog"), load=object)
    assert newer["dog"] == again["dog"] and newer["cat"]["digest"] != first["cat"]["digest"], "another picture"
    (shop / "out" / "dog" / MANIFEST).unlink()
    assert learned(shop, path, load=object)["dog"]["time"] > again["dog"]["time"], "an adapter that is gone"


def test_a_row_that_moves_in_the_table_is_not_learned_again(shop, pretended):
    """A row put in before it made all that follow be learned again."""
    rows = ["cat.png,a cat,cat", "dog.png,a dog,dog"]
    first = learned(shop, table(shop, *rows), load=object)
    again = learned(shop, table(shop, "gone.png,a cow,cow", *rows[::-1]), load=lambda: pytest.fail("learned again"))
    assert {name: row["line"] for name, row in again.items()} == {"cow": 2, "dog": 3, "cat": 4}
    for name in ("cat", "dog"):
        assert {**again[name], "line": 0} == {**first[name], "line": 0}


def test_an_adapter_that_another_row_of_its_name_replaced_is_learned_again(shop, pretended):
    """The first row's own outcome was still found by its line."""
    path = table(shop, "cat.png,a cat,pet")
    learned(shop, path, load=object)
    learned(shop, table(shop, "gone.png,a cow,cow", "dog.png,a dog,pet"), load=object)
    learned(shop, table(shop, "cat.png,a cat,pet", "dog.png,a dog,PET"), load=object)
    assert json.loads((shop / "out" / "pet" / MANIFEST).read_text())["caption"] == "a cat"
    refused = "a name that is taken is another row's, and forgets nothing of it"
    learned(shop, table(shop, "cat.png,a cat,pet", "dog.png,a dog,pet"), load=lambda: pytest.fail(refused))


def test_what_decides_a_rows_adapter_is_in_its_hash(shop):
    """A base loaded in another way, or another precision, did not count."""
    (item,), _ = read_items(table(shop, "cat.png,a cat,cat"), SHORT)
    one = Catalogue(shop / "out", SHORT)
    changes = (
        {"base": "other"}, {"variant": "fp16"}, {"prediction_type": "v_prediction"}, {"load_in_4bit": True},
        {"mixed_precision": "bf16"}, {"resolution": 32}, {"caption_model": "blip"}, {"config": replace(SHORT, seed=1)},
    )  # fmt: skip
    hashes = [one.row_hash(item), *(replace(one, **change).row_hash(item) for change in changes)]
    assert len(set(hashes)) == 9
    assert replace(one, preview_steps=5, adapters_per_batch=2).row_hash(item) == hashes[0]


def test_the_home_folder_is_expanded_in_cells(shop, monkeypatch):
    monkeypatch.setenv("HOME", str(shop))
    monkeypatch.setenv("USERPROFILE", str(shop))
    (item,), refused = read_items(table(shop, "~/cat.png,a cat,cat"), SHORT)
    assert item.sources.picture == (shop / "cat.png",) and not refused


def test_names_that_begin_like_a_home_folder_are_names(shop):
    """Of a row with `~$cat.png`, of which no user's home was known, the whole catalogue ended in a RuntimeError."""
    (shop / "cat.png").rename(shop / "~$cat.png")
    (item, other), refused = read_items(table(shop, "~$cat.png,a cat,cat", "dog.png,a dog,dog"), SHORT)
    assert item.sources.picture == (shop / "~$cat.png",) and other.name == "dog" and not refused


def test_a_bug_in_one_row_is_its_outcome(shop, pretended, monkeypatch):
    real = catalogue._train_row

    def learned_or_not(model, item, *rest):
        if item.name == "cat":
            raise RuntimeError("out of memory\nat 0x1")
        return real(model, item, *rest)

    monkeypatch.setattr(catalogue, "_train_row", learned_or_not)
    rows = learned(shop, table(shop, "cat.png,a cat,cat", "dog.png,a dog,dog"), load=object)
    assert rows["cat"]["reason"] == "RuntimeError: out of memory" and rows["dog"]["status"] == "done"


def test_a_run_killed_in_the_middle_goes_on_where_it_was(shop):
    """SIGKILL while the second row is being saved; the first is not repeated, and the results are whole."""
    path, model = table(shop, "cat.png,a cat,cat", "dog.png,a dog,dog"), tiny("sd1")
    child = os.fork()
    if child == 0:
        real = Adapter.save

        def save(self, folder, **options):
            if str(folder).endswith("dog"):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, folder, **options)

        Adapter.save = save
        try:
            learned(shop, path, model)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    items, _ = read_items(path, SHORT)
    rows, shared = Results(shop / "out" / "results").rows(), Catalogue(shop / "out", SHORT)
    assert [is_finished(item, rows, shared) for item in items] == [True, False]
    before = (shop / "out" / "cat" / "adapter.json").stat().st_mtime_ns
    assert {row["status"] for row in learned(shop, path, model).values()} == {"done"}
    assert (shop / "out" / "cat" / "adapter.json").stat().st_mtime_ns == before


def test_a_torn_line_is_passed_over_and_cut_off(tmp_path):
    results = Results(tmp_path, 1)
    results.add({"line": 2, "name": "a", "status": "done"})
    whole = results.path.read_bytes()
    results.path.write_bytes(whole + b'{"line": 3, "na')
    assert list(Results(tmp_path, 0).rows()) == ["2:a"], "another process reads the whole lines"
    assert list(Results(tmp_path, 1).rows()) == ["2:a"] and results.path.read_bytes() == whole


def test_rows_are_shared_out_without_gap_or_overlap(shop, monkeypatch):
    """Each of three processes learns every third pending row; together they report all."""
    for number in range(7):
        Image.new("RGB", (64, 64), (number * 20, 0, 0)).save(shop / f"{number}.png")
    path = table(shop, *(f"{number}.png,a cat,n{number}" for number in range(7)))
    items, _ = read_items(path, SHORT)
    taken = []

    def train_row(model, item, *rest):
        taken.append(item.name)
        return {"adapter": "", "caption": "", "updates": 1, "loss": 0.0}

    monkeypatch.setattr(catalogue, "_train_row", train_row)

    class Apart(ProcessGroup):
        """What is gathered from the others is known only as far as they have come."""

        def all_gather(self, value):
            return [value]

    shares = []
    for index in range(3):
        taken.clear()
        learn_catalogue(items, [], Catalogue(shop / f"out-{index}", SHORT), lambda: object(), Apart(index, 3))
        shares.append(list(taken))
    assert sorted(sum(shares, [])) == [f"n{number}" for number in range(7)] and [len(s) for s in shares] == [3, 2, 2]


def test_outcomes_are_json_lines(shop, pretended):
    learned(shop, table(shop, "cat.png,a cat,cat", "gone.png,a dog,gone"), load=object)
    lines = (shop / "out" / "results" / "process-0.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["name"] for line in lines) == ["cat", "gone"]


def test_speed_rows_of_one_size_are_learned_together(shop, capsys):
    """Two squares in one batch, the wide one and the broken one by themselves; what is saved is what is said."""
    Image.new("RGB", (128, 64), "grey").save(shop / "wide.png")
    path = table(shop, "cat.png,a cat,", "wide.png,a wall,", "broken.png,a cat,x", "dog.png,a dog,")
    items, refused = read_items(path, SHORT)
    shared = Catalogue(shop / "out", SHORT, adapters_per_batch=4)
    groups = catalogue.group_rows(items, shared, 64, 32)
    assert [[item.name for item in group] for group in groups] == [["cat", "dog"], ["wide"], ["x"]]
    rows = {row["name"]: row for row in learn_catalogue(items, refused, shared, lambda: tiny("sd1"), ProcessGroup())}
    assert {name: row["status"] for name, row in rows.items()} == dict(cat="done", dog="done", wide="done", x="failed")
    assert "one at a time" not in capsys.readouterr().out
    for name in ("cat", "dog"):
        adapter = Adapter.load(shop / "out" / name)
        assert adapter.info["caption"] == f"a {name}" and adapter.info["updates"] == rows[name]["updates"] == 2


def test_speed_rows_that_fail_together_are_tried_alone(shop, capsys, monkeypatch):
    monkeypatch.setattr(catalogue, "learn_batched", lambda *_, **__: (_ for _ in ()).throw(MemoryError("too large")))
    items, refused = read_items(table(shop, "cat.png,a cat,", "dog.png,a dog,"), SHORT)
    shared = Catalogue(shop / "out", SHORT, adapters_per_batch=2)
    rows = learn_catalogue(items, refused, shared, lambda: tiny("sd1"), ProcessGroup())
    assert [row["status"] for row in rows] == ["done", "done"]
    assert "lines 2, 3 are learned one at a time: too large" in capsys.readouterr().out
