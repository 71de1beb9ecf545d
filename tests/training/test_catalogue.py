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
from personalize.formats.manifest import MANIFEST
from personalize.training import catalogue
from personalize.training.catalogue import Catalogue, is_finished, learn_catalogue
from personalize.training.catalogue_results import Results, write_table
from personalize.training.catalogue_table import read_items
from personalize.training.config import SingleImageConfig
from personalize.training.distributed import ProcessGroup
from tests.support.tiny import tiny

SHORT = SingleImageConfig(rank=2, targets="attention", max_train_samples=2, samples_per_update=1)


@pytest.fixture
def shop(tmp_path):
    """A folder with three pictures, one of them broken."""
    for name, colour in (("cat", "orange"), ("dog", "brown")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "cat.png").read_bytes()[:60])
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


@pytest.fixture
def pretended(monkeypatch):
    """Rows are learned in no time, and leave but a manifest with their caption; for what is about the rows alone."""

    def train_row(model, item, shared, mixed_precision):
        folder = shared.output_dir / item.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps({"caption": item.sources.caption}))
        return {"adapter": str(folder), "caption": item.sources.caption, "updates": 1, "loss": 0.0}

    monkeypatch.setattr(catalogue, "_train_row", train_row)


def table(shop, *lines, header="image,caption,name"):
    path = shop / "items.csv"
    path.write_text("\n".join([header, *lines]), encoding="utf-8")
    return path


def learned(shop, path, model=None, load=None):
    """Every row's status by name, after a run."""
    items, refused = read_items(path, SHORT)
    shared = Catalogue(shop / "out", SHORT)
    rows = learn_catalogue(items, refused, shared, load or (lambda: model or tiny("sd1")), ProcessGroup())
    return {row["name"]: row for row in rows}


def test_rows_have_names_captions_and_options(shop):
    path = table(shop, "cat.png,a photo of a cat,,4,", 'dog.png,"a dog, in the park",my-dog,,yes',
                 header="image,caption,name,rank,standalone")  # fmt: skip
    items, refused = read_items(path, SHORT)
    assert not refused and [item.name for item in items] == ["cat", "my-dog"]
    assert items[0].options == {"rank": 4} and items[1].options == {"standalone": True}
    assert items[1].sources.caption == "a dog, in the park" and items[1].line == 3
    shared = Catalogue(shop / "out", SHORT)
    assert shared.config_of(items[0]).rank == 4 and shared.config_of(items[1]) == replace(SHORT, standalone=True)


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


def test_the_home_folder_is_expanded_in_cells(shop, monkeypatch):
    monkeypatch.setenv("HOME", str(shop))
    monkeypatch.setenv("USERPROFILE", str(shop))
    (item,), refused = read_items(table(shop, "~/cat.png,a cat,cat"), SHORT)
    assert item.sources.picture == (shop / "cat.png",) and not refused


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
    assert "lines 2 to 3 are learned one at a time: too large" in capsys.readouterr().out


@pytest.fixture
def studio(tmp_path):
    """Three views of one product, in two shapes, with masks, class pictures, and a caption beside the third."""
    for name, size in (("front", (64, 64)), ("side", (64, 96)), ("back", (64, 64))):
        for folder, mode, colour in (("mug", "RGB", "orange"), ("masks", "L", 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new(mode, size, colour).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "mug" / "side.txt").write_text("a photo of a red cat")
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "cats" / "any.png")
    return tmp_path


HEADER = "image,mask,caption,name,class_data_dir,class_prompt"


