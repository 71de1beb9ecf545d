"""Tiny models of each family as ComfyUI's own objects and as a diffusers pipeline, with equal weights.

ComfyUI normalises in 32 groups, so their UNets are wider than those of `tests.support.tiny`.
"""

from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from tests.support.checkouts import load
from tests.support.original_layout import unet_layout
from tests.support.tiny import tiny_pipeline

DEPTHS = {
    "sd1": ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], 1),
    "sdxl": ([0, 0, 2, 2, 3, 3], [0, 0, 0, 2, 2, 2, 3, 3, 3], 3),
}
DEPTHS["sd2v"] = DEPTHS["sd1"]
WIDER = {
    "sd1": {"block_out_channels": (32, 64, 128, 128)},
    "sd2v": {"block_out_channels": (32, 64, 128, 128)},
    "sdxl": {
        "block_out_channels": (32, 64, 128), "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 40 + 6 * 256,
    },
}  # fmt: skip
CLIPS = {"sd1": ["l"], "sd2v": ["h"], "sdxl": ["l", "g"]}


def pipeline(name):
    """A diffusers pipeline of `name` in `tests.support.tiny.NAMES` with a wider UNet of random weights."""
    pipe = tiny_pipeline(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_config({**pipe.unet.config, **WIDER[name], "norm_num_groups": 32})
    pipe.register_modules(unet=unet.requires_grad_(False).eval())
    return pipe


def comfyui(pipe, name, tmp_path):
    """ComfyUI's modules (`patcher`, `samplers`, …) and its MODEL and CLIP with the weights of `pipe`."""
    load("comfy.cli_args").args.cpu = True
    names = ("model_base", "supported_models_base", "latent_formats", "model_patcher", "sd1_clip", "sdxl_clip", "ops",
             "sd", "lora", "samplers", "utils")  # fmt: skip
    comfy = SimpleNamespace(**{part: load(f"comfy.{part}") for part in names})
    return comfy, _model(comfy, pipe, name), _clip(comfy, pipe, name, tmp_path)


def _model(comfy, pipe, name):
    config = pipe.unet.config
    widths, (down, up, middle) = config.block_out_channels, DEPTHS[name]
    heads = {"num_heads": 2, "num_head_channels": -1} if name == "sd1" else {"num_heads": -1, "num_head_channels": 16}
    unet = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": widths[0],
        "num_res_blocks": [2] * len(widths), "channel_mult": [width // widths[0] for width in widths], **heads,
        "use_spatial_transformer": True, "context_dim": config.cross_attention_dim, "transformer_depth": down,
        "transformer_depth_output": up, "transformer_depth_middle": middle, "legacy": False,
        "use_linear_in_transformer": config.use_linear_projection, "use_temporal_attention": False,
        "adm_in_channels": config.projection_class_embeddings_input_dim, "dtype": torch.float32,
    }  # fmt: skip
    if name == "sdxl":
        unet["num_classes"] = "sequential"

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = comfy.latent_formats.SD15

    kinds = comfy.model_base.ModelType
    kind = comfy.model_base.SDXL if name == "sdxl" else comfy.model_base.BaseModel
    model = kind(Config(unet), kinds.V_PREDICTION if name == "sd2v" else kinds.EPS, device="cpu")
    model.diffusion_model.load_state_dict(unet_layout(pipe.unet))
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def _clip(comfy, pipe, name, tmp_path):
    encoders = [pipe.text_encoder] + ([pipe.text_encoder_2] if name == "sdxl" else [])
    tokenizers = [pipe.tokenizer] + ([pipe.tokenizer_2] if name == "sdxl" else [])
    parent, model_class, reader_class = {
        "sd1": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1CheckpointClipModel, comfy.sd1_clip.SD1Tokenizer),
        "sd2v": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SDClipModel, comfy.sd1_clip.SD1Tokenizer),
        "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sd1_clip.SDClipModel, comfy.sdxl_clip.SDXLTokenizer),
    }[name]
    whole, reader = parent.__new__(parent), reader_class.__new__(reader_class)
    torch.nn.Module.__init__(whole)
    whole.dtypes = {torch.float32}
    for owner in (whole, reader):
        owner.clip_name, owner.clip = CLIPS[name][0], f"clip_{CLIPS[name][0]}"
    for key, encoder, tokenizer in zip(CLIPS[name], encoders, tokenizers, strict=True):
        setattr(whole, f"clip_{key}", _encoder(comfy, encoder, tokenizer, name))
        folder = tmp_path / f"tokenizer_{key}"
        tokenizer.save_pretrained(folder)
        setattr(reader, f"clip_{key}", comfy.sd1_clip.SDTokenizer(
            str(folder), pad_token=tokenizer.pad_token_id, embedding_size=encoder.config.hidden_size,
            embedding_key=f"clip_{key}", tokenizer_class=CLIPTokenizer,
        ))  # fmt: skip
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model, clip.tokenizer, clip.layer_idx, clip.tokenizer_options = whole, reader, None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    clip.patcher = comfy.model_patcher.ModelPatcher(whole, torch.device("cpu"), torch.device("cpu"))
    clip.patcher.is_clip = True
    return clip


def _encoder(comfy, encoder, tokenizer, name):
    config = encoder.config
    penultimate = {"layer": "hidden", "layer_idx": config.num_hidden_layers - 2, "layer_norm_hidden_state": False}
    hidden = penultimate if name == "sdxl" else {}
    marks = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    theirs = comfy.sd1_clip.SDClipModel(
        textmodel_json_config=config.to_dict(), dtype=torch.float32, special_tokens=marks, **hidden
    )
    theirs.transformer.set_input_embeddings(comfy.ops.manual_cast.Embedding(config.vocab_size, config.hidden_size))
    state = {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in encoder.state_dict().items()
    }
    missing, unexpected = theirs.load_sd(state)
    assert set(missing) <= {"text_projection.weight"} and not [key for key in unexpected if "position_ids" not in key]
    return theirs.requires_grad_(False).eval()
