"""What `inspect` says of block names that diffusers does not know is what diffusers does with such files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.formats.inspection import inspect_file
from personalize.formats.original_checkpoint import unet_name
from tests.formats.test_conversion import convert
from tests.support.foreign_files import modules
from tests.support.lora_states import ATTENTION, paths, random_lora
from tests.support.tiny import tiny, tiny_pipeline

OUTSIDE = ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_1", "add_embedding.linear_2")


def wanted(path):
    return ATTENTION(path) or path in OUTSIDE or path.endswith(("conv1", "time_emb_proj", "samplers.0.conv"))


def written(file, base, original):
    """A LoRA in kohya's names, whose modules have the original code's names where `original` says so."""
    unet, tensors = tiny(base).unet, {}
    attends = {f"up_blocks.{number}" for number, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")}
    for module, (a, b) in modules(random_lora(paths(unet, wanted))).items():
        path = module.removeprefix("unet.")
        name = unet_name(f"{path}.weight", attends).removesuffix(".weight") if original(path) else path
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a.contiguous(), f"{stem}.lora_up.weight": b.contiguous()}
        tensors[f"{stem}.alpha"] = torch.tensor(float(len(a)))
    save_file(tensors, file)
    return len(tensors) // 3


def loaded(file, base):
    """The modules that diffusers puts a LoRA on."""
    pipe = tiny_pipeline(base)
    pipe.load_lora_weights(str(file))
    return {f"unet.{path}" for path, module in pipe.unet.named_modules() if getattr(module, "lora_A", None)}


SPELLINGS = {
    "original": (lambda path: True, {"sd1": "partly", "sd2v": "partly", "sdxl": "yes"}),
    "diffusers": (lambda path: False, {"sd1": "yes", "sd2v": "yes", "sdxl": "partly"}),
    "both": (lambda path: path.startswith("mid_block"), {"sd1": "partly", "sd2v": "partly", "sdxl": "partly"}),
}


@pytest.mark.parametrize("base", ["sd1", "sd2v", "sdxl"])
@pytest.mark.parametrize("names", SPELLINGS)
def test_the_modules_that_are_said_to_be_dropped_are_those_that_diffusers_drops(tmp_path, base, names):
    """Of SD 1.x in the original names it loads 4 of about 200, and inspect said that it reads the file."""
    original, verdicts = SPELLINGS[names]
    count = written(file := tmp_path / "x.safetensors", base, original)
    found = inspect_file(file)
    assert found.readers["diffusers"][0] == verdicts[base] and found.readers["ComfyUI"][0] == "yes"
    taken, dropped = loaded(file, base), set(found.dropped.get("diffusers", []))
    assert len(taken) == count - len(dropped) and not taken & dropped
    family = {"sd2v": "sd2"}.get(base, base)
    mended = convert(file, "kohya", tmp_path / "k.safetensors", family=family)
    assert inspect_file(mended).readers["diffusers"][0] == "yes" and len(loaded(mended, base)) == count


def test_a_file_that_diffusers_refuses_is_said_to_be_refused(tmp_path):
    written(file := tmp_path / "x.safetensors", "sd1", lambda path: True)
    blocks = {key: t for key, t in load_file(file).items() if "middle_block" in key}
    save_file(blocks, file)
    assert inspect_file(file).readers["diffusers"][0] == "no"
    with pytest.raises(Exception, match="Target modules"):
        loaded(file, "sd1")
