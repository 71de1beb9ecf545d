"""The front door and `personalize edit`, on random weights."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import personalize
from personalize.adapters.adapter import Adapter
from personalize.adapters.forgetting import parse_rule_sum
from personalize.adapters.textual_inversion import installed_tokens
from personalize.cli.main import main
from personalize.editing import editor as editor_module
from personalize.editing.config import EditStrengths, Sampling
from personalize.editing.editor import Editor
from personalize.editing.stored_strengths import remember
from personalize.errors import NonFiniteLatents, UserError
from tests.support.adapter_kinds import loha
from tests.support.lora_states import random_adapter, text_lora
from tests.support.tiny import tiny, tiny_folder

SHORT = Sampling(steps=2)


@pytest.fixture(scope="module")
def editor():
    model = tiny("sd1")
    return Editor(model, random_adapter(model))


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.int16)


def test_forgedit_c26_unedited_is_the_source(editor):
    """VP(1, 0) and VS(0) without forgetting are sampling with s itself: the very same pictures."""
    source = editor.reconstruct(sampling=SHORT)[0]
    projected = editor.edit("a dog in the snow", alpha=1.0, beta=0.0, sampling=SHORT)[0]
    subtracted = editor.edit("a dog in the snow", gamma=0.0, sampling=SHORT)[0]
    assert np.array_equal(array(source), array(projected))
    assert np.array_equal(array(source), array(subtracted))


def test_forgedit_c27_strength_zero_with_the_prompt_alone_is_the_base(editor):
    base = editor.base("a dog", sampling=SHORT)[0]
    off = editor.edit("a dog", gamma=1.0, strength=0.0, sampling=SHORT)[0]
    assert np.abs(array(base) - array(off)).max() <= 1  # zero times B·A is added; one grey level of rounding


def test_strength_zero_leaves_learned_tokens_in(editor):
    """They were split into letters, so that 0 was far from 0.000001, and from `attach` with the strength 0."""
    rows = {"<thing>": {"text_encoder": torch.ones(1, 32)}}
    model, learned = editor.model, replace(editor.adapter, source=None, concepts=rows)
    nearly, off = (Editor(model, learned).edit("a <thing>", strength=s, sampling=SHORT)[0] for s in (1e-6, 0.0))
    assert np.abs(array(nearly) - array(off)).max() <= 1
    with installed_tokens(model, rows):
        base = editor.base("a <thing>", sampling=SHORT)[0]
    assert np.abs(array(base) - array(off)).max() <= 1


def test_a_prompt_is_worded_like_the_caption_in_python_too(editor, tmp_path):
    """The command worded it alone, so that previews, Python and `attach` drew another picture of the same prompt."""
    own = replace(editor.adapter, info={**editor.adapter.info, "caption": "a photo of a cat"})
    drawn = Editor(editor.model, own)
    plain, worded = (drawn.edit(prompt, sampling=SHORT)[0] for prompt in ("a dog", "a photo of a dog"))
    assert plain.tobytes() == worded.tobytes() != editor.edit("a dog", sampling=SHORT)[0].tobytes()
    with personalize.attach(editor.model.pipeline(), own.save(tmp_path / "own")) as attached:
        assert torch.equal(attached.embeds("a dog"), attached.embeds("a photo of a dog"))
    bare = Editor(editor.model, replace(own, source=None))  # without a source embedding the prompt is no edit of it
    assert bare.edit("a dog", sampling=SHORT)[0].tobytes() != bare.edit("a photo of a dog", sampling=SHORT)[0].tobytes()


def test_a_prompt_of_two_chunks_continues_the_source_as_by_attach(editor, tmp_path, monkeypatch):
    """The empty chunk behind a source of 77 tokens was read without the adapter's LoRA of the text encoder."""
    text = text_lora(editor.model, spread=0.5)
    both = replace(editor.adapter, lora={**editor.adapter.lora, **text})
    prompt = "a dog on the beach " * 20
    with personalize.attach(editor.model.pipeline(), both.save(tmp_path / "both")) as attached:
        expected = attached.embeds(prompt)
    drawn = Editor(editor.model, both)
    monkeypatch.setattr(drawn, "_sample", lambda conditioning, *rest: conditioning)
    assert expected.shape[1] == 154 and torch.equal(drawn.edit(prompt).embeds, expected)


def test_a_rule_for_an_adapter_without_a_part_in_the_unet_is_refused_as_by_attach(editor):
    """It did nothing, and said nothing."""
    text = Editor(editor.model, replace(editor.adapter, lora=text_lora(editor.model)))
    with pytest.raises(UserError, match="which this adapter does not change: leave it out"):
        text.edit("a dog", forget="decoder", sampling=SHORT)


