"""Readers nobody here wrote: our files through the code of ComfyUI, Forge and sd-scripts, ΔW compared.

Run with the paths of checkouts, each of which may be left out (its tests are skipped):

    PERSONALIZE_COMFYUI=… PERSONALIZE_FORGE=… PERSONALIZE_SD_SCRIPTS=… pytest -m peer tests/parity/test_readers.py -rs

Only their name maps and LoRA arithmetic run, on tiny or weightless models; packages that they import at the top and do
not need for that are replaced by stand-ins where missing.
"""

from types import SimpleNamespace

import pytest
import torch

from personalize.adapters.lora import module_names
from personalize.formats import lora_files, verification
from personalize.formats.reader_keys import original_paths
from personalize.models.empty import empty_model
from tests.support.checkouts import checkout, load
from tests.support.foreign_files import delta, modules
from tests.support.lora_states import ATTENTION, EVERYTHING, TRANSFORMER, paths, random_lora, text_lora
from tests.support.original_layout import unet_layout
from tests.support.tiny import tiny

pytestmark = pytest.mark.peer
TOPOLOGY = {"sd1": "sd1", "sd2": "sd2v", "sdxl": "sdxl"}
TARGETS = {"attention": ATTENTION, "transformer": TRANSFORMER, "full": EVERYTHING}
EXACT = 1e-6  # of the largest entry: fp32 products of rank 4, strength multiplied in before or after
UNETS = {  # how ComfyUI describes the UNets of the families
    "sd1": {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
    },
}  # fmt: skip
UNETS["sd2"] = UNETS["sd1"]
CLIPS = {"sd1": ["clip_l"], "sd2": ["clip_h"], "sdxl": ["clip_l", "clip_g"]}


def comfyui():
    load("comfy.cli_args").args.cpu = True
    return load("comfy.lora")


class Weights:
    """A model as ComfyUI's key maps see it."""

    def __init__(self, state, unet_config=None):
        self.state = state
        self.model_config = SimpleNamespace(unet_config=unet_config)  # where ComfyUI looks
        self.diffusion_model = SimpleNamespace(config=unet_config)  # where Forge looks
        self.config = SimpleNamespace(huggingface_repo="")

    def state_dict(self):
        return self.state


def comfy_models(model):
    """The UNet's and the text encoders' weights under ComfyUI's names, and which of our modules each is."""
    names = dict(zip(model.unet.state_dict(), unet_layout(model.unet), strict=True))
    unet = {f"diffusion_model.{names[key]}": tensor for key, tensor in model.unet.state_dict().items()}
    ours = {f"diffusion_model.{new}": f"unet.{old.removesuffix('.weight')}" for old, new in names.items()}
    clip = {}
    for component, name, encoder in zip(
        ("text_encoder", "text_encoder_2"), CLIPS[model.family], model.text_encoders, strict=False
    ):
        for key, tensor in encoder.state_dict().items():
            path = f"text_model.{key.removeprefix('text_model.')}"
            clip[f"{name}.transformer.{path}"] = tensor
            ours[f"{name}.transformer.{path}"] = f"{component}.{path.removesuffix('.weight')}"
    return Weights(unet, UNETS[model.family]), Weights(clip), ours


def written(tmp_path, family, targets):
    """A kohya-named file of ours on the UNet and all text encoders, its model, and its true ΔW."""
    model = tiny(TOPOLOGY[family])
    state = random_lora(paths(model.unet, TARGETS[targets])) | text_lora(model)
    file = tmp_path / "ours.safetensors"
    file.write_bytes(lora_files.kohya_file(state, 10.0, family=family))  # alpha is not the rank, 4
    return model, file, {module: delta(a, b, 2.5) for module, (a, b) in modules(state).items()}


def deviation(found, truth):
    """Largest deviation of ΔW, given as such or as its factors (whose products would not fit into memory together)."""
    if isinstance(truth, tuple):
        return verification.deviation(found, truth)
    return float((found - truth).abs().max() / truth.abs().max())


