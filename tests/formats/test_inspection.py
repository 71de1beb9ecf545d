"""Inspect: every known layout is recognised and named, and the problems of a file are reported."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from personalize.cli.commands import inspect
from personalize.errors import UserError
from personalize.formats import coverage, layouts
from personalize.formats.inspection import inspect_file
from personalize.formats.inspection_report import report
from personalize.formats.lora_files import diffusers_file, kohya_file, kohya_metadata
from tests.support.foreign_files import diffusers, kohya, modules, old_diffusers, save, small_state, with_uneven_ranks

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SDXL_METADATA = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}


@pytest.fixture(scope="module")
def state():
    return small_state("sd1", text=True)


def inspected(tmp_path, tensors, metadata=None, name="x.safetensors"):
    return inspect_file(save(tmp_path / name, tensors, metadata))


def verdicts(found):
    return {program: verdict for program, (verdict, _) in found.readers.items()}


def test_inspection_of_a_diffusers_file(tmp_path, state):
    (tmp_path / "d.safetensors").write_bytes(diffusers_file(state, 8.0))
    found = inspect_file(tmp_path / "d.safetensors")
    assert (found.layout, found.family) == ("LoRA in PEFT names", "sd1") and not found.problems
    assert found.ranks == {"4": 131} and found.strengths == {"2": 131}
    assert found.components == {"text_encoder": 3, "unet": 128}
    assert verdicts(found) == {
        "personalize": "yes", "diffusers": "yes", "A1111": "no", "Forge": "no", "ComfyUI": "no", "InvokeAI": "partly",
        "sd-scripts": "no",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_our_kohya_file_is_read_by_every_program(tmp_path, family):
    about = kohya_metadata(title="t", family=family, rank=4, info={})
    data = kohya_file(small_state(family, text=True), 8.0, family=family, metadata=about)
    (tmp_path / "k.safetensors").write_bytes(data)
    found = inspect_file(tmp_path / "k.safetensors")
    assert (found.layout, found.family) == ("LoRA in kohya names", family)
    assert not found.problems and set(verdicts(found).values()) == {"yes"}
    assert found.metadata["ss_network_dim"] == "4"


def test_old_diffusers_and_comfyui_and_bare_and_peft_folder_names(tmp_path, state):
    attention = {key: tensor for key, tensor in state.items() if ".mlp." not in key}
    unet = {key: tensor for key, tensor in attention.items() if key.startswith("unet.")}
    cases = {
        "old diffusers": old_diffusers(attention),
        "no prefix": {key.removeprefix("unet."): tensor for key, tensor in unet.items()},
        "PEFT folder": {f"base_model.model.{key.removeprefix('unet.')}": tensor for key, tensor in unet.items()},
    }
    for name, tensors in cases.items():
        found = inspected(tmp_path, tensors)
        expected = attention if name == "old diffusers" else unet
        assert found.layout == f"LoRA in {name} names" and found.components["unet"] == 128
        assert sum(found.components.values()) == len(expected) // 2 and found.family == "sd1"
    assert verdicts(inspected(tmp_path, cases["no prefix"]))["diffusers"] == "no"
    comfy = {key.replace("unet.mid_block.attentions.0", "diffusion_model.middle_block.1"): t for key, t in unet.items()}
    found = inspected(tmp_path, {key: tensor for key, tensor in comfy.items() if key.startswith("diffusion_model.")})
    assert found.layout == "LoRA in ComfyUI names" and found.components == {"unet": 8} and found.rows[5].changed == 8


def test_mixed_names_are_reported_with_the_number_of_modules_diffusers_drops(tmp_path):
    state = small_state("sd1", want=lambda path: ".attn" in path or path == "conv_in")
    found = inspected(tmp_path, diffusers(state, attention_only=True))
    assert any("drops 128 of 129 UNet modules" in problem for problem in found.problems)
    assert verdicts(found)["diffusers"] == "partly" and verdicts(found)["ComfyUI"] == "no"
    assert len(found.dropped["diffusers"]) == 128 and "unet.conv_in" not in found.dropped["diffusers"]
    assert "dropped by diffusers" in report(found)
    alone = inspected(tmp_path, diffusers(small_state("sd1")))
    assert not any("mixed" in problem for problem in alone.problems)


def test_missing_text_model_is_reported(tmp_path, state):
    for tensors in (kohya(state, "sd1", 4.0, nested=False), diffusers(state, nested=False)):
        found = inspected(tmp_path, tensors)
        assert any("3 text-encoder module(s) lack 'text_model'" in problem for problem in found.problems)
        assert found.dropped["ComfyUI"] == sorted(module for module in modules(state) if module.startswith("text_"))
    assert verdicts(inspected(tmp_path, kohya(state, "sd1", 4.0, nested=False)))["ComfyUI"] == "partly"


def test_uneven_alphas_and_ranks_are_reported_as_unreadable_for_diffusers(tmp_path, state):
    cut, alphas, _ = with_uneven_ranks(state)
    found = inspected(tmp_path, kohya(cut, "sd1", alphas))
    assert sum("alphas or ranks differ" in problem for problem in found.problems) == 2
    assert verdicts(found)["diffusers"] == "no" and verdicts(found)["A1111"] == "yes"
    assert found.ranks == {"1": 33, "2": 33, "3": 33, "4": 32} and len(found.strengths) > 4


def test_diffusers_block_names_and_missing_family_metadata_of_sdxl_are_reported(tmp_path):
    state = small_state("sdxl")
    found = inspected(tmp_path, kohya(state, "sdxl", 4.0, blocks="diffusers"), SDXL_METADATA)
    assert any("SDXL module(s) have diffusers' block names" in problem for problem in found.problems)
    assert (verdicts(found)["sd-scripts"], verdicts(found)["ComfyUI"]) == ("no", "yes")
    found = inspected(tmp_path, kohya(state, "sdxl", 4.0), {"ss_output_name": "x"})
    assert found.readers["A1111"][0] == "partly" and "hides" in found.readers["A1111"][1]
    assert not inspected(tmp_path, kohya(state, "sdxl", 4.0), SDXL_METADATA).problems


def test_alpha_in_two_places_or_in_none_is_reported(tmp_path, state):
    found = inspected(tmp_path, kohya(state, "sd1", 4.0), {"lora_adapter_metadata": "{}"})
    assert verdicts(found)["diffusers"] == "no" and any("refuses" in problem for problem in found.problems)
    assert any("nothing says what alpha is" in problem for problem in inspected(tmp_path, state).problems)


OTHERS = {
    "LoHa": {f"{Q}.hada_w1_a": (8, 4), f"{Q}.hada_w1_b": (4, 8), f"{Q}.hada_w2_a": (8, 4), f"{Q}.hada_w2_b": (4, 8)},
    "LoKr": {f"{Q}.lokr_w1": (2, 2), f"{Q}.lokr_w2": (4, 4)},
    "DoRA": {f"{Q}.lora_down.weight": (4, 8), f"{Q}.lora_up.weight": (8, 4), f"{Q}.dora_scale": (8, 1)},
    "Tucker LoCon": {
        f"{Q}.lora_down.weight": (4, 8, 1, 1), f"{Q}.lora_up.weight": (8, 4, 1, 1),
        f"{Q}.lora_mid.weight": (4, 4, 3, 3),
    },
    "full difference": {f"{Q}.diff": (8, 8), f"{Q}.diff_b": (8,)},
    "GLoRA": {f"{Q}.a1.weight": (4, 8), f"{Q}.a2.weight": (8, 4), f"{Q}.b1.weight": (4, 8), f"{Q}.b2.weight": (8, 4)},
    "OFT or BOFT": {f"{Q}.oft_blocks": (2, 4, 4)},
    "(IA)3": {f"{Q}.weight": (8,), f"{Q}.on_input": ()},
    "Custom Diffusion": {
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight": (8, 768),
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_custom_diffusion.weight": (8, 768),
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_custom_diffusion.0.bias": (8,),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_algorithms_are_recognised_and_named(tmp_path, name):
    tensors = {key: torch.ones(shape) for key, shape in OTHERS[name].items()}
    found = inspected(tmp_path, tensors, {"ss_base_model_version": "sd_v1"})
    assert found.algorithms[name] and name in found.layout and found.family == "sd1"
    assert sum(found.components.values()) == len({m for m in layouts.classify_tensors(tensors).modules})
    assert not any("belong to nothing known" in problem for problem in found.problems)
    takes = {"Tucker LoCon": "yes", "LoHa": "yes", "LoKr": "yes", "Custom Diffusion": "no"}
    assert verdicts(found)["personalize"] == takes.get(name, "partly")
    if name in ("LoHa", "LoKr", "DoRA"):
        assert verdicts(found)["diffusers"] == "no" and verdicts(found)["ComfyUI"] == "yes"


EMBEDDINGS = {  # form: tensors, family, token, vectors of the first, diffusers' verdict
    "diffusers form": ({"<cat>": (2, 768)}, "sd1", "<cat>", 2, "yes"),
    "A1111 form": ({"emb_params": (3, 1024)}, "sd2", "mine", 3, "partly"),
    "SDXL form": ({"clip_g": (1, 1280), "clip_l": (1, 768)}, "sdxl", "mine", 1, "no"),
    "OneTrainer form": ({"emp_params": (1, 768), "emp_params_out": (1, 768)}, "sd1", "mine", 1, "partly"),
    "cog-sdxl form": ({"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)}, "sdxl", "mine", 2, "no"),
}


@pytest.mark.parametrize("form", EMBEDDINGS)
def test_learned_tokens_are_recognised(tmp_path, form):
    shapes, family, token, count, verdict = EMBEDDINGS[form]
    found = inspected(tmp_path, {key: torch.ones(shape) for key, shape in shapes.items()}, name="mine.safetensors")
    assert found.layout == f"textual inversion, {form}" and found.family == family
    assert (found.tokens[0]["token"], found.tokens[0]["vectors"]) == (token, count) and not found.rows
    assert verdicts(found)["diffusers"] == verdict and f"token       {token}: {count} vector(s)" in report(found)


def test_a_token_of_a_base_of_other_text_widths_is_recognised_by_its_name(tmp_path):
    found = inspected(tmp_path, {"<cat>": torch.ones(1, 128)}, name="learned_embeds.safetensors")
    assert (found.layout, found.family) == ("textual inversion, diffusers form", None) and not found.problems
    assert verdicts(found)["personalize"] == "yes"
    assert inspected(tmp_path, {"cat": torch.ones(1, 128)}, name="cat.safetensors").layout == "nothing known"


def test_bundles_flat_lists_checkpoints_and_source_embeddings_are_named(tmp_path, state):
    tensors = kohya(state, "sd1", 4.0) | {"bundle_emb.cat.string_to_param.*": torch.ones(1, 768)}
    found = inspected(tmp_path, tensors)
    assert "bundle" in found.layout and found.tokens[0]["token"] == "cat" and found.components["unet"] == 128
    assert (verdicts(found)["diffusers"], verdicts(found)["A1111"], verdicts(found)["Forge"]) == ("no", "yes", "partly")
    for form, key in {
        "checkpoint": "model.diffusion_model.input_blocks.0.0.weight",
        "flat list of cloneofsimo/lora": "unet:0:up",
        "source embedding of personalize": "embeds",
    }.items():
        found = inspected(tmp_path, {key: torch.ones(2, 2)})
        assert found.layout == form and verdicts(found)["diffusers"] == "no"
    assert inspected(tmp_path, {"anything": torch.ones(2, 2, 2)}).layout == "nothing known"


def test_numbers_that_are_not_finite_missing_matrices_and_unknown_modules_are_reported(tmp_path):
    tensors = {
        f"{Q}.lora_down.weight": torch.full((4, 8), float("nan")), f"{Q}.lora_up.weight": torch.ones(8, 4),
        f"{Q[:-1]}k.lora_down.weight": torch.ones(4, 8),
        f"{Q[:-1]}v.lora_down.weight": torch.ones(4, 8), f"{Q[:-1]}v.lora_up.weight": torch.ones(8, 3),
        f"{Q[:-4]}to_out_0.lora_down.weight": torch.ones(4, 8), f"{Q[:-4]}to_out_0.lora_up.weight": torch.zeros(8, 4),
        "lora_unet_double_blocks_0_img_attn.lora_down.weight": torch.ones(4, 8),
        "lora_unet_double_blocks_0_img_attn.lora_up.weight": torch.ones(8, 4),
        f"{Q}.alpha": torch.tensor(-1.0), "what": torch.ones(1),
    }  # fmt: skip
    problems = " ".join(inspected(tmp_path, tensors, {"ss_base_model_version": "sd_v1"}).problems)
    for words in (
        "not finite", "has only ['A']", "make no pair", "change nothing", "1 module(s) are not in a model of sd1",
        "alpha -1.0", "1 key(s) belong to nothing known",
    ):  # fmt: skip
        assert words in problems


def test_coverage_counts_changed_and_existing_modules(tmp_path, state):
    rows = {row.block: row for row in inspected(tmp_path, state).rows}
    assert list(rows)[:5] == ["other", "down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3"]
    assert rows["mid_block"].counts["self-attention"] == (4, 4) and rows["mid_block"].counts["resnet"] == (0, 6)
    assert rows["text_encoder"].counts == {"self-attention": (2, 48), "feed-forward": (1, 24)}
    parts = [pair for module, pair in modules(state).items() if module.startswith("unet.mid_block.")]
    expected = sum(float((b @ a).double().square().sum()) for a, b in parts) ** 0.5
    assert rows["mid_block"].norm == pytest.approx(expected, rel=1e-5)  # fp32 products, double Gram matrices
    assert "4/4" in coverage.coverage_text(list(rows.values()))


def test_the_command_prints_text_json_and_a_picture(tmp_path, state, capsys):
    file = save(tmp_path / "x.safetensors", state, {"note": "a\nb\x1b[31m"})
    options = {"file": file, "json": False, "picture": tmp_path / "c.png", "allow_pickle": False}
    inspect.run(SimpleNamespace(**options))
    out = capsys.readouterr().out
    assert "Stable Diffusion 1.x" in out and "\x1b" not in out and "ComfyUI     no" in out
    assert Image.open(tmp_path / "c.png").size[0] > 300
    inspect.run(SimpleNamespace(**options | {"json": True, "picture": None}))
    printed = json.loads(capsys.readouterr().out)
    assert printed["family"] == "sd1" and printed["readers"]["A1111"][0] == "no" and len(printed["rows"]) == 11
    embedding = save(tmp_path / "e.safetensors", {"emb_params": torch.ones(1, 768)})
    with pytest.raises(UserError, match="no coverage to draw"):
        inspect.run(SimpleNamespace(**options | {"file": embedding}))


def test_pickles_are_refused_unless_allowed_and_never_run(tmp_path, state):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save(kohya(state, "sd1", 4.0), tmp_path / "x.pt")
    torch.save({"lora_unet_a.alpha": Harm()}, tmp_path / "harm.bin")
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "cat", "step": 5}
    torch.save(a1111, tmp_path / "e.pt")
    (tmp_path / "fake.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="--allow_pickle"):
        inspect_file(tmp_path / "x.pt")
    found = inspect_file(tmp_path / "x.pt", allow_pickle=True)
    assert found.components["unet"] == 128 and any("pickle" in problem for problem in found.problems)
    found = inspect_file(tmp_path / "e.pt", allow_pickle=True)
    assert found.layout == "textual inversion, A1111 pickle" and found.tokens[0] == {
        "key": "string_to_param.*", "token": "cat", "vectors": 2, "width": 768,
    }  # fmt: skip
    for name in ("harm.bin", "fake.bin"):
        with pytest.raises(UserError, match="no pickle of plain tensors"):
            inspect_file(tmp_path / name, allow_pickle=True)
    assert not (tmp_path / "harm").exists()
    text = b'{"<a>":{"dtype":"F32","shape":[1,768],"data_offsets":[0,3072]}}'.ljust(128)
    # its length begins as a pickle does: with the byte 0x80
    (tmp_path / "128.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(3072))
    assert inspect_file(tmp_path / "128.safetensors").layout == "textual inversion, diffusers form"
    (tmp_path / "renamed.bin").write_bytes(diffusers_file(state, 4.0))
    assert inspect_file(tmp_path / "renamed.bin").components["unet"] == 128


@pytest.mark.parametrize("name", ["nothing.safetensors", "."])
def test_folders_and_missing_files_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="does not exist|is no adapter folder"):
        inspect_file(tmp_path / name)