def test_strengths_and_rules_show(editor):
    pictures = [
        editor.edit("a dog in the snow", setting, sampling=SHORT)[0]
        for setting in (EditStrengths(), EditStrengths(beta=2.0), EditStrengths(alpha=0.2), EditStrengths(gamma=0.9),
                        EditStrengths(forget="decoder"), EditStrengths(forget="decoder=0.5"),
                        EditStrengths(forget="encoderattn+encoder1"), EditStrengths(forget="encoder+decoder"))
    ]  # fmt: skip
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_seeds_are_pictures_of_their_own(editor):
    pair = editor.edit("a dog", seeds=[3, 4], sampling=SHORT)
    assert pair[0].tobytes() != pair[1].tobytes()
    alone = editor.edit("a dog", seeds=[4], sampling=SHORT)[0]
    assert np.abs(array(pair[1]) - array(alone)).max() <= 1  # a batch of two sums in another order


def test_the_base_is_drawn_without_changes_that_are_no_lora_too(tmp_path):
    """Inside a `with` block the base's picture was the adapter's."""
    save_file(loha().tensors, tmp_path / "loha.safetensors")
    editor = Editor(tiny("sd1"), Adapter.load(tmp_path / "loha.safetensors"))
    plain = editor.base("a dog", sampling=SHORT)[0]
    with editor:
        inside, edited = editor.base("a dog", sampling=SHORT)[0], editor.edit("a dog", sampling=SHORT)[0]
        again = editor.edit("a dog", sampling=SHORT)[0]
    assert inside.tobytes() == plain.tobytes() != edited.tobytes() == again.tobytes()


def test_nothing_is_left_in_the_base(editor):
    before = {name: tensor.clone() for name, tensor in editor.model.unet.state_dict().items()}
    with pytest.raises(UserError, match="unknown forgetting rule"):
        editor.edit("a dog", forget="decodr", sampling=SHORT)
    editor.edit("a dog", sampling=SHORT)
    after = editor.model.unet.state_dict()
    assert list(before) == list(after) and all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("none", []),
        ("encoderattn+encoder1=0.5", ["encoderattn+encoder1=0.5"]),
        ("encoder+decoder=0.5", ["noencoder", "nodecoder=0.5"]),
        ("nodecoder=0.5+noencoder=0.25", ["nodecoder=0.5", "noencoder=0.25"]),
        ("nodecoder + EncoderAttn+encoder1 = 0.5+ nokv", ["nodecoder", "encoderattn+encoder1=0.5", "nokv"]),
        ("encoderattn + encoder1 + nodecoder", ["encoderattn+encoder1", "nodecoder"]),
    ],
)
def test_rules_joined_by_a_plus_of_which_one_has_a_plus_in_its_name(text, rules):
    assert [str(rule) for rule in parse_rule_sum(text)] == rules


def test_an_empty_prompt_and_no_seeds_are_refused(editor):
    with pytest.raises(UserError, match="prompt is empty"):
        editor.edit("  ", sampling=SHORT)
    with pytest.raises(UserError, match="there are no seeds"):
        editor.edit("a dog", seeds=[], sampling=SHORT)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("edit")
    base = tiny_folder("sd1", place)
    return base, random_adapter(tiny("sd1")).save(place / "adapter"), place


def edit(places, *words: str) -> int:
    base, adapter, place = places
    return main(["edit", str(adapter), "--pretrained_model_name_or_path", str(base), "--output_dir", str(place / "out"),
                 "--num_inference_steps", "2", *words])  # fmt: skip


