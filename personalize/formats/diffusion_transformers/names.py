"""Every spelling of a layer's name: by it, the layers of diffusers that a key of a file stands for.

    diffusers    transformer.transformer_blocks.0.attn.to_q        ComfyUI  diffusion_model.double_blocks.0.img_attn.qkv
    OneTrainer   lora_transformer_transformer_blocks_0_attn_to_q   kohya    lora_unet_double_blocks_0_img_attn_qkv
    LyCORIS      lycoris_transformer_blocks_0_attn_to_q            XLabs    double_blocks.0.processor.qkv_lora1

Nothing is parsed: all names that a family's layers can have are made from its table and its skeleton, and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

from personalize.formats.diffusion_transformers.families import FAMILIES, Rows
from personalize.formats.diffusion_transformers.skeletons import layer_names
from personalize.formats.key_parts import BASE_PREFIXES, split_ending, without_wrappers
from personalize.formats.peft_settings import BASE_PREFIX

ROW = re.compile(r"(\S*?)([=~])(\S+)")
XLABS = re.compile(r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)")
XLABS_LAYERS = {
    "double qkv 1": "img_attn.qkv", "double qkv 2": "txt_attn.qkv", "double proj 1": "img_attn.proj",
    "double proj 2": "txt_attn.proj", "single qkv ": "linear1_qkv", "single proj ": "linear2",
}  # fmt: skip
DIFFUSERS_STARTS = {"transformer.": "diffusers", "": "no prefix"}  # before diffusers' path of a layer
OTHER_STARTS = {"diffusion_model.": "ai-toolkit", "unet.": "no prefix"}
ORIGINAL_STARTS = {  # before a layer's path in the original code
    "diffusion_model.": "ComfyUI", "model.diffusion_model.": "ComfyUI", "": "original names", "net.": "original names",
    "transformer.": "original names",
}  # fmt: skip
FLAT_STARTS = {"lora_transformer_": "OneTrainer", "lycoris_": "LyCORIS", "lora_unet_": "kohya, diffusers' paths"}


@dataclass(frozen=True)
class Layer:
    """A layer of the original code, by its path there, and the layers of diffusers that it is made of.

    layers: their names, in the order of its outputs.  swapped: if it has two outputs for each input, the halves of
    the outputs have changed places.
    """

    path: str
    layers: tuple[str, ...]
    swapped: bool = False

    @staticmethod
    def of(name: str) -> Layer:
        """A layer that is the same in the original code and in diffusers, whose `name` begins with the model's part."""
        return Layer(name.partition(".")[2], (name,))


@cache
def original_layers(family: str) -> tuple[Layer, ...]:
    """Every layer of the family's original code."""
    made = tuple(_from_rows(family, FAMILIES[family].rows))
    covered = {name for layer in made for name in layer.layers}
    return made + tuple(map(Layer.of, sorted(layer_names(family) - covered)))


def _from_rows(family: str, rows: Rows) -> Iterator[Layer]:
    """The layers that the rows name, for every number of a block that the family's models have."""
    known = layer_names(family)
    for theirs, ours, text in rows:
        for original, sign, names in ROW.findall(text):
            patterns = [f"transformer.{_joined(ours, name)}" for name in names.split("+")]
            for number in _numbers(family, patterns[0]):
                layers = tuple(pattern.replace("{n}", number) for pattern in patterns)
                if all(layer in known for layer in layers):
                    yield Layer(_joined(theirs, original).replace("{n}", number), layers, sign == "~")


def _joined(block: str, name: str) -> str:
    return ".".join(part for part in (block, name) if part)


@cache
def _numbers(family: str, pattern: str) -> tuple[str, ...]:
    """The numbers that `{n}` can stand for in the pattern; one, if it does not occur."""
    if "{n}" not in pattern:
        return ("0",)
    start = pattern.partition("{n}")[0]
    found = {name[len(start) :].partition(".")[0] for name in layer_names(family) if name.startswith(start)}
    return tuple(sorted(found, key=int))


