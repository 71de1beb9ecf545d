"""Under which key a reader looks for each module's LoRA: name maps derived from a real UNet, for `verify` alone.

The modules of a UNet are walked (on the meta device if no base is at hand), and each is given the keys that diffusers
and the graphical programs would look for.  For SDXL the walk counts blocks as the original code does when it builds
them.  Nothing of `formats` or `lora_names` is used here, so that an error there cannot hide itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from personalize.files import TensorFile

TEXT_LAYERS = 32  # of the deepest text encoder of these families
TEXT_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")

Factors = dict[str, tuple[Tensor, Tensor, float]]
"""By module, "<component>.<path>": A, B and alpha / r."""


class ReaderNames:
    """Every key a reader looks for, and the module it puts it into: "<component>.<path>" with `text_model.`."""

    def __init__(self, family: str, unet: nn.Module | None = None) -> None:
        walked = skeleton(family) if unet is None else unet
        paths = dict(leaves(walked))
        self.shapes = None if unet is None else {f"unet.{path}": layer.weight.shape for path, layer in paths.items()}
        flat = original_paths(walked) if family == "sdxl" else {path: path for path in paths}
        self._kohya = {"lora_unet_" + key.replace(".", "_"): f"unet.{path}" for key, path in flat.items()}
        self._peft = {f"unet.{path}": f"unet.{path}" for path in paths}
        encoders = (
            {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
            if family == "sdxl"
            else {"lora_te": "text_encoder"}
        )
        for prefix, component in encoders.items():
            for path in _text_paths():
                self._peft[f"{component}.{path}"] = f"{component}.{path}"
                self._kohya[f"{prefix}_{path.replace('.', '_')}"] = f"{component}.{path}"

    def kohya(self, content: TensorFile) -> tuple[Factors, list[str]]:
        """Factors as a graphical program reads them: `lora_down`, `lora_up`, and an alpha per module (default: r)."""
        suffixes = {".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"}
        grouped, problems = _grouped(content.tensors, suffixes, self._kohya)
        if "lora_adapter_metadata" in content.metadata and any(key.endswith(".alpha") for key in content.tensors):
            problems.append("lora_adapter_metadata stands beside alpha keys: diffusers refuses such a file")
        factors = {}
        for module, parts in grouped.items():
            rank = parts["A"].shape[0]
            alpha = float(parts["alpha"]) if "alpha" in parts and parts["alpha"].numel() == 1 else 0.0
            factors[module] = (parts["A"], parts["B"], alpha / rank if alpha and rank else 1.0)
        return factors, problems

    def peft(self, content: TensorFile) -> tuple[Factors, list[str]]:
        """Factors as diffusers reads them: one alpha per component out of the metadata, or 1 without."""
        grouped, problems = _grouped(content.tensors, {".lora_A.weight": "A", ".lora_B.weight": "B"}, self._peft)
        try:
            settings = json.loads(content.metadata["lora_adapter_metadata"])
            factors = {}
            for module, parts in grouped.items():
                component, path = module.split(".", 1)
                rank, alpha = settings[f"{component}.r"], settings[f"{component}.lora_alpha"]
                if rank != parts["A"].shape[0]:
                    problems.append(f"module {module} has rank {parts['A'].shape[0]}, the metadata says {rank}")
                if not any(f".{path}".endswith(f".{name}") for name in settings[f"{component}.target_modules"]):
                    problems.append(f"module {module} is not among the metadata's target_modules: it is not loaded")
                factors[module] = (parts["A"], parts["B"], alpha / rank)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
            factors = {module: (parts["A"], parts["B"], 1.0) for module, parts in grouped.items()}
            problems.append(f"lora_adapter_metadata is missing or damaged ({error!r}): strength 1 is assumed")
        return factors, problems


def _grouped(
    tensors: Mapping[str, Tensor], suffixes: Mapping[str, str], table: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by module and role; keys no reader knows and modules lacking a factor become problems."""
    grouped: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        module = table.get(key.removesuffix(suffix)) if suffix else None
        if suffix is None or module is None:
            problems.append(f"no reader knows the key {key[:120]!r}")
        else:
            grouped.setdefault(module, {})[suffixes[suffix]] = tensor
    whole = {}
    for module, parts in grouped.items():
        if "A" in parts and "B" in parts and parts["A"].ndim > 1 and parts["B"].ndim > 1:
            whole[module] = parts
        else:
            problems.append(f"module {module} has only {sorted(parts)}")
    return whole, problems


def leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every linear layer and convolution with its path, those under an adapter by the path they have without it."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, LoraLayer):
            yield here, child.get_base_layer()
        elif isinstance(child, nn.Linear | nn.Conv2d):
            yield here, child
        else:
            yield from leaves(child, here)


def original_paths(unet: nn.Module) -> dict[str, str]:
    """Paths in the original SDXL code → paths in `unet`, by appending blocks as that code does and counting them."""
    unet_: Any = unet
    places: list[tuple[str, str]] = [("input_blocks.0.0", "conv_in"), ("out.2", "conv_out")]
    places += [(f"time_embed.{2 * i}", f"time_embedding.linear_{i + 1}") for i in (0, 1)]
    places += [(f"label_emb.0.{2 * i}", f"add_embedding.linear_{i + 1}") for i in (0, 1)]
    rows = [["conv_in"]]
    for b, block in enumerate(unet_.down_blocks):
        rows += _rows(block, f"down_blocks.{b}")
        rows += [[f"down_blocks.{b}.downsamplers.0"]] if block.downsamplers else []
    places += [(f"input_blocks.{n}.{k}", path) for n, row in enumerate(rows) for k, path in enumerate(row) if n]
    places += [
        (f"middle_block.{k}", f"mid_block.{path}") for k, path in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    ]
    rows = []
    for b, block in enumerate(unet_.up_blocks):
        rows += _rows(block, f"up_blocks.{b}")
        rows[-1] += [f"up_blocks.{b}.upsamplers.0"] if block.upsamplers else []
    places += [(f"output_blocks.{n}.{k}", path) for n, row in enumerate(rows) for k, path in enumerate(row)]
    found = {}
    for path, _ in leaves(unet):
        original, place = next((o, p) for o, p in places if path == p or path.startswith(f"{p}."))
        found[(original + _inner(path.removeprefix(place), place)).removesuffix(".")] = path
    return found


def _rows(block: Any, path: str) -> list[list[str]]:
    """One row of layers per resnet of a block: the resnet, and the attention after it where there is one."""
    attends = bool(getattr(block, "attentions", None))
    return [
        [f"{path}.resnets.{i}", *([f"{path}.attentions.{i}"] if attends else [])] for i in range(len(block.resnets))
    ]


def _inner(rest: str, place: str) -> str:
    """A layer's name inside its block in the original code; attentions and the rest keep theirs."""
    if "resnets" in place:
        order = {".conv1": ".in_layers.2", ".conv2": ".out_layers.3", ".time_emb_proj": ".emb_layers.1"}
        return (order | {".conv_shortcut": ".skip_connection"})[rest]
    return ".op" if "downsamplers" in place else rest


@cache
def skeleton(family: str) -> UNet2DConditionModel:
    """A UNet with the module names of `family`, without weights: narrow, on the meta device; not to be altered."""
    widths: dict[str, Any] = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    if family == "sdxl":
        widths |= {
            "block_out_channels": (4, 8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8,
        }
    else:
        widths["block_out_channels"] = (4, 8, 16, 16)  # a change of width brings a conv_shortcut
    with torch.device("meta"):
        return UNet2DConditionModel(use_linear_projection=family != "sd1", **widths)


def _text_paths() -> list[str]:
    return [f"text_model.encoder.layers.{n}.{module}" for n in range(TEXT_LAYERS) for module in TEXT_MODULES]