def newest_entries(folder):
    """The entries of the newest edit in `folder`, whose files are numbered on from those of earlier edits."""
    return json.loads(max(folder.glob("edits*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


def test_the_command_writes_every_combination_and_a_grid(places):
    out = places[2] / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    grid = ["--beta", "0.8", "1.2", "--forget", "none", "decoder=0.5", "--num_images", "2"]
    assert edit(places, "--prompt", "a dog", *grid) == 0
    found = json.loads((out / "edits.json").read_text())
    assert len(found) == 8 and len({(f["beta"], f["forget"], f["seed"]) for f in found}) == 8
    assert all(Image.open(out / entry["file"]).size == (64, 64) for entry in found)
    assert Image.open(out / "grid.png").width > 2 * 64
    assert (out / "mine.txt").read_text() == "keep me"
    first = (out / found[0]["file"]).read_bytes()
    assert edit(places, "--prompt", "a dog", "--beta", "0.8", "--num_images", "2") == 0
    assert (out / "edit-008.png").read_bytes() == first, "the same seed and settings give the same picture"
    assert (out / "edit-000.png").read_bytes() == first, "the pictures of the former edit are kept"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a dog", "--forget", "decodr"], "nodecoder"),
        (["--prompt", "a dog", "--scheduler", "dim"], "unknown --scheduler"),
        (["--prompt", "a dog", "--height", "63"], "multiples"),
    ],
)
def test_mistakes_are_one_line_and_code_2(places, capsys, words, message):
    assert edit(places, *words) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line and line.startswith("personalize: ")


@pytest.mark.parametrize("size", [[10**6, 10**6], [0, 64], [-8, 8], [64], [64, 64, 64], "64", [6.5, 64], {"h": 64}, 7])
def test_a_size_that_the_base_cannot_draw_is_refused_before_anything_is_allocated(editor, size):
    hostile = Editor(editor.model, replace(editor.adapter, info={**editor.adapter.info, "size": size}))
    with pytest.raises(UserError, match="the adapter says it was trained at"):
        hostile.edit("a cat", seeds=[0])


def test_an_open_editor_holds_the_adapter_and_draws_the_same(editor):
    """Also the base without it, and after the block the base is as before."""
    prompt, setting = "a dog in the snow", EditStrengths(forget="decoder=0.5")
    apart = [editor.edit(prompt, setting, sampling=SHORT)[0], editor.base(prompt, sampling=SHORT)[0]]
    before = {name: tensor.clone() for name, tensor in editor.model.unet.state_dict().items()}
    with editor as held:
        together = [held.edit(prompt, setting, sampling=SHORT)[0], held.base(prompt, sampling=SHORT)[0]]
        assert held.edit(prompt, setting, sampling=SHORT)[0].tobytes() == together[0].tobytes()
        with pytest.raises(ValueError, match="in a `with` block already"), held:
            pass
    assert [one.tobytes() for one in apart] == [one.tobytes() for one in together]
    after = editor.model.unet.state_dict()
    assert list(before) == list(after) and all((before[name] == after[name]).all() for name in before)


def test_an_open_editor_leaves_no_trace_when_its_body_raises(editor):
    names = list(editor.model.unet.state_dict())
    with pytest.raises(RuntimeError, match="mine"), editor:
        raise RuntimeError("mine")
    assert list(editor.model.unet.state_dict()) == names
    editor.edit("a dog", sampling=SHORT)  # and it works as before


def test_strengths_that_were_not_given_are_the_remembered_ones(places, capsys):
    base, adapter, place = places
    remember(adapter, "a cat in the snow", EditStrengths(alpha=0.7, beta=1.5, forget="encoderattn"), 9, {})
    assert edit(places, "--prompt", "a cat in the snow") == 0
    assert "Using what --auto chose" in capsys.readouterr().out
    (found,) = newest_entries(place / "out")
    assert (found["alpha"], found["beta"], found["forget"], found["seed"]) == (0.7, 1.5, "encoderattn", 9)
    assert edit(places, "--prompt", "a cat in the snow", "--beta", "1.0") == 0
    (found,) = newest_entries(place / "out")
    assert (found["alpha"], found["beta"], found["forget"], found["seed"]) == (0.8, 1.0, "none", 0)
    assert "Using what" not in capsys.readouterr().out


def test_a_prompt_is_worded_like_the_caption(places, capsys):
    assert edit(places, "--prompt", "a picture of a cat in the snow") == 0
    assert "Worded like the caption: “a cat in the snow”" in capsys.readouterr().out
    (found,) = newest_entries(places[2] / "out")
    assert found["prompt"] == "a cat in the snow"


@pytest.mark.parametrize(("name", "scale"), [("", 7.5), ("embedded", 4.0)])
def test_guidance_that_is_not_given_is_what_suits_the_base(editor, monkeypatch, name, scale):
    monkeypatch.setattr(editor.model, "name", name)
    given = editor.base("a dog", sampling=Sampling(steps=2, guidance_scale=scale))[0]
    assert editor.base("a dog", sampling=SHORT)[0].tobytes() == given.tobytes()


def test_a_picture_of_latents_that_are_not_finite_is_an_error_that_names_the_dial(editor, monkeypatch):
    """It was all black, with exit code 0."""
    monkeypatch.setattr(editor_module, "sample", lambda *_: torch.full((1, 4, 8, 8), float("nan")))
    for dial, value in (("beta", 15.0), ("alpha", 12.0), ("strength", -9.0), ("gamma", 11.0)):
        with pytest.raises(NonFiniteLatents, match=f"lower {dial}, which is {value:g}"):
            editor.edit("a dog", **{dial: value}, sampling=SHORT)
    with pytest.raises(NonFiniteLatents, match="lower guidance_scale, which is 90"):
        editor.base("a dog", sampling=Sampling(2, guidance_scale=90.0))
    with pytest.raises(UserError, match="alpha is nan"):
        editor.edit("a dog", alpha=float("nan"), sampling=SHORT)
