"""Options: flags over a YAML file, every mistake one sentence that names the nearest."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from personalize.cli.edit_options import EditConfig, PhotoConfig
from personalize.cli.parser import parse
from personalize.errors import UserError
from personalize.training.config import MultiConceptConfig, SingleImageConfig


@dataclass(frozen=True)
class Config:
    """A trainer's options in miniature."""

    output_dir: Path
    """Where."""
    photo: Positional[Path | None] = None
    """A picture."""
    rank: int = 4
    """Rank."""
    lora_alpha: float = 4.0
    """Alpha."""
    learning_rate: float = 1e-4
    """Rate."""
    center_crop: bool = False
    """Crop?"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """Precision."""
    nouns: tuple[str, ...] = ("cat",)
    """Nouns."""


def read(*args: str, **kwargs) -> Config:
    return parse(Config, args, prog="miniature", **kwargs)


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate"])
def test_dashes_and_underscores_are_the_same(flag: str):
    assert read("--output-dir", "x", flag, "1e-3").learning_rate == 1e-3
    assert read("--output_dir=x", f"{flag}=1e-3").learning_rate == 1e-3


def test_a_diffusers_command_line_pastes():
    line = "--output_dir out --rank 8 --center_crop --mixed_precision fp16 --learning_rate=1e-04"
    assert read(*line.split()) == Config(Path("out"), None, 8, 4.0, 1e-4, True, "fp16")


def test_what_sd_scripts_calls_rank_and_alpha():
    config = read("--output_dir", "x", "--network_dim", "16", "--network-alpha=8")
    assert (config.rank, config.lora_alpha) == (16, 8.0)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--rnak", "3"], "unknown option --rnak: did you mean --rank?"),
        (["--no_center-crp"], "unknown option --no_center_crp: did you mean --center_crop?"),
        (["--no_rank"], "unknown option --no_rank"),
        (["--zzz"], "unknown option --zzz: choose one of --center_crop, --config, --learning_rate"),
        ([], "miniature needs --output_dir (see miniature --help)"),
        (["--output_dir", "x", "--rank", "many"], "--rank is 'many', expected a whole number"),
        (["--output_dir", "x", "--learning_rate", "1,5"], "--learning_rate is '1,5', expected a number"),
        (["--output_dir", "x", "--rank"], "--rank needs a value, got nothing"),
        (["--output_dir", "x", "--mixed_precision", "fp8"], "--mixed_precision is 'fp8': choose one of no, fp16, bf16"),
        (["--output_dir", "x", "a.png", "b.png"], "b.png is more than the command takes"),
        (["--output_dir", "x", "--center_crop", "--config"], "--config needs a value, got nothing"),
        (["--config", "--rank", "4"], "--config needs a value, got --rank"),
        (["--output_dir", "x", "--config", "none.yaml"], "--config none.yaml: no such file"),
    ],
)
def test_mistakes_on_the_line_are_one_sentence(args: list[str], says: str):
    with pytest.raises(UserError) as caught:
        read(*args)
    assert says in str(caught.value) and "\n" not in str(caught.value) and "│" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('random_flip: "no"', "bad.yaml: random_flip is 'no', expected true or false"),
        ("rank: 4\nnetwork_dim: 8", "'rank' stands there twice, as rank and network_dim"),
        ("random_flip: 1", "bad.yaml: random_flip is 1, expected true or false"),
        ("seed: true", "--seed is 'true', expected a whole number"),
        ("rank: 1.5", "--rank is '1.5', expected a whole number"),
    ],
)
def test_yaml_of_another_type_is_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        parse(SingleImageConfig, ["--config", str(tmp_path / "bad.yaml")], prog="train")


def test_yaml_gives_defaults_and_flags_win_wherever_it_stands(tmp_path: Path):
    file = tmp_path / "a.yaml"
    lines = ("output-dir: here", "learning_rate: 1e-5", "rank: 8", "nouns: [dog, fox]", "mixed_precision: no")
    file.write_text("\n".join([*lines, "center_crop: true"]))
    expected = Config(Path("here"), Path("p.png"), 2, 4.0, 1e-5, True, "no", ("dog", "fox"))
    assert read("p.png", "--config", str(file), "--rank", "2") == expected
    assert read("p.png", "--rank", "2", f"--config={file}") == expected
    assert not read("--config", str(file), "--no_center_crop").center_crop


def test_later_files_win_and_presets_have_names(tmp_path: Path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("network_dim: 8\noutput_dir: a\n")
    second.write_text("output_dir: b\n")
    config = read("--config", str(first), "--config", "mine", presets={"mine": second})
    assert (config.output_dir, config.rank) == (Path("b"), 8)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rnak: 3", "unknown key in FILE: rnak: did you mean rank?"),
        ("no_center_crop: true", "unknown key in FILE: no_center_crop: did you mean center_crop?"),
        ("rank: many", "--rank is 'many', expected a whole number"),
        ("rank: {a: 1}", "FILE: rank must be one value or a list, got a mapping"),
        ("photo: a.png", "FILE: photo is given on the command line itself"),
        ("- rank", "FILE holds a list, expected lines of `option: value`"),
        ("rank: [", "FILE is no valid YAML"),
        ("rank: \x00", "FILE is no valid YAML"),
        ("output_dir:", "needs --output_dir"),
        ("nouns: [a, null, b]", "FILE: nouns has an empty value in its list: write one, or leave it out"),
        ("nouns: [a, --rank, b]", "--nouns has the value '--rank', which reads as an option"),
    ],
)
def test_mistakes_in_the_file_are_one_sentence(tmp_path: Path, text: str, says: str):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read(*(["--output_dir", "x"] if "output_dir" not in text else []), "--config", str(file))
    assert says.replace("FILE", str(file)) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file_changes_nothing(tmp_path: Path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert read("--output_dir", "x", "--config", str(file)) == Config(Path("x"))


def test_edit_reads_lists_and_keeps_its_defaults():
    config = parse(EditConfig, "folder --prompt=a --alpha 0.7 0.9 --forget none decoder=0.5".split(), prog="edit")
    assert (config.alpha, config.beta, config.forget) == ((0.7, 0.9), (), ("none", "decoder=0.5"))


@pytest.mark.parametrize(
    "line",
    [
        "folder --prompt=a --alpha 0.7 0.9 --forget none", "folder --prompt=a --alpha 0.7 --forget none --alpha 0.9",
        "--alpha=0.7 --alpha=0.9 --forget none --prompt a folder", "--forget none --prompt a --alpha 0.7 0.9 folder",
    ],
)  # fmt: skip
def test_lists_stand_after_one_flag_or_after_several(line: str):
    """A last word that no option needs is the command's argument, so that `--alpha 0.7 0.9 folder` works too."""
    config = parse(EditConfig, line.split(), prog="edit")
    assert (config.adapter, config.alpha, config.forget) == (Path("folder"), (0.7, 0.9), ("none",))


