"""Every kind of adapter file with every command: all take it, or refuse it for a reason that is said here.

The outcomes are the table of `examples/README.md`, which is compared with them.
"""

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import personalize
from personalize.adapters import merging
from personalize.adapters.adapter import Adapter
from personalize.adapters.export import baked
from personalize.adapters.fuse import component_weights, merged_weights
from personalize.cli.commands import convert
from personalize.cli.options import ConvertConfig
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import UserError
from personalize.formats.changed_layers import changed
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.inspection import inspect_file
from personalize.formats.reader_keys import ReaderKeys
from personalize.formats.verification import verify_file
from personalize.io.tensor_files import read_tensors
from personalize.models.stable_diffusion import StableDiffusion
from tests.support.adapter_kinds import KINDS
from tests.support.tiny import tiny, tiny_pipeline

README = Path(__file__).parents[2] / "examples" / "README.md"
FP32 = 1e-5
"""Rounding of single precision, of the largest entry of ΔW: factors are multiplied out in another order."""
FAMILY = {"sd1": "sd1", "sd2v": "sd2", "sdxl": "sdxl"}
COMMANDS = (
    "inspect",
    "verify",
    "convert",
    "export lora",
    "export merge",
    "export checkpoint",
    "export tokens",
    "attach",
    "edit",
)
PURE_TOKENS = {"embedding", "two embeddings"}
NEED_BASE = {"DoRA", "(IA)3"}
REFUSALS = {  # kind or kinds: commands that refuse it, and the reason
    **{(kind, command): "learned tokens but no LoRA" for kind in PURE_TOKENS for command in ("export lora",)},
    **{(kind, "export merge"): "holds no LoRA module" for kind in PURE_TOKENS},
    **{(kind, "export checkpoint"): "learned tokens but no LoRA" for kind in PURE_TOKENS},
    **{(kind, command): "change the base's own weights" for kind in NEED_BASE
       for command in ("convert", "export lora", "export merge")},
    **{("Custom Diffusion", command): "Custom Diffusion" for command in COMMANDS[2:]},
}  # fmt: skip
VERIFIED = {  # LoRA under the names of diffusers or of kohya, with alpha where these look for it
    "LoRA, PEFT's names", "LoRA, kohya's names", "factors as 1×1 convolutions", "float8", "text encoder alone",
    "text projection", "self-attention alone", "convolutions alone",
}  # fmt: skip
REFUSALS |= {(kind, "verify"): "no reader knows the key" for kind in KINDS if kind not in VERIFIED}
REFUSALS |= {("alpha in the header", "verify"): "strength 1 is assumed"}
TOKENS = {*PURE_TOKENS, "LoRA and embeddings"}
REFUSALS |= {
    (kind, "export tokens"): "no learned tokens" for kind in KINDS if kind not in {*TOKENS, "Custom Diffusion"}
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each kind's file, written once."""
    folder = tmp_path_factory.mktemp("kinds")
    return {name: kind(name).write(folder / re.sub(r"\W+", "-", name)) for name in KINDS}


@cache
def kind(name):
    return KINDS[name]()


def outcome(action):
    """ "" if `action` succeeds, else the message of its UserError."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def converted(file, made, tmp_path):
    family, layout = FAMILY[made.base], "diffusers" if made.tokens and not made.updates else "kohya"
    convert.run(ConvertConfig(file, layout, tmp_path / "out.safetensors", family=family))
    if made.updates:
        check_updates(ReaderKeys(family).kohya(read_tensors(tmp_path / "out.safetensors"))[0], made)


def check_updates(factors, made):
    """Every ΔW that the file holds, and no other module."""
    assert factors.keys() == made.updates.keys()
    for module, (a, b, strength) in factors.items():
        update = strength * (b.double().flatten(1) @ a.double().flatten(1))
        assert (update - made.updates[module]).abs().max() < FP32 * made.updates[module].abs().max(), module


def exported(file, made, tmp_path):
    path = Path(__file__).parents[2] / "export" / "lora.py"
    spec = importlib.util.spec_from_file_location("export_lora_script", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    script.main(script.Config(file, tmp_path / "lora.safetensors", family=FAMILY[made.base]))
    check_updates(ReaderKeys(FAMILY[made.base]).kohya(read_tensors(tmp_path / "lora.safetensors"))[0], made)


def merged(file, made, tmp_path):
    one = merging.plain(Adapter.load(file, family=FAMILY[made.base]))[0]
    both = merging.merged([one, Adapter(one.lora, one.rank, one.alpha, None, one.info)], [1.0, 1.0], ["a", "b"])
    both.save(tmp_path / "merged")
    factors = ReaderKeys(FAMILY[made.base]).peft(
        read_tensors(tmp_path / "merged" / "pytorch_lora_weights.safetensors")
    )[0]
    for module, (a, b, strength) in factors.items():
        update = strength * (b.double().flatten(1) @ a.double().flatten(1)) / 2
        assert (update - made.updates[module]).abs().max() < FP32 * made.updates[module].abs().max()
    assert set(both.concepts) == set(made.tokens)


def checkpoint(file, made, tmp_path):
    model = tiny(made.base)
    weights = merged_weights(model, baked(Adapter.load(file)), any_base=True)
    check_weights(weights, made, component_weights(tiny(made.base)), file)


def check_weights(weights, made, before, file):
    """The base's weights with exactly the file's changes in them, all others untouched."""
    touched = set()
    for module in {**made.updates, **made.biases, **(read_adapter_file(file).others if made.needs_base else {})}:
        component, path = module.split(".", 1)
        old, new = before[component][f"{path}.weight"], weights[component][f"{path}.weight"]
        touched.add((component, f"{path}.weight"))
        if made.needs_base:
            wanted = changed(module, read_adapter_file(file).others[module], old, None)[0]
        else:
            wanted = old.double() + made.updates[module].reshape(old.shape)
        assert (new - wanted).abs().max() < FP32 * wanted.abs().max()
        assert (new - old).abs().max() > 1e-3 * old.abs().max()
        if module in made.biases:
            touched.add((component, f"{path}.bias"))
            wanted = before[component][f"{path}.bias"] + made.biases[module]
            assert torch.allclose(weights[component][f"{path}.bias"], wanted)
    for component, tensors in before.items():
        for name, tensor in tensors.items():
            if (component, name) not in touched:
                assert torch.equal(weights[component][name], tensor), name


def tokens(file, made, tmp_path):
    concepts = read_adapter_file(file).concepts
    if not concepts:
        raise UserError("no learned tokens")
    assert {token if token.startswith("<") else f"<{token}>" for token in concepts} == set(made.tokens)


def attached(file, made, tmp_path):
    """The layers' outputs inside the block are those of the merged weights, and outside those of before."""
    pipe, reference = tiny_pipeline(made.base), tiny(made.base)
    names = ("text_encoder", "text_encoder_2")
    if made.tokens and "768" in str({tuple(t.shape) for t in made.tensors.values()}):
        with pytest.raises(UserError, match="768"):  # of the real width: the tiny text encoder has 32
            with personalize.attach(pipe, file):
                pass
        return
    if made.updates or made.needs_base:
        weights = merged_weights(reference, Adapter.load(file), any_base=True)
        parts = {"unet": reference.unet, **dict(zip(names, reference.text_encoders, strict=False))}
        for component, part in parts.items():
            own = part.state_dict()
            wanted = {k: weights[component].get(k, weights[component].get(f"text_model.{k}")) for k in own}
            part.load_state_dict({k: own[k] if v is None else v for k, v in wanted.items()})
    with torch.no_grad():
        plain = predicted(tiny_pipeline(made.base))
        with personalize.attach(pipe, file):
            inside = predicted(pipe)
            words = set(pipe.tokenizer.get_added_vocab())
        after, wanted = predicted(pipe), predicted(reference.pipeline())
    assert set(made.tokens) <= words or not made.tokens
    assert (inside - wanted).abs().max() < 1e-4 * wanted.abs().max(), "single precision through a whole UNet"
    assert torch.equal(after, plain), "nothing is left behind"
    if made.updates or made.needs_base:
        assert (inside - plain).abs().max() > 1e-3 * plain.abs().max(), "the adapter must be seen"


def predicted(pipe):
    """The UNet's prediction for a prompt: what the text encoders and the UNet make of it together."""
    model = StableDiffusion.from_pipeline(pipe)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return model.predict(latents, 500, model.prompts(["a cat in the snow"]))


def edited(file, made, tmp_path):
    if made.tokens and "768" in str({tuple(t.shape) for t in made.tensors.values()}):
        return  # of the real width
    editor = Editor(tiny(made.base), Adapter.load(file))
    sampling = Sampling(2, "ddim", 2.0, (64, 64))
    image = editor.edit("a cat", sampling=sampling)[0]
    assert image.size == (64, 64)


def verified(file, made, tmp_path):
    verify_file(file).require()


def inspected(file, made, tmp_path):
    found = inspect_file(file)
    takes = found.readers["personalize"][0]
    assert takes == ("no" if "custom" in found.layout.lower() else takes)
    assert len(found.tokens) >= len(made.tokens)


ACTIONS = dict(
    zip(COMMANDS, (inspected, verified, converted, exported, merged, checkpoint, tokens, attached, edited), strict=True)
)


QUICK = ("PEFT folder", "text encoder alone", "LoRA and biases", "embedding")  # the others are for the slow run


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_every_command_takes_a_file_or_says_why_not(files, name, tmp_path):
    made, found = kind(name), {}
    for command, action in ACTIONS.items():
        folder = tmp_path / command.replace(" ", "-")
        folder.mkdir()
        found[command] = outcome(lambda: action(files[name], made, folder))  # noqa: B023
    for command, message in found.items():
        reason = REFUSALS.get((name, command), "")
        assert (reason in message) if reason else message == "", f"{command}: {message!r}"
    verdict = inspect_file(files[name]).readers["personalize"][0]
    takes = [command for command in COMMANDS[1:] if not found[command] and command != "export tokens"]
    assert (verdict == "no") == (not takes), "inspect says no exactly where every command refuses"


def table():
    """The outcomes as a table in Markdown: + takes it, – refuses it and says why."""
    rows = ["| kind of file | " + " | ".join(COMMANDS) + " |", "|---|" + "---|" * len(COMMANDS)]
    for name in KINDS:
        marks = ["–" if (name, command) in REFUSALS else "+" for command in COMMANDS]
        rows.append(f"| {name} | " + " | ".join(marks) + " |")
    return "\n".join(rows)


def test_the_manual_has_the_table_of_these_outcomes():
    assert table() in README.read_text("utf-8"), f"put this into examples/README.md:\n{table()}"
