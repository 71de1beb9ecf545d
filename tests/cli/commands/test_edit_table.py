"""`personalize edit TABLE.csv`, on random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from personalize.cli import options
from personalize.cli.commands.edit_image import edit_request
from personalize.cli.commands.edit_table import Row, adapter_hashes, read_rows, row_hash, row_options
from personalize.cli.edit_options import EditTableConfig
from personalize.cli.main import main
from personalize.errors import UserError
from personalize.io.provenance import read_marks
from tests.support.photos import photo
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder("sd1", tmp_path_factory.mktemp("base"))


def write(folder, *rows: str):
    for number in (1, 2):
        photo(32 + 8 * number, 32).save(folder / f"p{number}.png")
    table = folder / "photos.csv"
    table.write_text("\n".join(("file,source,target,swap,name,mask,num_inference_steps,inversion", *rows)) + "\n")
    return table


def run(base, table, out, *words) -> int:
    return main(["edit", str(table), "--output_dir", str(out), "--pretrained_model_name_or_path", str(base), *words])


def test_each_row_has_its_folder_and_a_second_run_edits_what_is_left(base, tmp_path, capsys):
    good = ("p1.png,a cat,a dog,,,,2,", 'p2.png,a cat on snow,,"cat=dog; snow=beach",second,"0,0,20,20",2,none')
    table, out = write(tmp_path, *good, "p3.png,a cat,a dog,,,,2,", "p1.png,a cat,,cow=dog,third,,2,"), tmp_path / "out"
    assert run(base, table, out) == 2
    said = capsys.readouterr()
    assert "line 4, p3: not edited: " in said.out and "line 5, third: not edited: the word 'cow'" in said.out
    assert "2 of 4 rows were not edited" in said.err
    assert {path.name for path in out.iterdir()} == {"p1", "second", "results.jsonl", "trajectories"}
    assert Image.open(out / "second" / "edited.png").size == (48, 32)
    about = json.loads((out / "second" / "edit.json").read_text())
    assert about["target"] == "a dog on beach" and about["settings"]["inversion"] == "none"
    assert about["untouched_pixels"][0] >= 48 * 32 - 20 * 20
    write(tmp_path, *good, "p1.png,a cat,a fox,,p3,,2,")
    assert run(base, table, out) == 0
    said = capsys.readouterr().out
    assert "line 4, p3:" in said and "line 2" not in said and "3 rows in" in said
    shutil.rmtree(out / "p1")  # to have it edited again: it was called finished, and "3 rows in" the folder
    assert run(base, table, out) == 0
    said = capsys.readouterr().out
    assert "line 2, p1:" in said and "line 3" not in said and (out / "p1" / "edited.png").is_file()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("source,target\na,b\n", "has the columns source, target: expected file, source, target"),
        ("file,traget\np.png,b\n", "unknown column 'traget'"),
        ("file,source\n", "has no row below its header"),
        ("file,source,from\na.png,a cat,b.png\n", "unknown column 'from'"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(base, tmp_path, capsys, text, says):
    (tmp_path / "t.csv").write_text(text)
    assert run(base, tmp_path / "t.csv", tmp_path / "out") == 2
    line = capsys.readouterr().err.strip()
    assert says in line and "\n" not in line and not (tmp_path / "out").exists()


def test_a_cell_is_a_value_as_behind_an_equals_sign(tmp_path):
    """One that began with a dash was taken for an option, and a last ";" for an edit to nothing."""
    photo(40, 32).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text('file,source,target,dpl\na.png,-a cat,"- a dog; a fox;",no\n')
    config = EditTableConfig(tmp_path / "t.csv")
    (row,) = read_rows(config.table)
    options = row_options(row, config)
    assert (options.source, options.target, options.dpl) == ("-a cat", ("- a dog", "a fox"), False)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ("--report,a cat,a dog,", r"^--report: no such file; check the path of the picture$"),
        ("-x.png,a cat,a dog,", r"^-x\.png: no such file"),
        ("a.png,a cat,-x,", r"^--target has the value '-x', which reads as an option: write it otherwise$"),
        ("a.png,a cat,--report,", r"^--target has the value '--report', which reads as an option: write it otherwise$"),
        ("a.png,a cat,a dog,--report", r"^--seed is '--report', expected a whole number"),
    ],
)
def test_a_cell_that_is_an_options_name_is_said_to_be_the_value_that_it_is(tmp_path, monkeypatch, cells, says):
    """In the column file it was taken for an option, and the picture said to be missing."""
    photo(40, 32).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"file,source,target,seed\n{cells}\n")
    config = EditTableConfig(Path("t.csv"))
    monkeypatch.chdir(tmp_path)
    (row,) = read_rows(config.table)
    with pytest.raises(UserError, match=says):
        row_options(row, config)
    photo(40, 32).save("-x.png")  # a photo of such a name is found
    named = Row(2, "x", Path("-x.png"), {"source": "a cat", "target": "a dog"})
    assert row_options(named, config).photo == Path("-x.png")


def test_the_home_folder_is_expanded_in_the_column_of_photos(tmp_path, monkeypatch):
    """As in that of masks, in a catalogue and on the command line."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "t.csv").write_text("file,source,target\n~/a.png,a cat,a dog\n~no such user.png,a cat,a dog\n")
    first, second = read_rows(tmp_path / "t.csv")
    assert (first.file, second.file) == (tmp_path / "home" / "a.png", tmp_path / "~no such user.png")


