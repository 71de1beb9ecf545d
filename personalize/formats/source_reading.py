"""What a LoRA file of any program says, read a second time, to verify a conversion against the file itself.

Nothing of `key_parts`, `lora_keys`, `peft_settings` and `weight_changes`, which read the file for the conversion, is
used here.  A module is found by its letters and digits alone: "lora_unet_down_blocks_0_…_to_q", without its points
and underscores, must end in those of one of the model's modules.  ΔW is multiplied out as a whole, and PEFT's settings
are matched by PEFT's own function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from personalize.formats.reader_keys import Factors, ReaderKeys
from personalize.io.tensor_files import TensorFile

ROLE = re.compile(
    r"[._](?:lora[._](?:linear_layer\.)?)?(down|up|mid|A|B|alpha|hada_\w+|lokr_\w+|diff)"
    r"(?:\.(?!weight)\w+)?(?:\.weight)?$"
)
ROLES = {"down": "A", "up": "B"}
SECOND_ENCODER = ("lora_te2", "text_encoder_2", "text_encoders.clip_g", "clip_g")
FIRST_ENCODER = ("lora_te", "text_encoder", "text_encoders.clip_l", "text_encoders.clip_h", "clip_l", "clip_h")
WRAPPERS = re.compile(r"(_orig_mod|\bmodule|base_layer|processor)[._]")


def updates(content: TensorFile, family: str) -> tuple[dict[str, Tensor], list[str]]:
    """ΔW (out, in·k·k) of every module in a file, in double precision, and the keys that are of no module."""
    index = _index(ReaderKeys(family))
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in content.tensors.items():
        role = ROLE.search(key)
        module = _module(key[: role.start()], index) if role else None
        if role is None or module is None:
            unknown.append(key)
        else:
            modules.setdefault(module, {})[ROLES.get(role[1], role[1])] = tensor.double()
    found = {}
    for module, parts in modules.items():
        product = _product(parts)
        if product is not None:
            found[module] = product[0].flatten(1) * _strength(module, parts, product[1], content.metadata)
    return found, unknown


def _index(keys: ReaderKeys) -> dict[str, str]:
    """By letters and digits alone: every module in each spelling that a reader knows, and in older ones."""
    spelled = {**keys.kohya_modules, **keys.peft_modules}
    index = {_squashed(_part(key) + re.sub(r"^(lora_unet|lora_te\d?|unet|text_encoder(_2)?)[._]", "", key)): module
             for key, module in spelled.items()}  # fmt: skip
    for short, module in list(index.items()):
        for new, old in (("qproj", "toq"), ("kproj", "tok"), ("vproj", "tov"), ("outproj", "toout")):
            if module.startswith("text") and short.endswith(new):
                index[short.removesuffix(new) + old] = module
        if short.endswith("toout0"):
            index[short.removesuffix("0")] = module
        index.setdefault(short.replace("textmodel", ""), module)
    return index


def _part(stem: str) -> str:
    """A letter for the part of the model: second text encoder, first text encoder or UNet."""
    return "2" if stem.startswith(SECOND_ENCODER) else "1" if stem.startswith(FIRST_ENCODER) else "u"


def _squashed(text: str) -> str:
    return re.sub(r"[._]", "", text)


def _module(stem: str, index: Mapping[str, str]) -> str | None:
    """The module whose name the stem ends in; None if there is none."""
    part, text = _part(stem), _squashed(WRAPPERS.sub("", stem))
    if part == "u" and re.match(r"(base_model\.model\.)*(text_model|encoder\.layers|text_projection)", stem):
        part = "1"
    for start in range(len(text)):
        if module := index.get(part + text[start:]):
            return module
    return None


def _product(parts: Mapping[str, Tensor]) -> tuple[Tensor, int] | None:
    """ΔW without its strength, and the rank that alpha is divided by (0 for none); None for anything but a product."""
    if "hada_w1_a" in parts and "hada_t1" not in parts:
        first, second = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"].flatten(1) for n in "12")
        return first * second, len(parts["hada_w1_b"])
    if any(role.startswith("lokr") for role in parts) and "lokr_t2" not in parts:
        return _kronecker(parts)
    if "diff" in parts:
        return parts["diff"], 0
    if "A" not in parts or "B" not in parts:
        return None
    if "mid" in parts:
        up, down = parts["B"].flatten(1), parts["A"].flatten(1)
        return torch.einsum("or,rskl,si->oikl", up, parts["mid"], down), len(down)
    return parts["B"].flatten(1) @ parts["A"].flatten(1), len(parts["A"])


def _kronecker(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """W₁ ⊗ W₂, either of which may be a product."""
    rank, factors = 0, []
    for n in "12":
        if f"lokr_w{n}" in parts:
            factors.append(parts[f"lokr_w{n}"])
        else:
            rank = len(parts[f"lokr_w{n}_b"])
            factors.append(parts[f"lokr_w{n}_a"] @ parts[f"lokr_w{n}_b"].flatten(1))
    return torch.kron(factors[0], factors[1].flatten(1)), rank


def _strength(module: str, parts: Mapping[str, Tensor], rank: int, metadata: Mapping[str, str]) -> float:
    """alpha / r by the first that says it: a tensor, PEFT's settings, the header; 1 where nothing does."""
    component, path = module.split(".", 1)
    if not rank:
        return 1.0
    if float(parts.get("alpha", torch.zeros(1)).max()):
        return float(parts["alpha"].max()) / rank
    own = json.loads(metadata.get("adapter_config.json", "{}"))
    shared = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    own = own or {key[len(component) + 1 :]: v for key, v in shared.items() if key.startswith(f"{component}.")}
    header = next((metadata[key] for key in ("lora_alpha", "network_alpha", "alpha") if key in metadata), rank)
    own = own or {"lora_alpha": float(header), "use_rslora": metadata.get("use_rslora", "").lower() == "true"}
    patterns = own.get("alpha_pattern") or {}
    keys = {get_pattern_key(list(patterns), one) for one in (path, path.removeprefix("text_model."))}
    alpha = next((patterns[key] for key in patterns if key in keys), own.get("lora_alpha")) or rank
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def deviations(content: TensorFile, found: Factors, family: str) -> dict[str, float]:
    """max |ΔW_found − ΔW| / max |ΔW| of each module of a file; ∞ for a module that is missing or has another shape."""
    result = {}
    for module, update in updates(content, family)[0].items():
        a, b, scaling = found.get(module, (torch.zeros(0, 0), torch.zeros(0, 0), 1.0))
        if (len(b), a[:1].numel()) != tuple(update.shape):
            result[module] = float("inf")
            continue
        other = (b.double().flatten(1) @ a.double().flatten(1)) * scaling
        result[module] = float((other - update).abs().max()) / (float(update.abs().max()) or 1.0)
    return result
