"""The key under which each program looks for a module's LoRA, derived from a real UNet, to verify written files.

For every module of a UNet (on the meta device if no base model is loaded) the keys are listed that diffusers and the
graphical programs look for.  For SDXL, blocks are counted in the order in which the original code builds them.  Nothing
from `lora_keys` or the writers is used here: a mistake in the names they write must not pass verification because the
same mistake is made in reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import regex
from torch import Tensor, nn

from personalize.io.json_files import parse_json
from personalize.io.tensor_files import TensorFile
from personalize.models.empty import adaptable_layers, empty_unet

MATCH_SECONDS = 1.0  # for one pattern of a file on one path
TEXT_LAYERS = 32  # in the deepest text encoder of the three families
TEXT_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")

Factors = dict[str, tuple[Tensor, Tensor, float]]
"""For each module, by its canonical name "<component>.<path>": A (r, in[, k, k]), B (out, r[, 1, 1]) and alpha / r."""


class ReaderKeys:
    """Every key that diffusers or a graphical program looks for in a LoRA file, and the module it belongs to.

    Args:
        family: "sd1", "sd2" or "sdxl".
        unet: the base model's UNet, whose shapes are then known too; without one an empty UNet of the family is used.
    """

    def __init__(self, family: str, unet: nn.Module | None = None) -> None:
        reference = empty_unet(family) if unet is None else unet
        layers = dict(adaptable_layers(reference))
        self.shapes = None if unet is None else {f"unet.{path}": layer.weight.shape for path, layer in layers.items()}
        paths = original_paths(reference) if family == "sdxl" else {path: path for path in layers}
        self.kohya_modules = {"lora_unet_" + key.replace(".", "_"): f"unet.{path}" for key, path in paths.items()}
        self.peft_modules = {f"unet.{path}": f"unet.{path}" for path in layers}
        encoders = (
            {"lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
            if family == "sdxl"
            else {"lora_te": "text_encoder"}
        )
        for prefix, component in encoders.items():
            projection = ["text_projection"] if component == "text_encoder_2" else []
            for path in [*_text_paths(), *projection]:
                self.peft_modules[f"{component}.{path}"] = f"{component}.{path}"
                self.kohya_modules[f"{prefix}_{path.replace('.', '_')}"] = f"{component}.{path}"

    def kohya(self, content: TensorFile) -> tuple[Factors, list[str]]:
        """The LoRA as a graphical program reads it, and problems: one alpha per module, by default r."""
        suffixes = {".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"}
        grouped, problems = _by_module(content.tensors, suffixes, self.kohya_modules)
        if "lora_adapter_metadata" in content.metadata and any(key.endswith(".alpha") for key in content.tensors):
            problems.append("it has both lora_adapter_metadata and alpha keys: diffusers refuses such a file")
        factors = {}
        for module, parts in grouped.items():
            rank = parts["A"].shape[0]
            alpha = float(parts["alpha"]) if "alpha" in parts and parts["alpha"].numel() == 1 else 0.0
            factors[module] = (parts["A"], parts["B"], alpha / rank if alpha and rank else 1.0)
        return factors, problems

    def peft(self, content: TensorFile) -> tuple[Factors, list[str]]:
        """The LoRA as diffusers reads it, and problems: alpha by PEFT's settings in the metadata, by default r."""
        grouped, problems = _by_module(
            content.tensors, {".lora_A.weight": "A", ".lora_B.weight": "B"}, self.peft_modules
        )
        try:
            settings = parse_json(content.metadata["lora_adapter_metadata"], "lora_adapter_metadata")
            factors = {}
            for module, parts in grouped.items():
                component, path = module.split(".", 1)
                start, rows = f"{component}.", parts["A"].shape[0]
                own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
                rank = _of_pattern(own.get("rank_pattern"), path, own["r"])
                alpha = _of_pattern(own.get("alpha_pattern"), path, own["lora_alpha"])
                if rank != rows:
                    problems.append(f"module {module} has rank {rows}, the metadata says {rank}")
                if not _is_target(own["target_modules"], path):
                    problems.append(f"module {module} is not among the metadata's target_modules: it is not loaded")
                divisor = rows**0.5 if own.get("use_rslora") is True else rank
                factors[module] = (parts["A"], parts["B"], alpha / divisor)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, TimeoutError,
                regex.error) as error:  # fmt: skip
            factors = {module: (parts["A"], parts["B"], 1.0) for module, parts in grouped.items()}
            problems.append(f"lora_adapter_metadata is missing or damaged ({error!r}): strength 1 is assumed")
        return factors, problems


