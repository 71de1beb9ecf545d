"""A source embedding for each caption: which one an edit starts from, and adapters that have one alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import personalize
from personalize.adapters.adapter import Adapter
from personalize.adapters.captions import nearest_caption
from personalize.adapters.merging import merged
from personalize.cli.commands.edit import starting_from
from personalize.cli.edit_options import EditConfig
from personalize.cli.main import main
from personalize.editing.config import Sampling
from personalize.editing.drag.reading import conditioning
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.evaluation.scoring import Request, Scores
from personalize.formats.inspection import inspect_file
from personalize.formats.inspection_report import report
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.config import SingleImageConfig
from personalize.training.data.buckets import FittedImage
from personalize.training.single_image import learn
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny, tiny_folder, tiny_pipeline

CAPTIONS = ["a photo of a cat on the beach", "a photo of a cat in snow", "the red fox sitting"]


def several(model: StableDiffusion, rows: int = 3) -> Adapter:
    """A random adapter of three captions, with the embeddings of `rows` of them."""
    adapter = random_adapter(model)
    with torch.no_grad():
        encoded = model.prompts(CAPTIONS[:rows])
    parts = {"embeds": encoded.embeds, "pooled": encoded.pooled}
    source = {name: 1.5 * part for name, part in parts.items() if part is not None}
    return replace(adapter, source=source, info={**adapter.info, "caption": CAPTIONS[0], "captions": CAPTIONS})


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("a photo of a cat in snow", 1),
        ("a photo of a dog in snow", 1),
        ("a photo of a dog on the mountain", 0),
        ("The red DOG sitting", 2),
        ("blue", 0),
        ("", 0),
    ],
)
def test_the_caption_with_most_words_of_the_prompt_is_nearest(prompt: str, number: int) -> None:
    assert nearest_caption(prompt, CAPTIONS) == number


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_caption_keeps_its_embedding(tmp_path: Path, family: str) -> None:
    """The first caption's alone was saved, so that pictures of the others could not be edited."""
    adapter = several(tiny(family))
    assert adapter.source is not None
    adapter.save(tmp_path / "cat")
    loaded = Adapter.load(tmp_path / "cat")
    assert loaded.captions == tuple(CAPTIONS) and loaded.source is not None
    assert set(loaded.source) == ({"embeds", "pooled"} if family == "sdxl" else {"embeds"})
    for number, caption in enumerate(CAPTIONS):
        for chosen in (loaded.starting_from(caption.upper()), loaded.starting_from(prompt=caption)):
            assert chosen.captions == (caption,) and chosen.source is not None
            for name, rows in adapter.source.items():
                assert torch.equal(chosen.source[name], rows[number : number + 1])
    with pytest.raises(UserError, match="did you mean a photo of a cat in snow or"):
        loaded.starting_from("a photo of a hat in snow")
    card = (tmp_path / "cat" / "README.md").read_text()
    assert "3 fitted source embeddings" in card and "\n".join(["```text", *CAPTIONS, "```"]) in card
    said = report(inspect_file(tmp_path / "cat" / "pytorch_lora_weights.safetensors"))
    assert all(f"caption     {caption}" in said for caption in CAPTIONS)


def test_an_adapter_that_kept_the_first_caption_alone_still_loads(tmp_path: Path) -> None:
    model = tiny("sd1")
    old = several(model, rows=1)
    old.save(tmp_path / "old")
    loaded = Adapter.load(tmp_path / "old")
    assert loaded.captions == (CAPTIONS[0],) and loaded.info["captions"] == CAPTIONS
    assert loaded.starting_from(prompt=CAPTIONS[2]).captions == (CAPTIONS[0],)
    first = Editor(model, loaded).edit(CAPTIONS[2], sampling=Sampling(2))
    assert first[0].tobytes() == Editor(model, old).edit(CAPTIONS[2], sampling=Sampling(2))[0].tobytes()


def test_rows_and_captions_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected embeds \(3, l, d\)"):
        several(tiny("sd1"), rows=2).save(tmp_path / "cat")
    several(tiny("sd1")).save(tmp_path / "cat")
    manifest = tmp_path / "cat" / "adapter.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"captions": CAPTIONS[:2]}))
    with pytest.raises(UserError, match=r"expected embeds \(2, l, d\)"):
        Adapter.load(tmp_path / "cat")


