"""Options are named as they are written on a command line, and nothing else in a message is altered."""

from pathlib import Path

import pytest

from personalize.cli import parser
from personalize.cli.checks import check_adapters
from personalize.cli.wording import as_options, of_tyro, worded
from personalize.errors import Mismatch, UserError
from personalize.training.config import SingleImageConfig

TYPES = {"rank": int, "max_train_steps": int, "mask_weight": float, "alpha": tuple[float, ...], "adapter": str}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("rank must be above 0, got 0", "--rank must be above 0, got 0"),
        ("max_train_steps is 0: raise max_train_steps", "--max_train_steps is 0: raise --max_train_steps"),
        ("give --max_train_steps 4", "give --max_train_steps 4"),
        ("the adapter has rank 4: lower rank", "the adapter has rank 4: lower rank"),
        ("adapter tensor x is missing", "adapter tensor x is missing"),
        ("mask_weight.png: no such file", "mask_weight.png: no such file"),
        ("out/mask_weight: no such folder", "out/mask_weight: no such folder"),
        ("my_max_train_steps is a word", "my_max_train_steps is a word"),
    ],
)
def test_names_of_options_get_their_dashes(message, said):
    assert as_options(message, TYPES) == said


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ("Error parsing --rank: invalid literal for int() with base 10: 'many'",
         "--rank is 'many', expected a whole number"),
        ("Error parsing --mask_weight: could not convert string to float: 'x'",
         "--mask_weight is 'x', expected a number"),
        ("Error parsing --alpha: Could not find valid parse for arguments: ['0,8']",
         "--alpha is '0,8', expected numbers with spaces between them, such as 0.8 1"),
        ("Error parsing --adapter: whatever it says", "Error parsing --adapter: whatever it says"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_said_with_what_was_expected(box, said):
    assert of_tyro(box, TYPES) == said


def test_older_tyros_messages_are_said_like_those_of_newer_ones(monkeypatch):
    """1.0 to 1.0.13 name the argument otherwise; up to 1.0.15 an option's own check comes as it is."""
    assert (
        of_tyro("Missing value for argument '('--rank',)'. Expected 1 values", TYPES)
        == "--rank needs a value, got nothing"
    )

    def refused(*_, **__):
        raise UserError("rank must be above 0, got 0")

    monkeypatch.setattr(parser.tyro, "cli", refused)
    with pytest.raises(UserError, match=r"^--rank must be above 0, got 0 \(see train --help\)$"):
        parser.parse(SingleImageConfig, [], prog="train")


def test_the_kind_and_code_of_an_error_stay():
    with pytest.raises(Mismatch, match="^--rank is wrong$") as caught, worded(TYPES):
        raise Mismatch("rank is wrong")
    assert caught.value.exit_code == 1


NO_WEIGHTS = r"adapter_config\.json, but no adapter_model\.safetensors beside it: copy that file too"


def test_adapters_of_peft_in_shards_and_on_the_hub_pass_the_first_check(tmp_path):
    for name in ("adapter_config.json", "unet/adapter_config.json", "lora.safetensors.index.json"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
        if name.endswith("adapter_config.json"):
            with pytest.raises(UserError, match=NO_WEIGHTS):
                check_adapters([folder])
            (folder / name).with_name("adapter_model.safetensors").touch()
        check_adapters([folder])
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "pytorch_lora_weights.safetensors").touch()
    check_adapters([tmp_path / "diffusers"])
    check_adapters([Path("owner/name:file.safetensors")])
    with pytest.raises(UserError, match="is no adapter folder"):
        (tmp_path / "empty").mkdir()
        check_adapters([tmp_path / "empty"])
    (tmp_path / "empty" / "style.safetensors").touch()
    with pytest.raises(UserError, match=r"name its file style\.safetensors \(`personalize inspect` lists them\)$"):
        check_adapters([tmp_path / "empty"])
    (tmp_path / "empty" / "more.pt").touch()
    with pytest.raises(UserError, match=r"name one of its 2 files, as more\.pt"):
        check_adapters([tmp_path / "empty"])
    (tmp_path / "empty" / "source_embedding.safetensors").touch()
    with pytest.raises(UserError, match=r"lacks adapter\.json, which training wrote .* copy the whole folder again"):
        check_adapters([tmp_path / "empty"])
