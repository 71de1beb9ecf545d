"""What a LoRA file of any program says, read a second time, to verify a conversion against the file itself.

Nothing of `key_parts`, `lora_keys`, `peft_settings` and `weight_changes`, which read the file for the conversion, is
used here.  A module is found by its letters and digits alone: "lora_unet_down_blocks_0_…_to_q", without its points
and underscores, must end in those of one of the model's modules.  The changes are compared by what they make of
random inputs, and PEFT's settings are matched by PEFT's own function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats.layer_sizes import most_numbers
from personalize.formats.reader_keys import Factors, ReaderKeys, original_paths
from personalize.io.json_files import parse_object
from personalize.io.tensor_files import TensorFile
from personalize.models.empty import empty_unet

ROLE = re.compile(
    r"[._](?:lora[._](?:linear_layer\.)?)?(down|up|mid|A|B|alpha|hada_\w+|lokr_\w+|diff)"
    r"(?:\.(?!weight)\w+)?(?:\.weight)?$"
)
PROBES = 4
ROLES = {"down": "A", "up": "B"}
SECOND_ENCODER = ("lora_te2", "text_encoder_2", "text_encoders.clip_g", "clip_g")
FIRST_ENCODER = ("lora_te", "text_encoder", "text_encoders.clip_l", "text_encoders.clip_h", "clip_l", "clip_h")
WRAPPERS = re.compile(r"(_orig_mod|\bmodule|base_layer|processor)[._]")


def deviations(content: TensorFile, found: Factors, family: str) -> dict[str, float]:
    """How far `found` is from what the file says: max |ΔW_found X − ΔW X| / max |ΔW X| of each module of the file.

    X (in·k·k, PROBES) are random numbers: two matrices that give the same products are equal, save for chance, and the
    products of thin factors are never multiplied out.  It is ∞ for a module that is missing or has another shape.

    Raises:
        UserError: factors that do not fit one another, or whose product is larger than any layer's weight.
    """
    result = {}
    for module, parts in _modules(content, family).items():
        if (reading := _factors(module, parts)) is None:
            continue
        matrices, rank = reading
        a, b, scaling = found.get(module, (torch.zeros(1, 0), torch.zeros(0, 1), 1.0))
        probes = torch.randn(matrices[-1].shape[1], PROBES, generator=torch.Generator().manual_seed(0)).double()
        wanted = probes
        for matrix in reversed(matrices):
            wanted = matrix.double() @ wanted
        wanted = wanted * _strength(module, parts, rank, content.metadata)
        if (len(b), a[0].numel()) != (len(wanted), len(probes)):
            result[module] = float("inf")
            continue
        other = scaling * (b.double().flatten(1) @ (a.double().flatten(1) @ probes))
        result[module] = float((other - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
    return result


def _modules(content: TensorFile, family: str) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by module and role; keys of no module are left out."""
    index = _index(ReaderKeys(family), family)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in content.tensors.items():
        role = ROLE.search(key)
        module = _module(key[: role.start()], index) if role else None
        if role is not None and module is not None:
            modules.setdefault(module, {})[ROLES.get(role[1], role[1])] = tensor
    return modules


def _index(keys: ReaderKeys, family: str) -> dict[str, str]:
    """By letters and digits alone: every module in each spelling that a reader knows, and in older ones.

    Of every family's UNet the original code's names are known too: ComfyUI uses no others.
    """
    original = {f"unet.{name}": f"unet.{path}" for name, path in original_paths(empty_unet(family)).items()}
    spelled = {**original, **keys.kohya_modules, **keys.peft_modules}
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