def _of_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits the module's path in PEFT's `rank_pattern` or `alpha_pattern`."""
    found = (value for pattern, value in (patterns or {}).items() if _fits(rf"(?:.*\.)?(?:{pattern})", path))
    return next(found, otherwise)


def _is_target(targets: Any, path: str) -> bool:
    """Whether PEFT's `target_modules` name the module: one pattern for whole paths, or the ends of paths."""
    if isinstance(targets, str):
        return _fits(targets, path)
    return any(f".{path}".endswith(f".{name}") for name in targets)


def _fits(pattern: str, path: str) -> bool:
    """Whether a pattern fits the whole path, also without the level that transformers has dropped."""
    paths = {path, path.removeprefix("text_model.")}
    return any(regex.fullmatch(pattern, one, timeout=MATCH_SECONDS) for one in paths)


def _by_module(
    tensors: Mapping[str, Tensor], suffixes: Mapping[str, str], modules: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors by module and role, and as problems: keys that no program looks for, and modules without A or B."""
    grouped: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        module = modules.get(key.removesuffix(suffix)) if suffix else None
        if suffix is None or module is None:
            problems.append(f"no reader knows the key {key[:120]!r}")
        else:
            grouped.setdefault(module, {})[suffixes[suffix]] = tensor
    complete = {}
    for module, parts in grouped.items():
        if "A" in parts and "B" in parts and parts["A"].ndim > 1 and parts["B"].ndim > 1:
            complete[module] = parts
        else:
            problems.append(f"module {module} has only {sorted(parts)}")
    return complete, problems


def original_paths(unet: nn.Module) -> dict[str, str]:
    """For every layer's path in the original SDXL code, its path in diffusers' `unet`.

    The original code appends blocks to three lists (`input_blocks`, `middle_block`, `output_blocks`) while it builds
    the UNet; the same order is followed here, and the blocks are counted.
    """
    unet_: Any = unet
    prefixes: list[tuple[str, str]] = [("input_blocks.0.0", "conv_in"), ("out.2", "conv_out")]
    prefixes += [(f"time_embed.{2 * i}", f"time_embedding.linear_{i + 1}") for i in (0, 1)]
    prefixes += [(f"label_emb.0.{2 * i}", f"add_embedding.linear_{i + 1}") for i in (0, 1)]
    blocks = [["conv_in"]]
    for b, block in enumerate(unet_.down_blocks):
        blocks += _original_blocks(block, f"down_blocks.{b}")
        blocks += [[f"down_blocks.{b}.downsamplers.0"]] if block.downsamplers else []
    prefixes += [(f"input_blocks.{n}.{k}", path) for n, paths in enumerate(blocks) for k, path in enumerate(paths) if n]
    middle = ("resnets.0", "attentions.0", "resnets.1")
    prefixes += [(f"middle_block.{k}", f"mid_block.{path}") for k, path in enumerate(middle)]
    blocks = []
    for b, block in enumerate(unet_.up_blocks):
        blocks += _original_blocks(block, f"up_blocks.{b}")
        blocks[-1] += [f"up_blocks.{b}.upsamplers.0"] if block.upsamplers else []
    prefixes += [(f"output_blocks.{n}.{k}", path) for n, paths in enumerate(blocks) for k, path in enumerate(paths)]
    names = {}
    for path, _ in adaptable_layers(unet):
        original, prefix = next((o, p) for o, p in prefixes if path == p or path.startswith(f"{p}."))
        names[(original + _original_layer(path.removeprefix(prefix), prefix)).removesuffix(".")] = path
    return names


def _original_blocks(block: Any, path: str) -> list[list[str]]:
    """The blocks of the original code that one of diffusers' blocks is made of: each a resnet and its attention."""
    attends = bool(getattr(block, "attentions", None))
    return [
        [f"{path}.resnets.{i}", *([f"{path}.attentions.{i}"] if attends else [])] for i in range(len(block.resnets))
    ]


def _original_layer(name: str, prefix: str) -> str:
    """A layer's name inside its block in the original code; it differs from diffusers' in resnets and downsamplers."""
    if "resnets" in prefix:
        names = {".conv1": ".in_layers.2", ".conv2": ".out_layers.3", ".time_emb_proj": ".emb_layers.1"}
        return (names | {".conv_shortcut": ".skip_connection"})[name]
    return ".op" if "downsamplers" in prefix else name


def _text_paths() -> list[str]:
    """Paths of the layers of a text encoder that can have a LoRA."""
    return [f"text_model.encoder.layers.{n}.{module}" for n in range(TEXT_LAYERS) for module in TEXT_MODULES]
