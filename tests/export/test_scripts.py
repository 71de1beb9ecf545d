"""`personalize export NAME`: from an adapter folder or a file to what other programs take, through the command line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.cli.main import main
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.lora_files import kohya_file
from personalize.io.atomic import write_file
from personalize.io.tensor_files import read_tensors
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.lora_states import paths, predict, predict_with_delta, random_lora
from tests.support.tiny import tiny, tiny_folder

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5  # of the output's scale: fp32 rounding through the layers of the tiny UNet


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, and an adapter made for it with a source embedding and a learned token."""
    place = tmp_path_factory.mktemp("export")
    base = tiny_folder("sd1", place)
    model = StableDiffusion.load(base, device="cpu")
    lora = random_lora(paths(model.unet, lambda path: path.endswith((".conv1", "attn2.to_k")) and "blocks" in path))
    info = {"base": model.identity, "caption": "a cat"}
    source = {"embeds": torch.zeros(1, 77, 32)}
    Adapter(lora, 4, 6.0, source, info, {"<cat>": {"text_encoder": torch.ones(2, 32)}}).save(place / "cat")
    return place


def run(capsys, *line):
    code = main(["export", *map(str, line)])
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err.strip()


def test_lora(place, tmp_path, capsys):
    file = tmp_path / "small.safetensors"
    code, said = run(
        capsys, "lora", place / "cat", "--output", file, "--forget", "decoder", "--strength", "0.5", "--rank", "2",
        "--dtype", "float16",
    )  # fmt: skip
    assert code == 0 and "source embedding is not exported" in said and "relative error" in said and "verified" in said
    found = read_adapter_file(file)
    assert found.rank == 2 and not any("up_blocks" in key for key in found.state)
    code, said = run(capsys, "lora", file, "--layout", "diffusers", "--output", tmp_path / "again")
    assert code == 0 and (tmp_path / "again" / "pytorch_lora_weights.safetensors").is_file()


def test_tokens(place, tmp_path, capsys):
    code, said = run(capsys, "tokens", place / "cat", "--output", tmp_path / "all")
    assert code == 0 and "<cat>, 2 vector(s), text_encoder, verified" in said
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"cat.safetensors", "learned_embeds.safetensors"}
    line = ("--layout", "diffusers", "--token", "<dog>", "--dtype", "float16", "--output", tmp_path / "dog")
    assert run(capsys, "tokens", tmp_path / "all" / "cat.safetensors", *line)[0] == 0
    found = read_tensors(tmp_path / "dog" / "learned_embeds.safetensors").tensors
    assert torch.equal(found["<dog>"], torch.ones(2, 32, dtype=torch.float16))


def test_merge_and_checkpoint(place, tmp_path, capsys):
    line = (place / "cat", place / "cat" / "cat_lora.safetensors", "--weights", "0.75", "0.25")
    code, said = run(capsys, "merge", *line, "--output", tmp_path / "exact")
    assert code == 0 and said.count("source embedding is not exported") == 1 and "cat: The source" in said
    assert "learned tokens" not in said and "<cat>" in Adapter.load(tmp_path / "exact").concepts
    code, said = run(capsys, "merge", *line, "--rank", "4", "--output", tmp_path / "both")
    assert code == 0 and "relative error of the weight change 0.00%" in said  # the same change twice has its rank
    assert (Adapter.load(tmp_path / "exact").rank, Adapter.load(tmp_path / "both").rank) == (8, 4)
    base = ("--pretrained_model_name_or_path", place / "tiny-sd1")
    code, said = run(capsys, "checkpoint", tmp_path / "both", "--strength", "2", "--output", tmp_path / "model", *base)
    assert code == 0 and "merged into" in said and "source embedding" not in said
    assert "learned tokens are not exported" in said
    cat = Adapter.load(place / "cat")
    expected = predict_with_delta(tiny("sd1"), replace(cat, alpha=cat.alpha * 2))
    found = predict(StableDiffusion.load(tmp_path / "model", device="cpu"))
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    code, said = run(capsys, "checkpoint", place / "cat", "--output", tmp_path / "one.safetensors", *base)
    assert "source embedding is not exported" in said and "learned tokens are not exported" in said
    assert code == 0 and "sizes of its own" in said and (tmp_path / "one.safetensors").is_file()