@pytest.mark.parametrize("line", ["--swap a=b c=d", "--swap a=b --swap c=d", "--swap=a=b --swap=c=d"])
@pytest.mark.parametrize("before", [True, False])
def test_words_to_swap_are_a_list_like_any_other(line: str, before: bool):
    args = ["--source", "x", *(["p.png", *line.split()] if before else [*line.split(), "p.png"])]
    if not before and line.startswith("--swap=a=b --swap="):
        args = ["--source", "x", "p.png", *line.split()]
    config = parse(PhotoConfig, args, prog="edit")
    assert config.photo == Path("p.png") and config.swap == ("a=b", "c=d")


def test_a_list_option_needs_a_value():
    with pytest.raises(UserError, match="--alpha needs a value, got nothing"):
        parse(EditConfig, ["folder", "--prompt", "a", "--alpha", "--auto"], prog="edit")


def test_a_file_whose_name_begins_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of `edit -a.png` the message was that the argument is missing."""
    monkeypatch.chdir(tmp_path)
    Path("-a.png").touch()
    for line in ("-a.png --source x --target y", "b.png --source x --target y --mask -a.png"):
        with pytest.raises(UserError, match=r"^-a\.png is a file whose name reads as an option: write \./-a\.png$"):
            parse(PhotoConfig, line.split(), prog="edit")
    assert parse(PhotoConfig, "./-a.png --source x --target -1".split(), prog="edit").photo == Path("-a.png")


def test_the_home_folder_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shell expands `--output_dir ~/x`, but neither `--output_dir=~/x` nor a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.yaml").write_text("output_dir: ~/y\n")
    assert read("--output_dir=~/x", "~/p.png") == Config(tmp_path / "x", tmp_path / "p.png")
    assert read("--config=~/a.yaml").output_dir == tmp_path / "y"
    assert read("--output_dir=~nobody.here/x").output_dir == Path("~nobody.here/x")  # a folder of that name
    config = parse(EditConfig, ["~/a", "--prompt=~ a cat", "--add=~/b", "--clip_model=~/c"], prog="edit")
    assert (config.adapter, config.add, config.clip_model) == (tmp_path / "a", (tmp_path / "b",), str(tmp_path / "c"))
    assert config.prompt == "~ a cat"


def test_a_file_that_names_files(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("config: b.yaml\n")
    with pytest.raises(UserError, match="a file cannot name other files: write --config several times"):
        read("--output_dir", "x", "--config", str(tmp_path / "a.yaml"))


def test_null_in_a_file_is_an_option_left_out(tmp_path: Path):
    lines = ("clip_model: null", "seed: null", "negative_prompt:", "output_dir: ~", "num_images:", "auto:", "forget:")
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    config = parse(EditConfig, ["folder", "--prompt", "a", "--config", str(tmp_path / "a.yaml")], prog="edit")
    assert config == parse(EditConfig, ["folder", "--prompt", "a"], prog="edit")
    (tmp_path / "b.yaml").write_text("negative_prompt: blurry\nnum_images: 3\n")
    files = [f"--config={tmp_path / name}.yaml" for name in "ba"]
    assert parse(EditConfig, ["folder", "--prompt", "a", *files], prog="edit") == config, "the later file goes first"


def test_text_in_a_file_is_what_stands_there(tmp_path: Path):
    lines = ("revision: 0123456", "prompt: off", "negative_prompt: 1.10", "output_dir: 007", "seed: 010",
             "add: [1_0, yes, 'null', 2024-01-05]", "alpha: [0.70, 1]", "mixed_precision: no",
             "height: 064")  # fmt: skip
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    config = parse(EditConfig, ["folder", "--config", str(tmp_path / "a.yaml")], prog="edit")
    assert (config.revision, config.prompt, config.negative_prompt) == ("0123456", "off", "1.10")
    assert config.output_dir == Path("007") and config.mixed_precision == "no"
    assert config.add == tuple(map(Path, ("1_0", "yes", "null", "2024-01-05")))
    assert (config.seed, config.alpha, config.height) == (10, (0.7, 1.0), 64)


def test_a_list_in_a_file_keeps_its_last_word(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("forget: [none, nodecoder]\nprompt: a\n")
    for words in (["--config", str(tmp_path / "a.yaml")], ["--prompt", "a", "--forget", "none"]):
        with pytest.raises(UserError, match="Missing from edit: PATH Adapter folder"):
            parse(EditConfig, words, prog="edit")
    words = ["--alpha", "0.7", "folder", "--config", str(tmp_path / "a.yaml")]
    config = parse(EditConfig, words, prog="edit")
    assert (config.adapter, config.alpha, config.forget) == (Path("folder"), (0.7,), ("none", "nodecoder"))


def test_help_shows_what_an_option_takes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(PhotoConfig, ["--help"], prog="edit")
    text = capsys.readouterr().out
    assert "None}" not in text and "{None" not in text
    assert "--trajectory PATH" in text and "--swap [STR [STR ...]]" in text


def test_an_options_own_check_is_its_sentence():
    @dataclass(frozen=True)
    class Checked:
        rank: int = 1
        """Rank."""

        def __post_init__(self) -> None:
            if self.rank < 1:
                raise UserError(f"rank must be above 0, got {self.rank}")

    with pytest.raises(UserError, match=r"^--rank must be above 0, got 0 \(see train --help\)$"):
        parse(Checked, ["--rank", "0"], prog="train")


def test_an_options_own_check_is_not_broken_into_lines():
    with pytest.raises(UserError, match=r"^--lr_warmup_steps is -1: give a number from 0 to 1,000,000 \(see train --h"):
        parse(SingleImageConfig, ["--lr_warmup_steps", "-1"], prog="train")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_words_that_are_no_utf_8_are_refused_and_paths_are_not(tmp_path: Path):
    with pytest.raises(UserError, match=r"^--prompt is 'caf\\udce9', which is no UTF-8: set the terminal to UTF-8"):
        parse(EditConfig, ["mine", "--prompt", "caf\udce9"], prog="edit")
    with pytest.raises(UserError, match=r"^--swap is 'cat=\\udce9'"):
        parse(PhotoConfig, ["a.png", "--source", "a cat", "--swap", "cat=\udce9"], prog="edit")
    base = os.fsdecode(bytes(tmp_path) + b"/b\xe9")
    os.mkdir(base)
    words = ["mine\udce9", "--prompt", "a cat", "--pretrained_model_name_or_path", base]
    assert parse(EditConfig, words, prog="edit").adapter == Path("mine\udce9")


@pytest.mark.parametrize("flag", ["--use_dora", "--use-dora", "--use_dora=true", "--dora_wd", "--weight_decompose"])
@pytest.mark.parametrize("trainer", [SingleImageConfig, MultiConceptConfig])
def test_dora_is_refused_with_the_reader_that_drops_it(trainer: type, flag: str):
    with pytest.raises(UserError, match=r"diffusers drops.*dora_scale.*--use_rslora") as error:
        parse(trainer, [flag], prog="train")
    assert str(error.value).startswith(
        f"{flag.replace('-', '_').replace('__', '--', 1).partition('=')[0]} is refused: "
    )
    assert "\n" not in str(error.value)


def test_dora_is_refused_in_a_file_too(tmp_path: Path):
    (tmp_path / "o.yaml").write_text("use_dora: true\n")
    with pytest.raises(UserError, match=r"o\.yaml: use_dora is refused: .*diffusers drops"):
        parse(SingleImageConfig, ["--config", str(tmp_path / "o.yaml")], prog="train")
