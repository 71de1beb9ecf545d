"""Fuzz: whatever a file holds, it is read or refused in one line; nothing hangs and nothing eats the memory."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.cli.commands import convert
from personalize.cli.commands.verify import run as verify_run
from personalize.cli.edit_options import EditConfig
from personalize.cli.options import VerifyConfig
from personalize.cli.parser import read_yaml
from personalize.formats.adapter_source import open_adapter
from personalize.formats.changed_layers import changed
from personalize.formats.folder_inspection import folder_text, inspect_folder
from personalize.formats.inspection import inspect_file
from personalize.formats.inspection_report import report
from personalize.formats.verification import verify_folder
from personalize.io.json_files import read_json
from personalize.io.tensor_files import read_tensors, tensor_bytes
from tests.support.foreign_files import kohya, modules, small_state
from tests.support.fuzz import BYTES, MEMORY, PLACES, VALUES, attempt, dumped, fuzzed, replanted, spliced
from tests.support.lora_states import paths, random_lora
from tests.support.tiny import tiny

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
EXAMPLES = 500
KINDS = ("header", "body", "manifest", "settings", "yaml", "algorithms", "config", "index", "transformer")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Good files to begin from: a kohya file, an adapter folder, and option files."""
    folder = tmp_path_factory.mktemp("seeds")
    model = tiny("sd1")
    lora = random_lora(
        paths(model.unet, lambda path: path.startswith("mid_block.attentions") and "attn2" in path), rank=2
    )
    source = {"embeds": torch.zeros(1, 4, 8)}
    Adapter(lora, 2, 2.0, source, {"base": model.identity, "caption": "a cat"}).save(folder / "mine")
    small = {key: t for key, t in small_state("sd1", rank=1, width=2).items() if ".mid_block." in key}
    assert modules(small)
    return {
        "kohya": tensor_bytes(kohya(small, "sd1", 1.0), {"ss_v2": "False"}),
        "mine": {path.name: path.read_bytes() for path in (folder / "mine").iterdir()},
        "transformers": [tensor_bytes(tensors, {"ss_base_model_version": "flux1"}) for tensors in transformers()],
        "algorithms": [tensor_bytes(tensors, {"ss_base_model_version": "sd_v1"}) for tensors in algorithms()],
        "peft": (tensor_bytes({key.replace("unet.", "base_model.model."): t for key, t in small.items()}), CONFIG),
        "yaml": b"prompt: a cat\nalpha: [0.8, 1.0]\nseed: 3\nforget: [none]\n",
    }


PLACE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
CONFIG = {"r": 1, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {".*to_k": 4}}
CONFIG["auto_mapping"] = {"base_model_class": "UNet2DConditionModel"}


def algorithms():
    """Two small files of other algorithms than LoRA: what a LoRA can hold, and what it cannot; one with a token."""
    ones = torch.ones
    held = {f"{PLACE}q.hada_w{n}_{x}": ones(4, 2) if x == "a" else ones(2, 4) for n in "12" for x in "ab"}
    held |= {f"{PLACE}k.lokr_w1": ones(2, 2), f"{PLACE}k.lokr_w2_a": ones(2, 1), f"{PLACE}k.lokr_w2_b": ones(1, 2),
             f"{PLACE}v.diff": ones(4, 4), f"{PLACE}v.diff_b": ones(4), f"{PLACE}q.alpha": torch.tensor(1.0),
             "bundle_emb.cat.clip_l": ones(1, 4)}  # fmt: skip
    applied = {f"{PLACE}q.lora_down.weight": ones(2, 4), f"{PLACE}q.lora_up.weight": ones(4, 2)}
    applied |= {f"{PLACE}k.on_input": torch.tensor(False)}
    applied |= {f"{PLACE}q.dora_scale": ones(4, 1), f"{PLACE}k.weight": ones(4), f"{PLACE}v.oft_blocks": ones(2, 2, 2),
                f"{PLACE}out_0.a1.weight": ones(4, 2),
                f"{PLACE}out_0.a2.weight": ones(2, 4), f"{PLACE}out_0.b1.weight": ones(4, 2),
                f"{PLACE}out_0.b2.weight": ones(2, 4)}  # fmt: skip
    return held, applied


def transformers():
    """Small files for FLUX.1, Z-Image and SD 3: fused projections, swapped halves, other algorithms, a text encoder."""
    ones = torch.ones
    flux = {}
    for stem, out in (("single_blocks_0_linear1", 28), ("double_blocks_1_img_attn_qkv", 12),
                      ("final_layer_adaLN_modulation_1", 8)):  # fmt: skip
        flux |= {f"lora_unet_{stem}.lora_down.weight": ones(2, 4), f"lora_unet_{stem}.lora_up.weight": ones(out, 2),
                 f"lora_unet_{stem}.alpha": torch.tensor(1.0)}  # fmt: skip
    place, joint = "diffusion_model.layers.0.", "transformer.transformer_blocks.0."
    image = {f"{place}attention.qkv.lora_A.weight": ones(1, 4), f"{place}attention.qkv.lora_B.weight": ones(12, 1),
             f"{place}feed_forward.w1.diff": ones(4, 4), f"{place}feed_forward.w1.diff_b": ones(4),
             f"{place}feed_forward.w2.lokr_w1": ones(2, 2), f"{place}feed_forward.w2.lokr_w2": ones(2, 2)}  # fmt: skip
    three = {f"{joint}attn.to_q.lora_A.weight": ones(1, 4), f"{joint}attn.to_q.lora_B.weight": ones(4, 1),
             "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": ones(1, 4),
             "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight": ones(8, 1),
             "transformer.pos_embed.proj.lora_A.weight": ones(1, 2, 2, 2),
             "transformer.pos_embed.proj.lora_B.weight": ones(4, 1, 1, 1)}  # fmt: skip
    return flux, image, three