def _factors(module: str, parts: Mapping[str, Tensor]) -> tuple[list[Tensor], int] | None:
    """Matrices whose product is ΔW (out, in·k·k) without its strength, and the rank that alpha is divided by.

    The rank is 0 where alpha does not count; None for anything but a product.
    """
    parts = {role: tensor.double() for role, tensor in parts.items()}
    if "hada_w1_a" in parts:
        rank = len(parts["hada_w1_b"])
        return [_whole(module, parts, "hada_w1", "hada_t1") * _whole(module, parts, "hada_w2", "hada_t2")], rank
    if any(role.startswith("lokr") for role in parts):
        first, second = _whole(module, parts, "lokr_w1", ""), _whole(module, parts, "lokr_w2", "lokr_t2")
        _require_small(module, first.numel() * second.numel())
        ranks = [len(parts[f"lokr_w{n}_b"]) for n in "12" if f"lokr_w{n}_b" in parts]
        return [torch.kron(first, second)], ranks[-1] if ranks else 0
    if "diff" in parts:
        return [parts["diff"].flatten(1)], 0
    if "A" not in parts or "B" not in parts:
        return None
    down = parts["A"]
    if "mid" in parts:
        _require_small(module, parts["mid"][:, 0].numel() * down.shape[1])
        down = torch.einsum("rskl,si->rikl", parts["mid"], down.flatten(1))
    return [parts["B"].flatten(1), down.flatten(1)], len(parts["A"])


def _whole(module: str, parts: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """One factor of a LoHa or LoKr as a matrix (out, in·k·k): stored whole, as a product, or as one with a core."""
    if name in parts:
        return parts[name].flatten(1)
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        _require_small(module, a.shape[1] * b.shape[1] * parts[core][0, 0].numel())
        return torch.einsum("ijkl,io,jc->ockl", parts[core], a, b).flatten(1)
    _require_small(module, len(a) * b[0].numel())
    return a @ b.flatten(1)


def _require_small(module: str, numbers: int) -> None:
    """UserError if a product would have more numbers than the layer's weight."""
    if numbers > most_numbers(module):
        raise UserError(f"module {module} multiplies out to {numbers:,} numbers, more than its layer has")


def _strength(module: str, parts: Mapping[str, Tensor], rank: int, metadata: Mapping[str, str]) -> float:
    """alpha / r by the first that says it: a tensor, PEFT's settings, the header; 1 where nothing does."""
    component, path = module.split(".", 1)
    if "alpha" in parts and float(parts["alpha"].double().max()):
        return float(parts["alpha"].double().max()) / rank if rank else 1.0
    own = parse_object(metadata.get("adapter_config.json", "{}"), "adapter_config.json")
    shared = parse_object(metadata.get("lora_adapter_metadata", "{}"), "lora_adapter_metadata")
    own = own or {key[len(component) + 1 :]: v for key, v in shared.items() if key.startswith(f"{component}.")}
    own = own or (shared if "r" in shared or "lora_alpha" in shared else {})  # of one model, without its name
    if own.get("peft_type") in ("LOHA", "LOKR"):
        alpha = _pattern_value(own.get("alpha_pattern") or {}, path) or own.get("alpha")
        divisor = _pattern_value(own.get("rank_pattern") or {}, path) or own.get("r")
        return alpha / divisor if alpha and divisor else 1.0
    if not rank:
        return 1.0
    stated = [metadata[key] for key in ("lora_alpha", "network_alpha", "alpha") if key in metadata]
    header = next((text for text in stated if text != "None"), rank)
    own = own or {"lora_alpha": float(header), "use_rslora": metadata.get("use_rslora", "").lower() == "true"}
    alpha = _pattern_value(own.get("alpha_pattern") or {}, path) or own.get("lora_alpha") or rank
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def _pattern_value(patterns: Mapping[str, float], path: str) -> float | None:
    """The value that PEFT's `alpha_pattern` or `rank_pattern` gives to a module, by peft's own matching."""
    if not patterns:  # peft takes seconds to import
        return None
    from peft.utils.other import get_pattern_key

    keys = {get_pattern_key(list(patterns), one) for one in (path, path.removeprefix("text_model."))}
    return next((patterns[key] for key in patterns if key in keys), None)
