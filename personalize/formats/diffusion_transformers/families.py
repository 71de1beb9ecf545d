"""The families of diffusion transformers, as data: how the original code names the layers that diffusers names.

A row says `original name = diffusers' name`.  Several names joined by `+` are layers of diffusers that are one layer
in the original code, stacked along its outputs in this order.  `~` in place of `=` says that the two halves of the
outputs, scale and shift, have changed places; only where the layer has two outputs for each input, for layers of the
same name have six elsewhere.  Layers without a row have the same name in both.

Sources: diffusers 0.42 (`lora_conversion_utils`), ComfyUI (`utils.flux_to_diffusers`, `mmdit_to_diffusers`,
`z_image_to_diffusers`, `krea2_to_diffusers`), OneTrainer (`diffusers_to_original` of its models).
"""

from __future__ import annotations

from dataclasses import dataclass

Rows = tuple[tuple[str, str, str], ...]
"""(block in the original code, block in diffusers, rows of layers inside); `{n}` is the number of the block."""


@dataclass(frozen=True)
class Family:
    """One family.

    title: its name for people.  rows: its layers in the original code.  loader: diffusers' class that reads its LoRAs.
    also: more rows, for further names of layers.  encoders: by part, the starts of its names in kohya's and in
    ComfyUI's files.  stated: words in a file's metadata that name the family.
    """

    title: str
    loader: str
    rows: Rows
    also: Rows = ()
    encoders: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    stated: tuple[str, ...] = ()


CLIP_L = ("text_encoder", ("lora_te1", "lora_te"), "text_encoders.clip_l.transformer")
CLIP_G = ("text_encoder_2", ("lora_te2",), "text_encoders.clip_g.transformer")
T5 = "text_encoders.t5xxl.transformer"
ENDS = ("", "", "img_in=x_embedder txt_in=context_embedder final_layer.linear=proj_out")
OUTPUT_NORM = ("", "", "final_layer.adaLN_modulation.1~norm_out.linear")
EMBEDDERS = (
    ENDS,
    ("time_in", "time_text_embed.timestep_embedder", "in_layer=linear_1 out_layer=linear_2"),
    ("vector_in", "time_text_embed.text_embedder", "in_layer=linear_1 out_layer=linear_2"),
    ("guidance_in", "time_text_embed.guidance_embedder", "in_layer=linear_1 out_layer=linear_2"),
)
DOUBLE_ATTENTION = """
    img_attn.qkv=attn.to_q+attn.to_k+attn.to_v txt_attn.qkv=attn.add_q_proj+attn.add_k_proj+attn.add_v_proj
    img_attn.proj=attn.to_out.0 txt_attn.proj=attn.to_add_out
"""
FEED_FORWARD = """
    img_mlp.0=ff.net.0.proj img_mlp.2=ff.net.2 txt_mlp.0=ff_context.net.0.proj txt_mlp.2=ff_context.net.2
"""
SINGLE = "linear1=attn.to_q+attn.to_k+attn.to_v+proj_mlp linear2=proj_out"
FUSED = "attn.qkv=attn.to_q+attn.to_k+attn.to_v attn.added_qkv=attn.add_q_proj+attn.add_k_proj+attn.add_v_proj"
FUSED_BLOCKS = (("transformer_blocks.{n}", "transformer_blocks.{n}", FUSED),)  # OneTrainer trains them as one
SINGLE_QKV = (
    ("single_blocks.{n}", "single_transformer_blocks.{n}", "linear1_qkv=attn.to_q+attn.to_k+attn.to_v"),
    ("single_transformer_blocks.{n}", "single_transformer_blocks.{n}",
     "qkv_mlp=attn.to_q+attn.to_k+attn.to_v+proj_mlp"),
    *FUSED_BLOCKS,
)  # fmt: skip
Z_ATTENTION = "attention.qkv=attention.to_q+attention.to_k+attention.to_v attention.out=attention.to_out.0"
KREA_BLOCK = """
    attn.wq=attn.to_q attn.wk=attn.to_k attn.wv=attn.to_v attn.wo=attn.to_out.0 attn.gate=attn.to_gate
    mlp.gate=ff.gate mlp.up=ff.up mlp.down=ff.down
"""
ANIMA_BLOCK = """
    self_attn.q_proj=attn1.to_q self_attn.k_proj=attn1.to_k self_attn.v_proj=attn1.to_v
    self_attn.output_proj=attn1.to_out.0 cross_attn.q_proj=attn2.to_q cross_attn.k_proj=attn2.to_k
    cross_attn.v_proj=attn2.to_v cross_attn.output_proj=attn2.to_out.0 mlp.layer1=ff.net.0.proj mlp.layer2=ff.net.2
    adaln_modulation_self_attn.1=norm1.linear_1 adaln_modulation_self_attn.2=norm1.linear_2
    adaln_modulation_cross_attn.1=norm2.linear_1 adaln_modulation_cross_attn.2=norm2.linear_2
    adaln_modulation_mlp.1=norm3.linear_1 adaln_modulation_mlp.2=norm3.linear_2
"""
JOINT_BLOCK = """
    x_block.attn.qkv=attn.to_q+attn.to_k+attn.to_v x_block.attn.proj=attn.to_out.0
    x_block.attn2.qkv=attn2.to_q+attn2.to_k+attn2.to_v x_block.attn2.proj=attn2.to_out.0
    context_block.attn.qkv=attn.add_q_proj+attn.add_k_proj+attn.add_v_proj context_block.attn.proj=attn.to_add_out
    x_block.mlp.fc1=ff.net.0.proj x_block.mlp.fc2=ff.net.2 x_block.adaLN_modulation.1=norm1.linear
    context_block.mlp.fc1=ff_context.net.0.proj context_block.mlp.fc2=ff_context.net.2
    context_block.adaLN_modulation.1~norm1_context.linear
"""