def test_a_row_names_a_folder_masks_class_pictures_and_captions(studio):
    """A row took one picture only: a product with five photos could not be in a catalogue."""
    path = table(studio, "mug,masks,a cat,,cats,a photo of a cat", "mug/front.png|mug/back.png,,a cat|a fox,two,,",
                 "mug/front.png,masks/front.png,a cat | fox,one,,", header=HEADER)  # fmt: skip
    items, refused = read_items(path, SHORT)
    assert not refused and [item.name for item in items] == ["mug", "two", "one"]
    shared = Catalogue(studio / "out", SHORT)
    folder, two, one = (catalogue.row_pictures(shared.sources_of(item)) for item in items)
    assert [image.path.name for image in folder] == ["back.png", "front.png", "side.png"]
    assert [image.files["mask_file_name"].parent.name for image in folder] == ["masks"] * 3
    assert [image.columns["text"] for image in two] == ["a cat", "a fox"]
    assert [image.columns["text"] for image in one] == ["a cat | fox"], "one picture has one caption, bar and all"
    assert items[0].sources.with_prior_preservation and not items[1].sources.with_prior_preservation
    rows = learned(studio, path)
    assert {row["status"] for row in rows.values()} == {"done"}, rows
    info = Adapter.load(studio / "out" / "mug").info
    assert info["captions"] == ["a cat", "a photo of a red cat"] and info["pictures"] == 3
    assert info["regularisation"] == 1 and rows["two"]["pictures"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mug,masks/front.png,a cat,x,,", "1 mask, 3 pictures"),
        ("mug,,a cat|a dog,x,,", "2 captions for 3 pictures"),
        ("mug,,a cat||a dog,x,,", "is empty"),
        ("mug|gone.png,,a cat,x,,", "gone.png: no such file"),
        ("mug,gone,a cat,x,,", "gone: no such file"),
        ("out,,a cat,x,,", "no picture"),
        ("mug,,a cat,x,gone,a cat", "gone: no such folder"),
        ("mug,,a cat,x,cats,", "need a class_prompt"),
        ("mug,cats,a cat,x,,", "holds no mask of back.png"),
    ],
)
def test_a_row_whose_pictures_do_not_fit_together_is_refused(studio, line, message):
    (studio / "out").mkdir()
    _, (row,) = read_items(table(studio, line, header=HEADER), SHORT)
    assert message in row["reason"] and "\n" not in row["reason"]


@pytest.mark.parametrize("file", ["mug/side.png", "masks/side.png", "mug/side.txt", "cats/any.png"])
def test_a_row_is_trained_again_if_any_of_its_files_changes(studio, pretended, file):
    path = table(studio, "mug,masks,a cat,mug,cats,a cat", header=HEADER)
    first = learned(studio, path, load=object)["mug"]
    assert learned(studio, path, load=lambda: pytest.fail("loaded for nothing"))["mug"] == first
    if file.endswith("txt"):
        (studio / file).write_text("a photo of a fox")
    else:
        Image.new("RGB", (64, 96), "navy").save(studio / file)
    assert learned(studio, path, load=object)["mug"]["digest"] != first["digest"]


def test_masks_within_the_folder_are_not_pictures_to_learn(studio, capsys):
    (studio / "masks").rename(studio / "mug" / "masks")
    (studio / "mug" / "notes.md").write_text("not a picture")
    items, refused = read_items(table(studio, "mug,mug/masks,a cat,,,", header=HEADER), SHORT)
    assert not refused and len(catalogue.row_pictures(items[0].sources)) == 3
    assert items[0].remarks == (f"left out of {studio / 'mug'}, no picture: notes.md",)


def test_rows_of_several_pictures_are_learned_together_if_they_are_alike(studio):
    """Equal to rows learned alone; 1e-5 is what AdamW makes of the rounding of another batch size."""
    both = "mug/front.png|mug/back.png,masks/front.png|masks/back.png,a cat"
    lines = [f"{both},a,,", f"{both},b,,", "mug,,a cat,shapes,,", "mug/front.png|mug/back.png,,a cat|a dog,words,,"]
    items, _ = read_items(table(studio, *lines, header=HEADER), SHORT)
    shared = Catalogue(studio / "together", SHORT, adapters_per_batch=4)
    groups = catalogue.group_rows(items, shared, 64, 32)
    assert [[item.name for item in group] for group in groups] == [["a", "b"], ["shapes"], ["words"]]
    outcomes = list(catalogue.learn_rows(tiny("sd1"), groups[0], shared))
    alone = catalogue.learn_row(tiny("sd1"), items[0], Catalogue(studio / "alone", SHORT))
    assert [row["status"] for row in [*outcomes, alone]] == ["done"] * 3
    one, other = (Adapter.load(studio / way / "a").lora for way in ("together", "alone"))
    assert max(float((one[key] - other[key]).abs().max()) for key in one) <= 1e-5
