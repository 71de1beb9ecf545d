"""Errors of naive LoRA files that no other test covers: what stock diffusers loses of them, and keeps of ours."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from safetensors.torch import save_file

from personalize.errors import UserError
from personalize.formats.foreign_files import read_adapter_file
from personalize.formats.lora_files import diffusers_file, kohya_file
from personalize.formats.textual_inversion_files import token_file_contents
from personalize.io.atomic import write_file
from personalize.io.tensor_files import read_tensors
from tests.support.foreign_files import delta, diffusers, kohya, modules, save
from tests.support.lora_predictions import CLOSE, difference, through_loader, with_merged
from tests.support.lora_states import ATTENTION, paths, predict, random_lora, text_lora
from tests.support.tiny import tiny


def exported_by_diffusers(state):
    """What `--output_kohya_format` of diffusers' training scripts writes."""
    return convert_state_dict_to_kohya(convert_all_state_dict_to_peft(dict(state)))


def test_diffusers_kohya_exporter_halves_an_alpha_of_twice_the_rank(tmp_path):
    """§2.4, 1: it writes alpha = rank, whatever the strength was."""
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION), rank=4)
    naive = exported_by_diffusers(state)
    assert {float(tensor) for key, tensor in naive.items() if key.endswith(".alpha")} == {4.0}
    write_file(tmp_path / "ours.safetensors", kohya_file(state, 8.0, family="sd1"))
    save_file({key: tensor.contiguous() for key, tensor in naive.items()}, tmp_path / "naive.safetensors")
    weak, ours = (
        through_loader(model, tmp_path / "naive.safetensors"),
        through_loader(model, tmp_path / "ours.safetensors"),
    )
    expected = with_merged(model, state, 8 / 4)
    assert difference(weak, expected) > 100 * CLOSE
    assert difference(ours, expected) < CLOSE


def test_diffusers_kohya_exporter_spoils_the_unet_beside_a_text_encoder():
    """§2.4, 2: of a joint file, in the names the scripts save, only the text encoder's are translated."""
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION)) | text_lora(model)
    ours, naive = set(kohya(state, "sd1", 4.0)), set(exported_by_diffusers(diffusers(state)))
    text = {key for key in ours if key.startswith("lora_te_")}
    assert text and {key.replace("lora_te_", "lora_te1_") for key in text} <= naive  # that half, under SDXL's prefix
    assert not ours & naive
    assert any(key.startswith("lora_unet_") and "_lora.down.weight" in key for key in naive)


def test_diffusers_kohya_exporter_keeps_its_own_block_names_on_sdxl():
    """§2.4, 4: tools that know only the original names find nothing."""
    state = random_lora(paths(tiny("sdxl").unet, ATTENTION))
    naive = {key.split(".")[0] for key in exported_by_diffusers(state)}
    ours = {key.split(".")[0] for key in kohya(state, "sdxl", 4.0)}
    assert len(naive) == len(ours) and not naive & ours
    assert all("input_blocks" in stem or "output_blocks" in stem or "middle_block" in stem for stem in ours)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_without_a_component_load_nothing_and_we_read_them(tmp_path, prefix):
    """§2.2: a bare file is a mild warning and the base model; with PEFT's own prefix too."""
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION))
    bare = {prefix + key.removeprefix("unet."): tensor for key, tensor in state.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    assert torch.equal(through_loader(model, tmp_path / "bare.safetensors"), predict(model))
    read = read_adapter_file(tmp_path / "bare.safetensors")
    assert read.state.keys() == state.keys()


def test_peft_prefix_inside_the_component_is_an_error_in_diffusers_and_we_read_it(tmp_path):
    """§2.2: `unet.base_model.model.…`."""
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION))
    odd = {key.replace("unet.", "unet.base_model.model.", 1): tensor for key, tensor in state.items()}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(Exception, match="(?i)target modules|base_model"):
        through_loader(model, tmp_path / "odd.safetensors")
    assert read_adapter_file(tmp_path / "odd.safetensors").state.keys() == state.keys()


def test_one_odd_alpha_in_a_text_encoder_is_wrong_in_diffusers_and_right_when_read_by_us(tmp_path):
    """§2.7: the alpha of one projection that differs from its siblings' never reaches its module."""
    model = tiny("sd1")
    state = text_lora(model)
    odd = next(module for module in modules(state) if module.endswith("layers.1.self_attn.q_proj"))
    alphas = {module: 1.0 if module == odd else 4.0 for module in modules(state)}
    file = save(tmp_path / "odd.safetensors", kohya(state, "sd1", alphas))
    read = read_adapter_file(file)
    naive = through_loader(model, file)
    write_file(tmp_path / "ours.safetensors", kohya_file(read.state, read.alpha, family="sd1"))
    ours = through_loader(model, tmp_path / "ours.safetensors")
    expected = with_merged(model, read.state, read.alpha / read.rank)
    truth = {module: delta(a, b, alphas[module] / 4) for module, (a, b) in modules(state).items()}
    found = {module: delta(a, b, read.alpha / read.rank) for module, (a, b) in modules(read.state).items()}
    assert all(torch.allclose(found[module], truth[module], atol=1e-7) for module in truth)  # fp32 rounding at 0.02
    assert difference(naive, expected) > 10 * CLOSE  # one projection of one layer: a small error, and never said
    assert difference(ours, expected) < CLOSE