def try_file(path, content, folder, family: str | None = "sd1"):
    path.write_bytes(content)
    out = folder / "out.safetensors"
    options = {
        "file": path,
        "to": "kohya",
        "output": out,
        "dtype": "float32",
        "family": family,
        "unet_only": False,
        "rank": None,
    }
    options |= {"token": None, "allow_pickle": False, "overwrite": True}
    attempt(
        lambda: read_tensors(path), lambda: report(inspect_file(path)),
        lambda: convert.run(SimpleNamespace(**options)), lambda: Adapter.load(path), lambda: applied(path),
        lambda: folder_text(inspect_folder(folder)),
    )  # fmt: skip


def applied(path):
    """Change small layers by everything in the file that is no LoRA."""
    for module, parts in Adapter.load(path).others.items():
        changed(module, parts, torch.ones(4, 4), torch.zeros(4))


def try_folder(files, folder):
    for name, content in files.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            (folder / name).write_bytes(content)
    attempt(lambda: Adapter.load(folder), lambda: verify_folder(folder))


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + data


def one(kind, seeds, folder, changes, place, value):
    """One mutated file of a kind, through everything that reads such files."""
    if kind == "header":
        header, data = header_of(seeds["kohya"])
        try_file(folder / "x.safetensors", with_header(replanted(header, place, value), data), folder)
    elif kind == "body":
        try_file(folder / "x.safetensors", spliced(seeds["kohya"], changes), folder)
    elif kind == "manifest":
        manifest = json.loads(seeds["mine"]["adapter.json"])
        try_folder(seeds["mine"] | {"adapter.json": dumped(replanted(manifest, place, value))}, folder)
        path = folder / "x.json"
        path.write_bytes(spliced(seeds["mine"]["adapter.json"], changes))
        attempt(lambda: read_json(path))
    elif kind == "settings":
        name = "pytorch_lora_weights.safetensors"
        header, data = header_of(seeds["mine"][name])
        settings = json.loads(header["__metadata__"]["lora_adapter_metadata"])
        header["__metadata__"]["lora_adapter_metadata"] = json.dumps(replanted(settings, place, value))
        try_folder(seeds["mine"] | {name: with_header(header, data)}, folder)
        try_file(folder / "x.safetensors", with_header(header, data), folder)
    elif kind == "algorithms":
        header, data = header_of(seeds["algorithms"][place % 2])
        content = with_header(replanted(header, place // 2, value), data)
        try_file(folder / "x.safetensors", content if place % 3 else spliced(content, changes), folder)
    elif kind == "transformer":
        header, data = header_of(seeds["transformers"][place % 3])
        content = with_header(replanted(header, place // 3, value), data)
        try_file(folder / "x.safetensors", content if place % 4 else spliced(content, changes), folder, None)
        attempt(lambda: verify_run(VerifyConfig(folder / "x.safetensors")))
    elif kind == "config":
        weights, config = seeds["peft"]
        (folder / "adapter_config.json").write_bytes(dumped(replanted(config, place, value)))
        try_file(folder / "adapter_model.safetensors", weights, folder)
        attempt(lambda: open_adapter(folder))
    elif kind == "index":
        index = {"weight_map": dict.fromkeys(header_of(seeds["kohya"])[0], "shard.safetensors")}
        (folder / "shard.safetensors").write_bytes(seeds["kohya"])
        path = folder / "x.safetensors.index.json"
        path.write_bytes(spliced(dumped(index), changes) if place % 2 else dumped(replanted(index, place, value)))
        attempt(lambda: open_adapter(path), lambda: open_adapter(folder), lambda: Adapter.load(path))
    else:
        path = folder / "x.yaml"
        path.write_bytes(spliced(seeds["yaml"], changes) if place % 2 else dumped(replanted({"seed": 1}, place, value)))
        attempt(lambda: read_yaml(path, EditConfig))


def test_what_is_mutated_is_read_before(seeds, tmp_path):
    for content, count in zip(seeds["algorithms"], (3, 4), strict=True):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert len(Adapter.load(tmp_path / "x.safetensors").others) == count
        applied(tmp_path / "x.safetensors")
    for content, layers in zip(seeds["transformers"], (3, 3, 3), strict=True):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert sum(inspect_file(tmp_path / "x.safetensors").components.values()) == layers
    (tmp_path / "adapter_model.safetensors").write_bytes(seeds["peft"][0])
    (tmp_path / "adapter_config.json").write_text(json.dumps(seeds["peft"][1]))
    assert Adapter.load(tmp_path).lora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "examples", [EXAMPLES // len(KINDS), pytest.param(2_500, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_mutated_files_are_read_or_refused_in_one_line(kind, examples, seeds, tmp_path, capfd):
    (tmp_path / "mine").mkdir()

    count, grown = fuzzed(
        lambda *drawn: one(kind, seeds, tmp_path / "mine", *drawn), BYTES, PLACES, VALUES, examples=examples
    )
    assert count >= examples and grown < MEMORY
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}  # names in files never became paths
    assert not any(Path(path).suffix == ".partial" for path in os.listdir(tmp_path / "mine"))
