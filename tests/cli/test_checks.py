"""Mistakes in paths, prompts and combinations are found before torch is imported; options without effect are said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from personalize.cli.checks import check_tokens
from personalize.cli.edit_options import EditConfig
from personalize.cli.launch import load_script
from personalize.cli.lists import repeated
from personalize.cli.main import main
from personalize.cli.options import QuickstartConfig
from personalize.errors import Notice, UserError
from tests.support.user_errors import MISTAKES, make_place

ROOT = Path(__file__).parents[2]
CHILD = """
import contextlib, io, json, shlex, sys
from personalize.cli.launch import load_script
from personalize.cli.main import main
from personalize.cli.options import QuickstartConfig
from personalize.errors import Notice
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(command))
    print(json.dumps([code, err.getvalue(), "torch" in sys.modules]))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mistakes_are_one_line_found_before_torch(place: Path) -> None:
    mistakes = [mistake for mistake in MISTAKES if not mistake.loads]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([mistake.command for mistake in mistakes]),
        capture_output=True, text=True, env=environment, cwd=place,
    )  # fmt: skip
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(rows) == len(mistakes), child.stderr
    for mistake, (code, said, torch) in zip(mistakes, rows, strict=True):
        assert code == 2 and mistake.says in said and said.count("\n") == 1, (mistake.command, code, said)
        assert said.startswith("personalize: ") and not torch, mistake.command
    assert {path.name for path in place.iterdir()}.isdisjoint({"adapter", "personalize-edit"})  # nothing was written


def test_tokens_are_known_in_any_capitals(tmp_path: Path) -> None:
    """As by the tokenizer: `attach` and ComfyUI's node took what the commands refused."""
    (tmp_path / "adapter.json").write_text('{"concepts": {"<rex>": {}}}')
    check_tokens(["a <Rex> dog"], [tmp_path])
    with pytest.raises(UserError, match="says <max>, which the adapter has not learned: it has <rex>"):
        check_tokens(["a <max> dog"], [tmp_path])


def test_a_folder_says_what_it_holds_and_which_options_have_no_effect(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "pictures" / "notes.pdf").write_bytes(b"%PDF")
    (place / "pictures" / "1.txt").write_text("a cat")
    script = load_script(ROOT / "train" / "single_image.py")
    config = script.Config(picture=(Path("pictures"),), caption="a dog", class_prompt="x", class_data_dir=Path("empty"),
                           resume_from_checkpoint="latest")  # fmt: skip
    with pytest.warns(Notice) as notices:
        config.check()
    assert capsys.readouterr().out == "2 pictures in pictures\nleft out of pictures, no picture: notes.pdf\n"
    assert [str(one.message) for one in notices] == [
        f"there is no checkpoint in {config.output_dir} to resume from: training begins anew",
        "without --with_prior_preservation no class pictures are used, so that nothing comes of --class_prompt and "
        "--class_data_dir",
        "1 of 2 pictures in pictures have a caption of their own; --caption for the other 1",
    ]