@cache
def spellings(family: str) -> dict[str, tuple[Layer, str]]:
    """By the part of a key that names a layer: the layer, and which naming scheme this is."""
    found: dict[str, tuple[Layer, str]] = {}
    singles = [Layer.of(name) for name in sorted(layer_names(family))]
    ours = [layer for layer in singles if _part(layer.layers[0]) == "transformer"]
    fused = [*original_layers(family), *_from_rows(family, FAMILIES[family].also)]
    theirs = [layer for layer in fused if _part(layer.layers[0]) == "transformer"]
    for layers, starts, name in (
        (ours, DIFFUSERS_STARTS, str), (theirs, ORIGINAL_STARTS, str), (theirs, {"lora_unet_": "kohya"}, _flat),
        (ours, OTHER_STARTS, str), (ours, FLAT_STARTS, _flat),
    ):  # fmt: skip
        for layer in layers:
            for start, scheme in starts.items():
                found.setdefault(start + name(layer.path), (layer, scheme))
                if layers is ours and layer.path.endswith(".to_out.0"):  # some programs leave the number out
                    found.setdefault(start + name(layer.path[:-2]), (layer, scheme))
    for layer in singles:
        part, _, path = layer.layers[0].partition(".")
        for stem, scheme in _encoder_spellings(family, part, path):
            found.setdefault(stem, (layer, scheme))
    return found


def _encoder_spellings(family: str, part: str, path: str) -> Iterator[tuple[str, str]]:
    """The names of a text encoder's layer, and their schemes."""
    for name, flat_starts, comfyui in FAMILIES[family].encoders:
        if name == part:
            yield f"{part}.{path}", "diffusers"
            yield f"{part}.{path.removeprefix('text_model.')}", "diffusers"
            yield f"{comfyui}.{path}", "ComfyUI"
            yield from ((f"{start}_{_flat(path)}", "kohya") for start in flat_starts)


def _part(name: str) -> str:
    return name.partition(".")[0]


def _flat(path: str) -> str:
    return path.replace(".", "_")


def spelled(layer: Layer, family: str, scheme: str) -> str:
    """The layer's name in a naming scheme: "diffusers", "PEFT folder", "ComfyUI", "kohya" or "OneTrainer"."""
    part, path = _part(layer.layers[0]), layer.layers[0].partition(".")[2]
    if part != "transformer":
        return _encoder_name(family, part, path, scheme)
    return {
        "diffusers": f"transformer.{path}", "PEFT folder": f"{BASE_PREFIX}{path}",
        "ComfyUI": f"diffusion_model.{layer.path}", "kohya": f"lora_unet_{_flat(layer.path)}",
        "OneTrainer": f"lora_transformer_{_flat(path)}",
    }[scheme]  # fmt: skip


def _encoder_name(family: str, part: str, path: str, scheme: str) -> str:
    """The name of a text encoder's layer in a naming scheme."""
    starts = {name: (flat[0], comfyui) for name, flat, comfyui in FAMILIES[family].encoders}[part]
    if scheme in ("kohya", "OneTrainer"):
        return f"{starts[0]}_{_flat(path)}"
    return {"ComfyUI": f"{starts[1]}.{path}", "PEFT folder": f"{BASE_PREFIX}{path}"}.get(scheme, f"{part}.{path}")


@lru_cache(maxsize=2**14)
def stem_of(key: str) -> tuple[str, str, str, bool] | None:
    """The part of a key that names a layer, the algorithm, the tensor's role, and whether it is of PEFT's own folder.

    Returns:
        None if the key's ending is unknown.
    """
    if match := XLABS.match(key):
        layer = XLABS_LAYERS.get(f"{match[1]} {match[3]} {match[4]}", "")
        return f"{match[1]}_blocks.{match[2]}.{layer}", "LoRA", "A" if match[5] == "down" else "B", False
    bare, _ = without_wrappers(key)
    split = split_ending(bare)
    return None if split is None else (*split, BASE_PREFIXES.search(key) is not None)