FAMILIES: dict[str, Family] = {
    "flux1": Family(
        "FLUX.1", "FluxLoraLoaderMixin",
        (
            *EMBEDDERS,
            OUTPUT_NORM,
            ("double_blocks.{n}", "transformer_blocks.{n}",
             DOUBLE_ATTENTION + FEED_FORWARD + "img_mod.lin=norm1.linear txt_mod.lin=norm1_context.linear"),
            ("single_blocks.{n}", "single_transformer_blocks.{n}", f"{SINGLE} modulation.lin=norm.linear"),
        ),
        SINGLE_QKV,
        (CLIP_L, ("text_encoder_2", ("lora_te2", "lora_te3"), T5)),
        ("flux1", "flux-1", "flux.1", "flux_1"),
    ),
    "flux2": Family(
        "FLUX.2", "Flux2LoraLoaderMixin",
        (
            ENDS,
            OUTPUT_NORM,
            ("time_in", "time_guidance_embed.timestep_embedder", "in_layer=linear_1 out_layer=linear_2"),
            ("guidance_in", "time_guidance_embed.guidance_embedder", "in_layer=linear_1 out_layer=linear_2"),
            ("", "", "double_stream_modulation_img.lin=double_stream_modulation_img.linear"),
            ("", "", "double_stream_modulation_txt.lin=double_stream_modulation_txt.linear"),
            ("", "", "single_stream_modulation.lin=single_stream_modulation.linear"),
            ("double_blocks.{n}", "transformer_blocks.{n}", DOUBLE_ATTENTION + "img_mlp.0=ff.linear_in "
             "img_mlp.2=ff.linear_out txt_mlp.0=ff_context.linear_in txt_mlp.2=ff_context.linear_out"),
            ("single_blocks.{n}", "single_transformer_blocks.{n}", "linear1=attn.to_qkv_mlp_proj linear2=attn.to_out"),
        ),
        also=FUSED_BLOCKS,
        stated=("flux2", "flux-2", "flux.2", "flux_2"),
    ),
    "z-image": Family(
        "Z-Image", "ZImageLoraLoaderMixin",
        (
            ("layers.{n}", "layers.{n}", Z_ATTENTION),
            ("noise_refiner.{n}", "noise_refiner.{n}", Z_ATTENTION),
            ("context_refiner.{n}", "context_refiner.{n}", Z_ATTENTION),
            ("", "", "x_embedder=all_x_embedder.2-1"),
            ("final_layer", "all_final_layer.2-1", "linear=linear adaLN_modulation.1=adaLN_modulation.1"),
        ),
        stated=("zimage", "z-image", "z_image"),
    ),
    "qwen-image": Family("Qwen-Image", "QwenImageLoraLoaderMixin", (), stated=("qwen_image", "qwen-image", "qwen")),
    "krea2": Family(
        "Krea 2", "Krea2LoraLoaderMixin",
        (
            ("", "", "first=img_in last.linear=final_layer.linear tproj.1=time_mod_proj"),
            ("tmlp", "time_embed", "0=linear_1 2=linear_2"),
            ("txtmlp", "txt_in", "1=linear_1 3=linear_2"),
            ("", "", "txtfusion.projector=text_fusion.projector"),
            ("txtfusion.layerwise_blocks.{n}", "text_fusion.layerwise_blocks.{n}", KREA_BLOCK),
            ("txtfusion.refiner_blocks.{n}", "text_fusion.refiner_blocks.{n}", KREA_BLOCK),
            ("blocks.{n}", "transformer_blocks.{n}", KREA_BLOCK),
        ),
        stated=("krea2", "krea-2", "krea_2"),
    ),
    "anima": Family(
        "Anima", "AnimaLoraLoaderMixin",
        (
            ("", "", "x_embedder.proj.1=patch_embed.proj final_layer.linear=proj_out"),
            ("t_embedder.1", "time_embed.t_embedder", "linear_1=linear_1 linear_2=linear_2"),
            ("final_layer", "norm_out", "adaln_modulation.1=linear_1 adaln_modulation.2=linear_2"),
            ("blocks.{n}", "transformer_blocks.{n}", ANIMA_BLOCK),
        ),
        encoders=(("text_conditioner", ("lora_unet_llm_adapter",), "diffusion_model.llm_adapter"),),
        stated=("anima",),
    ),
    "sd3": Family(
        "Stable Diffusion 3", "SD3LoraLoaderMixin",
        (
            ("", "", "x_embedder.proj=pos_embed.proj context_embedder=context_embedder final_layer.linear=proj_out"),
            OUTPUT_NORM,
            ("t_embedder.mlp", "time_text_embed.timestep_embedder", "0=linear_1 2=linear_2"),
            ("y_embedder.mlp", "time_text_embed.text_embedder", "0=linear_1 2=linear_2"),
            ("joint_blocks.{n}", "transformer_blocks.{n}", JOINT_BLOCK),
        ),
        also=FUSED_BLOCKS,
        encoders=(CLIP_L, CLIP_G, ("text_encoder_3", ("lora_te3",), T5)),
        stated=("sd3", "stable-diffusion-3", "stable-diffusion-v3"),
    ),
    "chroma": Family(
        "Chroma", "FluxLoraLoaderMixin",
        (
            ENDS,
            ("distilled_guidance_layer.layers.{n}", "distilled_guidance_layer.layers.{n}",
             "in_layer=linear_1 out_layer=linear_2"),
            ("double_blocks.{n}", "transformer_blocks.{n}", DOUBLE_ATTENTION + FEED_FORWARD),
            ("single_blocks.{n}", "single_transformer_blocks.{n}", SINGLE),
        ),
        SINGLE_QKV,
        (("text_encoder", ("lora_te1",), T5),),
        ("chroma",),
    ),
}  # fmt: skip
