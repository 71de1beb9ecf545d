"""Names of LoRA modules: canonical names, kohya's flattened names, and the block names of the original SDXL code.

A canonical name, as used throughout this project, is "<component>.<path>": the component is `unet`, `text_encoder` or
`text_encoder_2`; the path is diffusers' path in the UNet, and in a text encoder one that starts with `text_model.` even
where the installed version of transformers leaves that level out.  kohya's tools write paths with underscores instead
of dots, and for SDXL first translate them into the paths of the original code, which are the only ones that most
graphical programs know.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from personalize.errors import UserError
from personalize.models.config import TEXT_ENCODERS

COMPONENTS = ("unet", *TEXT_ENCODERS)
KOHYA_PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
NAMES_WITH_UNDERSCORES = """
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed label_emb
    down_blocks mid_block up_blocks transformer_blocks conv_in conv_out conv_shortcut time_embedding add_embedding
    linear_1 linear_2 time_emb_proj proj_in proj_out to_q to_k to_v to_out text_model self_attn q_proj k_proj v_proj
    out_proj text_projection layer_norm1 layer_norm2 final_layer_norm conv_norm_out
""".split()
PATH_PART = re.compile(rf"(?:{'|'.join(sorted(NAMES_WITH_UNDERSCORES, key=len, reverse=True))})(?=_|$)|[^_]+")
ORIGINAL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
SDXL_ATTENTION = frozenset({"up_blocks.0", "up_blocks.1"})  # SDXL's up blocks that have attention


def kohya_name(module: str, family: str) -> str:
    """kohya's name for a canonical module name: "lora_unet_…", "lora_te_…", "lora_te1_…" or "lora_te2_…".

    Raises:
        UserError: a module that the SDXL UNet does not have, if the family is "sdxl".
    """
    component, path = module.split(".", 1)
    if component == "unet":
        name = original_name(path) if family == "sdxl" else path
        if name is None:
            raise UserError(f"the SDXL UNet has no module {path[:120]!r}: is this adapter of another family?")
        return "lora_unet_" + name.replace(".", "_")
    number = ("1" if component == "text_encoder" else "2") if family == "sdxl" else ""
    return f"lora_te{number}_" + path.replace(".", "_")


def original_name(path: str, with_attention: Collection[str] = SDXL_ATTENTION) -> str | None:
    """Translate a path in diffusers' UNet into the path in the original code; None if it has none there.

    The block numbers follow from two resnets per down block and three per up block.

    with_attention: the up blocks that have attention ("up_blocks.1", …), by default those of SDXL.  In those the
        upsampler is the third layer of its block in the original code, in the others the second.
    """
    if path in ORIGINAL_NAMES:
        return ORIGINAL_NAMES[path]
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        number = 3 * int(match[2]) + int(match[4])
        place = f"input_blocks.{number + 1}" if match[1] == "down" else f"output_blocks.{number}"
        return f"{place}.{int(match[3] == 'attentions')}.{ORIGINAL_RESNET.get(match[5], match[5])}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}.{ORIGINAL_RESNET.get(match[3], match[3])}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op"
    if match := re.fullmatch(r"(up_blocks\.(\d+))\.upsamplers\.0\.conv", path):
        return f"output_blocks.{3 * int(match[2]) + 2}.{2 if match[1] in with_attention else 1}.conv"
    return None


def diffusers_name(path: str) -> str:
    """Translate a path in the original SDXL code into diffusers' path; any other path is returned unchanged."""
    for ours, theirs in ORIGINAL_NAMES.items():
        if path == theirs:
            return ours
    match = re.fullmatch(r"(input_blocks|output_blocks|middle_block)\.(\d+)(?:\.(\d+))?\.(.+)", path)
    if match is None or (match[1] != "middle_block" and match[3] is None):
        return path
    if match[1] == "middle_block":
        inner = _inner_name(path.split(".", 2)[2])
        return (
            f"mid_block.attentions.0.{inner}" if match[2] == "1" else f"mid_block.resnets.{int(match[2]) // 2}.{inner}"
        )
    down = match[1] == "input_blocks"
    block, layer = divmod(int(match[2]) - down, 3)
    if match[4] in {"op", "conv"}:
        return f"down_blocks.{block}.downsamplers.0.conv" if down else f"up_blocks.{block}.upsamplers.0.conv"
    kind = "attentions" if match[3] == "1" else "resnets"
    return f"{'down' if down else 'up'}_blocks.{block}.{kind}.{layer}.{_inner_name(match[4])}"


def module_name(stem: str) -> str:
    """The canonical module name for the stem of a key, the part before ".lora_A.weight" and the like.

    Raises:
        UserError: a stem that begins with no component and none of kohya's prefixes.
    """
    for prefix, component in KOHYA_PREFIXES.items():
        if stem.startswith(f"{prefix}_"):
            path = ".".join(PATH_PART.findall(stem.removeprefix(f"{prefix}_")))
            return with_text_model(component, diffusers_name(path) if component == "unet" else path)
    component, _, path = stem.partition(".")
    if component not in COMPONENTS or not path:
        raise UserError(f"{stem[:120]!r} belongs to no known part: names start with {', '.join(COMPONENTS)} or lora_")
    return with_text_model(component, path)


def with_text_model(component: str, path: str) -> str:
    """The canonical module name, which in text encoders includes `text_model.`, for a path with or without it."""
    nested = component == "unet" or path.startswith(("text_model.", "text_projection"))
    return f"{component}.{path}" if nested else f"{component}.text_model.{path}"


def _inner_name(inner: str) -> str:
    """diffusers' name of a layer inside a resnet for the original code's name."""
    return next((ours for ours, theirs in ORIGINAL_RESNET.items() if inner == theirs), inner)