def test_files_are_found_as_other_systems_spell_them(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.png", "~$m.png"):
        photo(32, 32).save(tmp_path / name)
    (tmp_path / "t.csv").write_text("file,source,target,mask\nsub\\a.png,a cat,a dog,~$m.png\nsub\\b.png,a,b,\n")
    config = EditTableConfig(tmp_path / "t.csv", output_dir=tmp_path / "out")
    row, missing = read_rows(tmp_path / "t.csv")
    options = row_options(row, config)
    assert (row.name, options.photo, options.mask) == ("a", tmp_path / "sub" / "a.png", str(tmp_path / "~$m.png"))
    assert row_hash(row, config) and edit_request(options).mask == tmp_path / "~$m.png"
    with pytest.raises(UserError, match=r"b\.png: no such file"):
        row_options(missing, config)


def test_a_path_that_the_system_cannot_look_up_costs_its_row_alone(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(f"file,source,target,mask\n{'9' * 5000}.png,a cat,a dog,\nb.png,a cat,a dog,{'9' * 5000}\n")
    photo(32, 32).save(tmp_path / "b.png")
    long, masked = read_rows(table)
    config = EditTableConfig(table)
    with pytest.raises(UserError, match="no such file"):
        row_hash(long, config)
    assert len(row_hash(masked, config)) == 16
    with pytest.raises(UserError, match="File name too long; check the path"):
        row_options(masked, config)


@pytest.mark.parametrize(
    ("column", "cell", "says"),
    [("strict_background", "yes", "belongs to --uniform"), ("region", "cat=gone.png", "gone.png: no such file"),
     ("controller", "mutual", "so that --dpl has no noun")],
)  # fmt: skip
def test_rows_are_checked_as_options_are(tmp_path, column, cell, says):
    """They were parsed alone: options of a method that is not used were accepted, and files missed after inverting."""
    photo(32, 32).save(tmp_path / "a.png")
    table = tmp_path / "t.csv"
    table.write_text(f"file,source,target,dpl,{column}\na.png,a cat,a dog,yes,{cell}\n")
    with pytest.raises(UserError, match=says):
        row_options(read_rows(table)[0], EditTableConfig(table, output_dir=tmp_path / "out"))


def test_masks_of_every_column_lie_beside_the_table_and_count_as_inputs(tmp_path, monkeypatch):
    (tmp_path / "shop").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("a", "m", "b", "r"):
        photo(32, 32).save(tmp_path / "shop" / f"{name}.png")
    table = tmp_path / "shop" / "t.csv"
    table.write_text("file,source,target,mask,background_mask,region\na.png,a cat,a dog,m.png,b.png,cat=r.png\n")
    config = EditTableConfig(table, output_dir=tmp_path / "out")
    row = read_rows(table)[0]
    options, hashes = row_options(row, config), [row_hash(row, config)]
    assert (options.mask, options.background_mask) == tuple(str(table.parent / name) for name in ("m.png", "b.png"))
    assert options.region == (f"cat={table.parent / 'r.png'}",)
    for name in ("a", "m", "b", "r"):
        photo(40, 32).save(tmp_path / "shop" / f"{name}.png")
        hashes.append(row_hash(row, config))
    for words in ({"prediction_type": "v_prediction"}, {"variant": "fp16"}, {"metadata": False}):
        hashes.append(row_hash(row, replace(config, **words)))
    hashes.append(row_hash(row, config, [["1"]]))
    assert len(set(hashes)) == len(hashes) == 9


def test_masks_count_whatever_their_folders_are_called(tmp_path):
    (shop := tmp_path / "run=3").mkdir()
    hashes = []
    for side in (32, 40):
        photo(32, 32).save(shop / "a.png")
        photo(side, 32).save(shop / "m=1.png")
        (shop / "t.csv").write_text("file,source,target,mask,region\na.png,a cat,a dog,m=1.png,cat=m=1.png\n")
        hashes.append(row_hash(read_rows(shop / "t.csv")[0], EditTableConfig(shop / "t.csv")))
    assert hashes[0] != hashes[1]


def test_every_file_of_an_adapter_counts(tmp_path):
    """PEFT's weights may lie in folders below, and its settings in a file of their own."""
    (tmp_path / "peft" / "unet").mkdir(parents=True)
    hashes, weights, settings = [], "adapter_model.safetensors", "adapter_config.json"
    for name, content in ((weights, "1"), (settings, "2"), (settings, "3")):
        (tmp_path / "peft" / "unet" / name).write_text(content)
        hashes += [adapter_hashes(tmp_path / "peft"), adapter_hashes(tmp_path / "peft" / "unet" / weights)]
    assert len({tuple(one) for one in hashes[::2]}) == len({tuple(one) for one in hashes[1::2]}) == 3


def test_cells_too_many_and_names_that_no_folder_has_cost_their_row_alone(base, tmp_path, capsys):
    """A cell moved by a comma in another one was taken for an option of the next column."""
    rows = ("p1.png,a cat, on a beach,cat=dog,a,,2,,", "p1.png,a cat,a dog,,what: now,,2,", "p2.png,a cat,a dog,,b,,2,",
            ",a cat,a dog,,,,2,")  # fmt: skip
    assert run(base, write(tmp_path, *rows), tmp_path / "out") == 2
    said = capsys.readouterr().out
    assert "line 2, a: not edited: the row has more cells than the header" in said
    assert "line 3, row-3: not edited: 'what: now' is no plain file name" in said
    assert "line 5, row-5: not edited: the cell of the column file is empty" in said
    assert (tmp_path / "out" / "b" / "edited.png").is_file() and "line 4, b:" in said


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("file,source,source\na.png,a cat,a dog\n")
    with pytest.raises(UserError, match="has the column 'source' twice"):
        read_rows(tmp_path / "t.csv")


def test_rows_have_the_marks_that_the_table_was_asked_for(base, tmp_path):
    """Rows took their own defaults: --no_metadata and --no_provenance did nothing."""
    table = write(tmp_path, "p1.png,a cat,a dog,,,,2,")
    for out, words in (("plain", ()), ("bare", ("--no_metadata", "--no_provenance"))):
        assert run(base, table, tmp_path / out, *words) == 0
        marks = read_marks(tmp_path / out / "p1" / "edited.png")
        assert (marks.details is None, marks.source_type is None) == ((out == "bare",) * 2)


def test_edit_means_a_table_when_it_is_given_one():
    assert options.resolve_command("edit", ["photos.CSV"]) == options.EDIT_TABLE
    assert options.resolve_command("edit", ["a.png", "--source", "t.csv"]) == options.EDIT_PHOTO


def test_rows_are_never_called_like_our_own_files_or_each_other(tmp_path):
    """A row "results.jsonl" had a folder where the outcomes are written; "Cat" and "cat" are one folder on a Mac."""
    names = ("results.jsonl", "Trajectories", "Cat", "cat", "a-7", "a", "a", "nul", "end.")
    table = write(tmp_path, *(f"p1.png,a cat,a dog,,{name},,2," for name in names))
    found = [row.name for row in read_rows(table)]
    assert found == ["results.jsonl-2", "Trajectories-3", "Cat", "cat-5", "a-7", "a", "a-8", "nul-9", "end-10"]
    table = write(tmp_path, *(f"p1.png,a cat,a dog,,{name},,2," for name in ("a", "a-4", "a")))
    assert [row.name for row in read_rows(table)] == ["a", "a-4", "a-4-2"]