def test_a_checkpoint_says_what_its_base_predicts(place, tmp_path, capsys):
    """As told; else as the adapter was trained with, where the base's own files say something else."""
    cat = Adapter.load(place / "cat")
    velocity = {**cat.info, "base": {**cat.info["base"], "prediction_type": "v_prediction"}}
    replace(cat, info=velocity).save(tmp_path / "velocity")
    told = ("--prediction_type", "v_prediction")
    for number, (adapter, line, expected) in enumerate([
        (place / "cat", (), "epsilon"), (place / "cat", told, "v_prediction"),
        (tmp_path / "velocity", (), "v_prediction"), (tmp_path / "velocity", ("--any_base",), "epsilon"),
    ]):  # fmt: skip
        output = tmp_path / f"model{number}"
        base = ("--pretrained_model_name_or_path", place / "tiny-sd1")
        code, said = run(capsys, "checkpoint", adapter, "--output", output, *base, *line)
        assert code == 0, said
        assert StableDiffusion.load(output, device="cpu").prediction_type == expected
    code, said = run(capsys, "checkpoint", place / "cat", "--output", tmp_path / "one.safetensors", *base, *told)
    assert code == 2 and "export a folder instead" in said and not (tmp_path / "one.safetensors").exists()


def test_a_checkpoint_of_another_base_says_what_that_predicts(place, tmp_path, capsys):
    """A file that says it was trained on a base of v made a checkpoint of any base named for it say v: noise."""
    theirs = {"ss_base_model_version": "sd_v1_v"}
    data = kohya_file(Adapter.load(place / "cat").lora, 6.0, family="sd1", metadata=theirs)
    file = write_file(tmp_path / "theirs.safetensors", data)
    output, base = tmp_path / "model", ("--pretrained_model_name_or_path", str(place / "tiny-sd1"))
    assert main(["export", "checkpoint", str(file), "--output", str(output), *base]) == 0
    assert "trained with prediction type v_prediction" in capsys.readouterr().err
    assert StableDiffusion.load(output, device="cpu").prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("lora", "{cat}"), "needs --output"),
        (("lora", "{cat}", "--output", "{cat}", "--layout", "peft"), "exists already"),
        (("lora", "{cat}", "--output", "{new}", "--rank", "4"), "--rank must be lower"),
        (("lora", "{cat}", "--output", "{new}", "--forget", "decodr"), "did you mean"),
        (("lora", "{cat}", "--output", "{new}", "--layout", "a1111"), "a1111"),
        (("lora", "{base}", "--output", "{new}"), "no adapter folder"),
        (("tokens", "{cat}/cat_lora.safetensors", "--output", "{new}"), "has no learned tokens"),
        (("merge", "{cat}", "--output", "{new}"), "two adapters or more"),
        (("merge", "{cat}", "{cat}/cat_lora.safetensors", "--rank", "64", "--output", "{new}"), "the sum has rank 8"),
        (("merge", "{cat}", "{cat}", "--weights", "1", "--output", "{new}"), "a weight for each"),
        (("merge", "{cat}", "{cat}", "--output", "{new}"), "learned the token"),
        (("checkpoint", "{cat}/cat_lora.safetensors", "--output", "{cat}"), "exists already"),
        (("checkpoint", "{cat}", "--pretrained_model_name_or_path", "{new}", "--output", "{new}"), "no base model"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(place, tmp_path, capsys, line, message):
    names = {"cat": place / "cat", "base": place / "tiny-sd1", "new": tmp_path / "new"}
    code, said = run(capsys, *(word.format(**names) for word in line))
    assert code == 2 and message in said and "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lora", "tokens", "merge", "checkpoint"])
def test_scripts_are_short_and_explain_themselves_without_torch(name):
    script = ROOT / "export" / f"{name}.py"
    assert len(script.read_text("utf-8").splitlines()) < 100  # options, their check before torch, and one page of code
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("torch" in sys.modules))
sys.argv = ["x", "--help"]
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0 and "--output" in shown.stdout, shown.stderr
    assert shown.stdout.splitlines()[-1] == "False"
