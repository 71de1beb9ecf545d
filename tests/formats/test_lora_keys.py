"""Names of LoRA modules in every layout: against published tables, there and back, and counted for each family."""

import pytest

from personalize.formats.lora_keys import diffusers_name, kohya_name, module_name, original_name
from personalize.models.empty import empty_unet
from tests.support.lora_states import ATTENTION, TRANSFORMER, paths

TABLE = {  # diffusers' path: flattened path in the original SDXL code
    "conv_in": "input_blocks_0_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.1.proj_in": "input_blocks_5_1_proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": "input_blocks_8_1_transformer_blocks_9_attn2_to_k",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj": "middle_block_1_transformer_blocks_3_ff_net_0_proj",
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_v": "output_blocks_2_1_transformer_blocks_0_attn1_to_v",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.resnets.0.conv1": "output_blocks_3_0_in_layers_2",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


@pytest.mark.parametrize("path", TABLE)
def test_sdxl_names_equal_the_published_table(path):
    assert kohya_name(f"unet.{path}", "sdxl") == f"lora_unet_{TABLE[path]}"
    assert diffusers_name(original_name(path)) == path


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_module_name_translated_to_kohya_and_back_is_unchanged(family):
    modules = [f"unet.{path}" for path in paths(empty_unet(family))]
    modules += [f"text_encoder.text_model.encoder.layers.11.{m}" for m in ("self_attn.out_proj", "mlp.fc1")]
    names = {kohya_name(module, family) for module in modules}
    assert len(names) == len(modules)
    assert [module_name(kohya_name(module, family)) for module in modules] == modules


@pytest.mark.parametrize(
    ("family", "counts"), [("sd1", (128, 192, 86)), ("sd2", (128, 192, 86)), ("sdxl", (560, 722, 66))]
)
def test_module_counts_of_the_families(family, counts):
    """Modules of attention, of whole transformers, and of resnets and samplers, in the released architectures."""
    unet = empty_unet(family)
    lo_con = lambda path: path.endswith((".conv1", ".conv2", ".conv_shortcut", ".time_emb_proj", ".conv"))  # noqa: E731
    assert tuple(len(paths(unet, want)) for want in (ATTENTION, TRANSFORMER, lo_con)) == counts