def test_dynamic_ranks_are_wrong_in_diffusers_and_right_when_padded_by_us(tmp_path):
    """§2.7: kohya's resize leaves each module its own rank, alpha = rank; ours are padded to one."""
    model = tiny("sd1")
    whole = random_lora(paths(model.unet, ATTENTION), rank=4)
    state, alphas = {}, {}
    for number, (module, (a, b)) in enumerate(modules(whole).items()):
        rank = 1 + number % 4
        state |= {f"{module}.lora_A.weight": a[:rank], f"{module}.lora_B.weight": b[:, :rank]}
        alphas[module] = float(rank)
    file = save(tmp_path / "resized.safetensors", kohya(state, "sd1", alphas))
    read = read_adapter_file(file)
    naive = through_loader(model, file)
    expected = with_merged(model, read.state, read.alpha / read.rank)
    write_file(tmp_path / "ours.safetensors", kohya_file(read.state, read.alpha, family="sd1"))
    assert difference(naive, expected) > 100 * CLOSE
    assert difference(through_loader(tiny("sd1"), tmp_path / "ours.safetensors"), expected) < CLOSE


def test_added_embeddings_of_sdxl_are_lost_under_diffusers_block_names(tmp_path):
    """§2.6: in a file with diffusers' block names the two `add_embedding` layers do not arrive; by ours they do."""
    model = tiny("sdxl")
    state = random_lora(paths(model.unet, lambda path: path.endswith("attn2.to_k") or "add_embedding" in path))
    save(tmp_path / "naive.safetensors", kohya(state, "sdxl", 4.0, blocks="diffusers"))
    write_file(tmp_path / "ours.safetensors", kohya_file(state, 4.0, family="sdxl"))
    naive = through_loader(model, tmp_path / "naive.safetensors")
    ours = through_loader(model, tmp_path / "ours.safetensors")
    expected = with_merged(model, state, 1.0)
    assert difference(naive, expected) > 100 * CLOSE
    assert difference(ours, expected) < CLOSE


def test_diffusers_raises_at_embeddings_bundled_into_a_lora_so_ours_are_files_of_their_own(tmp_path):
    """§0.8 and §2.11: `bundle_emb.*` beside the weights."""
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION))
    bundle = {"bundle_emb.my-cat.string_to_param.*": torch.randn(1, 32)}
    save_file(kohya(state, "sd1", 4.0) | bundle, tmp_path / "bundle.safetensors")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        through_loader(model, tmp_path / "bundle.safetensors")
    rows = {"<my-cat>": {"text_encoder": torch.randn(1, 32)}}
    assert not any("lora" in name for name in token_file_contents(rows))
    write_file(tmp_path / "ours.safetensors", kohya_file(state, 4.0, family="sd1"))
    assert not any("bundle_emb" in key for key in read_tensors(tmp_path / "ours.safetensors").tensors)


def test_a_full_dump_of_the_peft_config_crashes_an_older_peft_and_ours_is_minimal(tmp_path):
    """§0.7: a field the reader does not know is a TypeError."""
    model = tiny("sd1")
    state = random_lora(paths(model.unet, ATTENTION))
    write_file(tmp_path / "ours.safetensors", diffusers_file(state, 8.0))
    content = read_tensors(tmp_path / "ours.safetensors")
    settings = content.metadata["lora_adapter_metadata"].replace("{", '{"unet.a_field_of_tomorrow": 1, ', 1)
    save_file(state, tmp_path / "full.safetensors", {**content.metadata, "lora_adapter_metadata": settings})
    with pytest.raises(TypeError, match="could not be instantiated") as error:
        through_loader(model, tmp_path / "full.safetensors")
    assert "a_field_of_tomorrow" in str(error.value.__cause__)
    assert difference(through_loader(model, tmp_path / "ours.safetensors"), with_merged(model, state, 2.0)) < CLOSE


def test_custom_diffusion_loads_as_nothing_through_the_unet_and_we_refuse_it_by_name(tmp_path):
    """§2.12: `load_attn_procs` says nothing and does nothing; we say what the file is."""
    pipe = StableDiffusionPipeline.from_pipe(tiny("sd1").pipeline())
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor"
    width = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.shape
    tensors = {f"{path}.{name}_custom_diffusion.weight": torch.randn(width) for name in ("to_k", "to_v")}
    torch.save(tensors, tmp_path / "pytorch_custom_diffusion_weights.bin")
    save_file(tensors, tmp_path / "custom.safetensors")
    before = {name: type(processor) for name, processor in pipe.unet.attn_processors.items()}
    pipe.unet.load_attn_procs(tmp_path, weight_name="pytorch_custom_diffusion_weights.bin", use_safetensors=False)
    assert {name: type(processor) for name, processor in pipe.unet.attn_processors.items()} == before
    with pytest.raises(UserError, match="(?i)custom diffusion"):
        read_adapter_file(tmp_path / "custom.safetensors")


def test_diffusers_exporter_drops_text_model_as_transformers_does_and_ours_writes_it(tmp_path):
    """§2.3: since transformers 5.6 an encoder's own names lack it; UIs then drop that half."""
    state = text_lora(tiny("sd1"))
    fresh = {key.replace("text_model.", ""): tensor for key, tensor in state.items()}
    naive = exported_by_diffusers(fresh)
    assert naive and not any("text_model" in key for key in naive)
    write_file(tmp_path / "ours.safetensors", kohya_file(fresh, 4.0, family="sd1"))
    assert all("lora_te_text_model_" in key for key in read_tensors(tmp_path / "ours.safetensors").tensors)
