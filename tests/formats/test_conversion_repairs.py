"""Convert, on files whose contents other programs take badly as they are: shapes, names of blocks, headers."""

from dataclasses import replace

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.adapters.fuse import component_weights, merged_weights
from personalize.adapters.text_encoder_lora import parameters_of
from personalize.editing.attach import attach
from personalize.errors import UserError
from personalize.formats.adapter_folders import DIFFUSERS_FILE as DIFFUSERS
from personalize.formats.inspection import inspect_file
from personalize.formats.original_checkpoint import unet_name
from personalize.formats.timestep_rank import TimestepRank
from tests.formats.test_conversion import assert_same, convert, deltas
from tests.support.foreign_files import delta, kohya, kohya_stem, modules, save, small_state
from tests.support.lora_predictions import CLOSE, difference, through_loader, with_merged
from tests.support.lora_states import ATTENTION, SHALLOW, paths, random_adapter, random_lora
from tests.support.tiny import tiny

SPELLINGS = {  # a key's stem in original block names, as ComfyUI, its model's own state and kohya's tools write it
    "ComfyUI": "diffusion_model.{}",
    "checkpoint": "model.diffusion_model.{}",
    "kohya": "lora_unet_{}",
    "no prefix": "{}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("base", ["sd1", "sd2v", "sdxl"])
def test_original_names_of_blocks_are_read_in_every_family(tmp_path, base, spelling):
    model = tiny(base)
    state = random_lora(paths(model.unet, SHALLOW))
    ups = model.unet.up_blocks
    with_attention = {f"up_blocks.{i}" for i in range(len(ups)) if getattr(ups[i], "attentions", None)}
    tensors = {}
    for module, (a, b) in modules(state).items():
        name = unet_name(f"{module.removeprefix('unet.')}.weight", with_attention).removesuffix(".weight")
        stem = SPELLINGS[spelling].format(name.replace(".", "_") if spelling == "kohya" else name)
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
    file = save(tmp_path / "in.safetensors", tensors)
    found = inspect_file(file)
    assert found.readers["personalize"] == ("yes", "") and not found.layout.endswith("checkpoint")
    written = convert(file, "kohya", tmp_path / "out.safetensors", family=model.family)
    assert_same(deltas(written, model.family), {module: delta(a, b, 0.5) for module, (a, b) in modules(state).items()})


NORMS = {  # every spelling of a norm's module: in ComfyUI's, LyCORIS' and kohya's files
    "diffusion_model.input_blocks.1.0.in_layers.0": "unet.down_blocks.0.resnets.0.norm1",
    "diffusion_model.middle_block.2.out_layers.0": "unet.mid_block.resnets.1.norm2",
    "diffusion_model.input_blocks.4.1.norm": "unet.down_blocks.1.attentions.0.norm",
    "diffusion_model.out.0": "unet.conv_norm_out",
    "lora_unet_out_0": "unet.conv_norm_out",
    "lora_unet_conv_norm_out": "unet.conv_norm_out",
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_norm3":
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.norm3",
    "lora_te1_text_model_encoder_layers_0_layer_norm2": "text_encoder.text_model.encoder.layers.0.layer_norm2",
    "lora_te2_text_model_final_layer_norm": "text_encoder_2.text_model.final_layer_norm",
    "text_encoders.clip_l.transformer.text_model.final_layer_norm": "text_encoder.text_model.final_layer_norm",
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_changes_of_norms_are_merged_and_applied_and_stay_behind_in_loras(tmp_path, capsys, name):
    model, module = tiny("sdxl"), NORMS[name]
    endings = ("w_norm", "b_norm") if name.startswith("lora_") else ("diff", "diff_b")
    state = random_lora(paths(model.unet, lambda path: path.startswith("mid_block.") and ATTENTION(path)))
    component, path = module.split(".", 1)
    old = component_weights(model)[component]
    size = len(old[f"{path}.weight"])
    changes = {"weight": torch.linspace(-1, 1, size), "bias": torch.linspace(2, 3, size)}
    norm = {f"{name}.{ending}": change for ending, change in zip(endings, changes.values(), strict=True)}
    file = save(tmp_path / "in.safetensors", kohya(state, "sdxl", 4.0) | norm)
    assert inspect_file(file).readers["personalize"][0] == "partly"
    found = merged_weights(model, Adapter.load(file, family="sdxl"), any_base=True)[component]
    for kind, change in changes.items():
        assert torch.equal(found[f"{path}.{kind}"], old[f"{path}.{kind}"] + change)  # one sum in single precision
    before = parameters_of(model, [module])[f"{module}.weight"].clone()
    with attach(model.pipeline(), file):
        assert torch.equal(parameters_of(model, [f"{component}."])[f"{module}.weight"], before + changes["weight"])
    written = convert(file, "kohya", tmp_path / "out.safetensors", family="sdxl")
    assert f"1 changed bias(es) or norm(s) stay behind, first of {module}" in capsys.readouterr().out
    assert_same(deltas(written, "sdxl"), {m: delta(a, b) for m, (a, b) in modules(state).items()})


RULE = TimestepRank(rank=4, min_rank=1)


def with_rule(folder):
    """An adapter folder of an orthogonal start, rank 2r, with a timestep-dependent rank."""
    adapter = random_adapter(tiny("sd1"), rank=8)
    return replace(adapter, info={**adapter.info, "timestep_rank": RULE.values()}).save(folder)


@pytest.mark.parametrize("source", ["", "pytorch_lora_weights.safetensors", "cat.safetensors"])
@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
def test_a_timestep_dependent_rank_goes_with_the_file(tmp_path, capsys, source, to):
    file = with_rule(tmp_path / "cat") / source
    there = convert(file, to, tmp_path / ("out" if to == "peft" else "out.safetensors"))
    assert "Personalize keeps to that" in capsys.readouterr().out
    back = convert(there, "kohya", tmp_path / "back.safetensors", family="sd1")
    for path in (there, back):
        loaded = Adapter.load(path)
        assert loaded.timestep_rank == RULE and loaded.rank == 8
    if to == "diffusers":  # which passes over what else stands in the header
        assert torch.equal(
            through_loader(tiny("sd1"), there), through_loader(tiny("sd1"), tmp_path / "cat" / DIFFUSERS)
        )


def test_a_lower_rank_would_mix_components_that_act_at_different_timesteps(tmp_path):
    folder = with_rule(tmp_path / "cat")
    for file in (folder, folder / "cat.safetensors"):
        with pytest.raises(UserError, match="cannot be cut to a lower rank"):
            convert(file, "kohya", tmp_path / "out.safetensors", rank=4)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_factors_as_1x1_convolutions_beside_biases_get_the_shape_of_their_layer(tmp_path, to):
    """A module with a changed bias is read by another way than plain LoRAs; diffusers raises on 4-D factors."""
    model = tiny("sdxl")
    state = random_lora(paths(model.unet, ATTENTION))
    tensors = {key: t[:, :, None, None] if t.ndim == 2 else t for key, t in kohya(state, "sdxl", 4.0).items()}
    biases = {module: torch.ones(len(b)) for module, (_, b) in modules(state).items() if module.endswith("to_out.0")}
    tensors |= {f"{kohya_stem(module, 'sdxl')}.diff_b": bias for module, bias in biases.items()}
    written = convert(save(tmp_path / "in.safetensors", tensors), to, tmp_path / "out.safetensors", family="sdxl")
    assert_same(deltas(written, "sdxl"), {module: delta(a, b) for module, (a, b) in modules(state).items()})
    assert difference(through_loader(model, written), with_merged(model, state, 1.0)) < CLOSE


@pytest.mark.parametrize("name", ["cat", "cat.bin", "cat.ckpt", "cat.v2"])
def test_a_result_whose_name_no_program_would_open_is_not_written(tmp_path, name):
    """Under the name of a pickle, or none, a verified file was read by nothing."""
    lora = save(tmp_path / "lora.safetensors", kohya(random_lora(paths(tiny("sd1").unet, ATTENTION)), "sd1", 4.0))
    token = save(tmp_path / "token.safetensors", {"<cat>": torch.ones(1, 768)})
    for file in (lora, token):
        for to in ("kohya", "diffusers"):
            with pytest.raises(UserError, match=rf"{name} does not end in .safetensors"):
                convert(file, to, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("role", ["set_weight", "reshape_weight"])
def test_what_gives_a_layer_another_weight_or_shape_is_no_lora(tmp_path, role):
    """It was left out: `set_weight` as a "changed bias", `reshape_weight` without a word."""
    tensors = kohya(small_state("sd1"), "sd1", 4.0)
    stem = next(iter(tensors)).partition(".")[0]
    file = save(tmp_path / "in.safetensors", tensors | {f"{stem}.{role}": torch.ones(4, 4)})
    assert inspect_file(file).readers["personalize"][0] == "no"
    with pytest.raises(UserError, match=f"has ComfyUI's {role}"):
        convert(file, "kohya", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