def test_edit_attach_and_drag_start_from_the_nearest_caption() -> None:
    model = tiny("sd1")
    adapter = several(model)
    editor = Editor(model, adapter)
    near = editor.edit("a photo of a dog in snow", sampling=Sampling(2))[0]
    same = Editor(model, adapter.starting_from(CAPTIONS[1])).edit("a photo of a dog in snow", sampling=Sampling(2))[0]
    other = Editor(model, adapter.starting_from(CAPTIONS[2])).edit("a photo of a dog in snow", sampling=Sampling(2))[0]
    assert near.tobytes() == same.tobytes() != other.tobytes()
    assert editor.caption_for("a photo of a dog in snow") == CAPTIONS[1] and editor.caption == CAPTIONS[0]
    assert adapter.source is not None
    assert torch.equal(conditioning(model, adapter, None, (64, 64)).embeds, adapter.source["embeds"][:1])


def test_attach_starts_from_the_nearest_caption(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    adapter = several(tiny("sd1"))
    adapter.save(tmp_path / "cat")
    with personalize.attach(pipe, tmp_path / "cat") as attached:
        embeds = attached.embeds(CAPTIONS[2], alpha=1.0, beta=0.0)
    assert adapter.source is not None and torch.equal(embeds, adapter.source["embeds"][2:])


def test_the_command_says_where_it_starts_and_takes_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder("sd1", tmp_path)
    several(StableDiffusion.load(base)).save(tmp_path / "cat")
    line = ["edit", str(tmp_path / "cat"), "--prompt", "a photo of a dog in snow", "--num_inference_steps", "1",
            "--output_dir", str(tmp_path / "out"), "--pretrained_model_name_or_path", str(base)]  # fmt: skip
    assert main(line) == 0
    assert f"Starts from “{CAPTIONS[1]}”, one of 3 captions, the nearest" in capsys.readouterr().out
    assert main([*line, "--source_caption", CAPTIONS[0]]) == 0
    assert f"Starts from “{CAPTIONS[0]}”, one of 3 captions\n" in capsys.readouterr().out
    first, second = (tmp_path / "out" / name for name in ("edit-000.png", "edit-001.png"))
    assert first.read_bytes() != second.read_bytes()
    assert main([*line, "--source_caption", "a dog"]) == 2
    assert "learned no picture with the caption 'a dog'" in capsys.readouterr().err


def test_an_edit_is_drawn_again_from_the_caption_that_it_started_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was worded, the prompt is nearer to another caption, from which `--from` and `choose` then started."""
    base = tiny_folder("sd1", tmp_path)
    model = StableDiffusion.load(base)
    adapter, long = several(model), "a photo of a dog in the snow on the beach of my mountain wearing a red hat"
    adapter = replace(adapter, info={**adapter.info, "caption": long, "captions": [long, *CAPTIONS[1:]]})
    own, _, other = adapter.captions
    assert adapter.starting_from(prompt="hat").captions == (own,)
    assert adapter.starting_from(prompt="a photo of hat").captions != (own,)
    adapter.save(tmp_path / "cat")
    line = ["--num_inference_steps", "1", "--pretrained_model_name_or_path", str(base), "--output_dir"]
    assert main(["edit", str(tmp_path / "cat"), "--prompt", "hat", *line, str(tmp_path / "out")]) == 0
    assert main(["edit", "--from", str(tmp_path / "out" / "edit-000.png"), *line, str(tmp_path / "again")]) == 0
    first, again = (tmp_path / name / "edit-000.png" for name in ("out", "again"))
    assert first.read_bytes() == again.read_bytes()
    capsys.readouterr()
    assert main(["edit", "--from", str(first), "--prompt", CAPTIONS[1], *line, str(tmp_path / "other")]) == 0
    assert f"Starts from “{CAPTIONS[1]}”" in capsys.readouterr().out, "another prompt finds its own caption"
    requests: list[Request] = []

    def scorer(pictures: Sequence[Image.Image], request: Request) -> list[Scores]:
        requests.append(request)
        return [Scores(0.9, 0.9, 0.5)]

    scorer.name, scorer.copy_distance, scorer.lost_distance = "fixed", 0.2, 0.6  # pyright: ignore
    editor = Editor(model, adapter)
    (best,) = editor.choose("hat", Image.new("RGB", (64, 64)), budget=1, scorer=scorer, sampling=Sampling(1))  # pyright: ignore
    assert (requests[0].prompt, requests[0].caption) == ("a photo of hat", own)
    assert best.picture.tobytes() == editor.edit("hat", best.strengths, sampling=Sampling(1))[0].tobytes()


def test_a_search_compares_with_the_picture_that_it_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder holds the first picture alone, with which every search was compared."""
    base = tiny_folder("sd1", tmp_path)
    several(StableDiffusion.load(base)).save(tmp_path / "cat", pictures={"source": Image.new("RGB", (64, 64))})
    line = ["edit", str(tmp_path / "cat"), "--prompt", "a photo of a dog in snow", "--auto",
            "--output_dir", str(tmp_path / "out"), "--pretrained_model_name_or_path", str(base)]  # fmt: skip
    assert main(line) == 2
    assert f"source.png, the picture of “{CAPTIONS[0]}”" in capsys.readouterr().err
    for own in (["--source_caption", CAPTIONS[0]], ["--source_image", str(tmp_path / "cat" / "source.png")]):
        assert main([*line, *own]) == 2
        assert "need a CLIP model" in capsys.readouterr().err


def test_an_edit_has_the_shape_of_the_picture_that_it_starts_from(tmp_path: Path) -> None:
    """All had the first picture's, in which the others were never learned."""
    base = tiny_folder("sd1", tmp_path)
    model, shapes = StableDiffusion.load(base), [(64, 64), (32, 96), (96, 32)]
    images = [FittedImage(torch.zeros(1, 3, *size)) for size in shapes]
    config = SingleImageConfig(rank=2, max_train_samples=3, samples_per_update=3, targets="attention")
    learned = learn(model, images, CAPTIONS, config)
    assert learned.info["size"] == [64, 64] and learned.info["caption_sizes"] == [list(size) for size in shapes]
    assert "caption_sizes" not in learn(model, images, CAPTIONS[0], config).info
    learned.save(tmp_path / "cat")
    editor = Editor(model, Adapter.load(tmp_path / "cat"))
    sizes = [editor.edit(caption, sampling=Sampling(1))[0].size for caption in CAPTIONS]
    assert sizes == [(width, height) for height, width in shapes] and editor.size == (64, 64)
    assert editor.base(CAPTIONS[1], sampling=Sampling(1))[0].size == (96, 32)
    assert editor.edit(CAPTIONS[1], sampling=Sampling(1, size=(64, 32)))[0].size == (32, 64)
    line = ["edit", str(tmp_path / "cat"), "--prompt", CAPTIONS[2], "--num_inference_steps", "1",
            "--output_dir", str(tmp_path / "out"), "--pretrained_model_name_or_path", str(base)]  # fmt: skip
    assert main(line) == 0
    assert Image.open(tmp_path / "out" / "edit-000.png").size == (32, 96)


def test_an_edit_beside_a_lora_without_a_caption_starts_from_the_nearest_caption(capsys):
    """As the same edit without that LoRA, and says so; a sum without a source embedding starts from none."""
    model = tiny("sd1")
    adapter, style = several(model), replace(random_adapter(model, 3), source=None)
    style = replace(style, info={**style.info, "caption": ""})
    config = EditConfig(Path("cat"), prompt="a photo of a dog in snow")
    for parts, said in (([adapter, style], True), ([replace(adapter, source=None), style], False)):
        summed = merged(parts, [1.0, 1.0], "ab", in_memory=True)
        chosen, editor = starting_from(config, Editor(model, summed))
        assert (chosen.source_caption, editor.caption) == ((CAPTIONS[1], CAPTIONS[1]) if said else (None, CAPTIONS[0]))
        assert ("Starts from" in capsys.readouterr().out) == said