def test_notes_are_lines_before_the_mistake(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note is one line on stderr, and comes before the mistake that ends this command."""
    words = "photo.png --caption a --class_data_dir empty --resume_from_checkpoint latest --dataset_name x"
    assert main(["train", "single_image", *words.split()]) == 2
    notes = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in notes] == [
        "Note", "Note", "personalize"
    ]  # fmt: skip


def test_a_second_training_has_a_folder_of_its_own(place: Path) -> None:
    """Without --output_dir it replaced the first adapter."""
    config = load_script(ROOT / "train" / "single_image.py").Config
    assert config().output_dir == Path("adapter")
    Path("adapter").mkdir()
    Path("adapter", "adapter.json").touch()
    assert config().output_dir == Path("adapter-2")
    assert QuickstartConfig().output_dir == Path("personalize-quickstart")


DRAG = "drag photo.png --from 1,2 --to 3,4 --mask missing.png"
EDIT = "edit photo.png --source cat --target dog --mask missing.png"


@pytest.mark.parametrize(
    ("command", "note"),
    [
        (f"{EDIT} --region cat=1,2,3,4 --nouns cat", "nothing comes of --nouns and --region without --dpl or --report"),
        (f"{EDIT} --dpl --region cat=1,2,3,4 --nouns cat --dpl_updates 3", None),
        (f"{EDIT} --report --region cat=1,2,3,4", None),
        (f"{EDIT} --uniform_until 0.5", "nothing comes of --uniform_until without --uniform"),
        (f"{EDIT} --null_text_iterations 3", "nothing comes of --null_text_iterations without --inversion null-text"),
        (f"{EDIT} --inversion null-text --null_text_iterations 3 --gradient_checkpointing", None),
        (f"{EDIT} --controller mutual --no_bind_adjectives --cross_replace_steps 0.5",
         "nothing comes of --cross_replace_steps and --no_bind_adjectives without --controller p2p"),
        (f"{EDIT} --weight cat=2 --cross_replace_steps 0",
         "nothing comes of --weight without --cross_replace_steps above 0"),
        (f"{EDIT} --weight cat=2 --cross_replace_steps 0.5", None),
        (f"{EDIT} --inversion null-text --guidance_scale 1 --null_text_iterations 3",
         "nothing comes of --null_text_iterations without --guidance_scale above 1"),
        (f"{EDIT} --guidance_scale 1 --null_text_iterations 3",
         "nothing comes of --null_text_iterations without --inversion null-text"),
        (f"{EDIT} --seed 7", "nothing comes of --seed without --inversion ddpm or none"),
        (f"{EDIT} --seed 7 --inversion ddpm", None),
        (f"{EDIT} --mode replace --no_bind_adjectives",
         "nothing comes of --no_bind_adjectives without --mode auto or refine"),
        (f"{EDIT} --uniform --uniform_quantile 0.9", "nothing comes of --uniform_quantile beside --mask"),
        (f"{EDIT} --dpl --region cat=1,2,3,4 --background_mask none",
         "nothing comes of --background_mask beside --region"),
        (f"{EDIT} --dpl --background_mask none", None),
        (f"{EDIT} --report --inversion ddpm --trajectory kept --attention_maps",
         "nothing comes of --inversion and --trajectory and --attention_maps beside --report"),
        (f"{DRAG} --method latents --grow 5", "nothing comes of --grow without --method pixels"),
        (f"{DRAG} --no_refine --mask_most 0.6", "nothing comes of --mask_most and --no_refine beside --mask"),
        (f"{DRAG} --mask_threshold 0.5 --user_mask intersect --seed 3", None),
        (f"{DRAG} --method latents --seed 3 --fill bnni", "nothing comes of --seed without --fill attention"),
        (f"{DRAG} --method latents --seed 3 --fill attention", None),
        (f"{DRAG} --paste", "nothing comes of --paste without --method latents"),
        (f"{DRAG} --method latents --paste --mode deform --displacement stretch --user_mask intersect", None),
        (f"{DRAG} --region_map affine", "nothing comes of --region_map without --mode region"),
        ("train single_image missing.png --hub_model_id a/b", "nothing comes of --hub_model_id without --push_to_hub"),
        ("train single_image missing.png --checkpoints_total_limit 2", None),
        ("train single_image missing.png --prior_loss_weight 2",
         "nothing comes of --prior_loss_weight without --with_prior_preservation"),
        ("train multi_concept missing.png --prior_loss_weight 2", None),
        ("train single_image missing.png --logging_dir x", "nothing comes of --logging_dir without --report_to"),
    ],
)  # fmt: skip
def test_an_option_without_the_one_it_belongs_to_is_said(place: Path, capsys, command: str, note: str | None) -> None:
    """--region without --dpl, --grow with the method latents and others were taken, and did nothing, without a word."""
    assert main(command.split()) == 2  # a picture is missing, which ends the command before anything is loaded
    said = capsys.readouterr().err.splitlines()
    assert said[:-1] == ([f"Note: {note}"] if note else []) and "missing.png: no such file" in said[-1]


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--rank 4 --rank=8", "--rank is given twice: the last, 8, is taken"),
        ("--network_dim 4 --caption x --rank 8", "--rank is given twice: the last, 8, is taken"),
        ("--seed 1 --seed 2 --seed 3", "--seed is given 3 times: the last, 3, is taken"),
        ("--random_flip --no_random_flip", "--random_flip is given twice: the last, --no_random_flip, is taken"),
        ("--instance_mask a.png --instance_mask b.png", "--instance_mask is given twice: the last, b.png, is taken"),
        ("--rank 8 --rank 8 --config a.yaml", None),
        ("--caption x --rank 4", None),
    ],
)
def test_an_option_of_one_value_given_twice_is_said(place: Path, capsys, words: str, note: str | None) -> None:
    """The last was taken without a word.  A value in a file and another on the command line is no repetition."""
    Path("a.yaml").write_text("rank: 2\n")
    assert main(["train", "single_image", "missing.png", *words.split()]) == 2
    *notes, _ = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("Note: ") for line in notes] == ([] if note is None else [note])


def test_a_negative_prompt_without_guidance_is_said(place: Path) -> None:
    """At scale 1 there is no pass that would read it, and nothing said so."""
    words = {"adapter": Path("plain"), "prompt": "a cat", "negative_prompt": "rain"}
    with pytest.warns(Notice, match="nothing comes of --negative_prompt without --guidance_scale above 1"):
        EditConfig(**words, guidance_scale=1.0).check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditConfig(**words).check()
        EditConfig(**words, guidance_scale=2.0).check()


def test_options_that_list_may_be_repeated() -> None:
    words = ["--alpha", "1", "--alpha", "2", "--seed", "1"]
    assert not list(repeated(words, lists={"alpha"}, switches=set()))