def report(reader, family, targets, found, truth):
    assert found.keys() == truth.keys(), sorted(truth.keys() ^ found.keys())[:4]
    worst = max(deviation(found[module], truth[module]) for module in truth)
    print(f"{reader}: {family}, {targets}: {len(found)} / {len(truth)} modules, largest deviation {worst:.1e}")
    assert worst < EXACT


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", TOPOLOGY)
@pytest.mark.parametrize("reader", ["ComfyUI", "Forge"])
def test_comfyui_and_forge(tmp_path, monkeypatch, capsys, reader, family, targets):
    checkout(f"PERSONALIZE_{reader.upper()}", monkeypatch)
    theirs = comfyui() if reader == "ComfyUI" else load("packages_3rdparty.comfyui_lora_collection.lora")
    model, file, truth = written(tmp_path, family, targets)
    unet, clip, ours = comfy_models(model)
    keys: dict = {}
    theirs.model_lora_keys_unet(unet, keys)
    theirs.model_lora_keys_clip(clip, keys)
    tensors = lora_files.read_tensors(file).tensors
    patches = theirs.load_lora(tensors, keys)
    if isinstance(patches, tuple):  # Forge returns what it did not recognise too, and refuses a file with much of it
        patches, unmatched = patches
        assert not unmatched
    found = {}
    for key, patch in patches.items():
        weight = torch.zeros_like({**unet.state, **clip.state}[key])
        if hasattr(theirs, "calculate_weight"):
            weight = theirs.calculate_weight([(1.0, patch, 1.0, None, None)], weight, key)
        else:  # Forge's copy of the name map alone; the arithmetic is ComfyUI's
            up, down, alpha = patch[1][:3]
            weight = up.flatten(1) @ down.flatten(1) * (alpha / down.shape[0])
        found[ours[key]] = weight.flatten(1).double()
    with capsys.disabled():
        report(reader, family, targets, found, truth)


def test_comfyui_drops_a_diffusers_file_so_the_twin_is_needed(tmp_path, monkeypatch):
    checkout("PERSONALIZE_COMFYUI", monkeypatch)
    theirs = comfyui()
    model = tiny("sd1")
    unet, _, _ = comfy_models(model)
    state = random_lora(paths(model.unet, ATTENTION))
    assert theirs.load_lora(dict(state), theirs.model_lora_keys_unet(unet, {})) == {}


class Nested(torch.nn.Module):
    """A text encoder by the name of its inside that transformers gave it when sd-scripts was written."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model = encoder if not hasattr(encoder, "text_model") else encoder.text_model


def sd_scripts_factors(network):
    """A, B and alpha / r by the identity of the layer that each of their LoRA modules wraps."""
    found = {}
    for lora in [*network.unet_loras, *network.text_encoder_loras]:
        down, up = lora.lora_down.weight.detach(), lora.lora_up.weight.detach()
        found[id(lora.org_module)] = (down, up, float(lora.alpha) / down.shape[0])
    return found


def layers(model, component):
    return {id(layer): f"{component}.{path}" for path, layer in model.named_modules()}


@pytest.mark.parametrize("targets", ["attention", "transformer", "full"])
@pytest.mark.parametrize("family", TOPOLOGY)
def test_sd_scripts(tmp_path, monkeypatch, capsys, family, targets):
    """SDXL is their own UNet at its full size without weights; its LoRA then has rank 1 in fp32."""
    checkout("PERSONALIZE_SD_SCRIPTS", monkeypatch)
    lora = load("networks.lora")
    if family == "sdxl":
        ours = empty_model("sdxl")
        with torch.device("meta"):
            unet = load("library.sdxl_original_unet").SdxlUNet2DConditionModel()
        originals = original_paths(ours.unet)
        where = {id(layer): f"unet.{originals.get(path)}" for path, layer in unet.named_modules()}
    else:
        ours = tiny(TOPOLOGY[family])
        unet = ours.unet
        where = layers(unet, "unet")
    chosen = set(module_names(ours.unet, family)) if targets == "full" else set(paths(ours.unet, TARGETS[targets]))
    state = random_lora(paths(ours.unet, chosen.__contains__), rank=1) | text_lora(ours, rank=1)
    file = tmp_path / "ours.safetensors"
    file.write_bytes(lora_files.kohya_file(state, 2.5, family=family))
    encoders = [Nested(encoder) for encoder in ours.text_encoders]
    for component, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=False):
        where |= layers(encoder, component)
    network, weights = lora.create_network_from_weights(
        1.0, str(file), None, encoders if family == "sdxl" else encoders[0], unet
    )
    modules = {each.lora_name: each for each in [*network.unet_loras, *network.text_encoder_loras]}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    unread = {f"{name}.{part}" for name in modules for part in parts} ^ set(weights)
    assert not unread, sorted(unread)[:4]
    for name, each in modules.items():
        each.load_state_dict({part: weights[f"{name}.{part}"] for part in parts}, strict=False)
    found = {where[key]: value for key, value in sd_scripts_factors(network).items()}
    truth = {module: (a, 2.5 * b, 1.0) for module, (a, b) in modules(state).items()}
    with capsys.disabled():
        report("sd-scripts", family, targets, found, truth)
