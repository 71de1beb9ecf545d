"""Rows of a catalogue that name several pictures, their masks, captions and class pictures."""

from __future__ import annotations

import pytest
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.training import catalogue
from personalize.training.catalogue import Catalogue
from personalize.training.catalogue_table import read_items
from personalize.training.run_options import PriorPreservationOptions
from tests.support.catalogues import SHORT, learned, table
from tests.support.tiny import tiny


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


def test_places_of_class_pictures_are_relative_to_the_table(studio, monkeypatch):
    """A cache and a local data set were looked for where the command runs."""
    monkeypatch.chdir("/")
    header = "image,caption,class_prompt,class_dataset_name,class_image_cache"
    lines = ("mug/front.png,a cat,a cat,cats,drawn", "mug/back.png,a cat,a cat,owner/cats,")
    items, refused = read_items(table(studio, *lines, header=header), SHORT)
    assert not refused
    first, second = (item.sources for item in items)
    assert (first.class_dataset_name, first.class_image_cache) == (str(studio / "cats"), studio / "drawn")
    assert (second.class_dataset_name, second.class_image_cache) == ("owner/cats", None)
    assert first.with_prior_preservation and second.with_prior_preservation
    shared, before = Catalogue(studio / "out", SHORT), Catalogue(studio / "out", SHORT).row_hash(items[0])
    Image.new("RGB", (64, 96), "navy").save(studio / "cats" / "any.png")
    assert shared.row_hash(items[0]) != before


def test_a_rows_own_place_of_class_pictures_takes_the_place_of_the_common_one(studio):
    """A row's class_dataset_name was not read beside a common class_data_dir."""
    header = "image,caption,name,class_prompt,class_data_dir,class_dataset_name"
    lines = ("mug/front.png,a cat,a,a cat,,owner/cats", "mug/front.png,a cat,b,a cat,,", "mug,a cat,c,a cat,cats,x")
    common = PriorPreservationOptions(with_prior_preservation=True, class_data_dir=studio / "cats")
    items, (refused,) = read_items(table(studio, *lines, header=header), SHORT, common)
    places = [(item.sources.class_data_dir, item.sources.class_dataset_name) for item in items]
    assert places == [(None, "owner/cats"), (studio / "cats", None)]
    assert "class pictures come from one place, got class_data_dir" in refused["reason"]


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
