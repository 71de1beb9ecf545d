"""LoRA files as other programs write them, made by the documented rules of their formats.

`personalize.formats` is not used, because it is what is tested with these files.
"""

from __future__ import annotations

from functools import cache

import torch

from personalize.formats.reader_keys import original_paths
from personalize.io.atomic import write_file
from personalize.io.tensor_files import tensor_bytes
from personalize.models.empty import empty_unet

OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def modules(state):
    """(A, B) by module of a LoRA in PEFT's names."""
    names = {key.rsplit(".lora_", 1)[0] for key in state}
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in sorted(names)}


def delta(a, b, strength=1.0):
    """ΔW (out, in·k·k) in double precision."""
    return strength * (b.double().flatten(1) @ a.double().flatten(1))


@cache
def original_names():
    """diffusers' path → the original code's path, for SDXL."""
    return {path: original for original, path in original_paths(empty_unet("sdxl")).items()}


def kohya_stem(module, family, *, blocks="original", nested=True):
    """The stem of a module's keys in kohya's file.

    blocks: "original" for SDXL's UNet blocks by their original names, otherwise diffusers' names.
    nested: whether text encoder paths contain `text_model.`.
    """
    component, path = module.split(".", 1)
    if component == "unet":
        path = original_names()[path] if family == "sdxl" and blocks == "original" else path
        return "lora_unet_" + path.replace(".", "_")
    prefix = {"text_encoder": "lora_te1" if family == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"}[component]
    path = path if nested else path.removeprefix("text_model.")
    return f"{prefix}_{path.replace('.', '_')}"


def kohya(state, family, alphas=None, **options):
    """The tensors of kohya's file.

    alphas: by module, one for all modules, or None to write none.  options: of `kohya_stem`.
    """
    tensors = {}
    for module, (a, b) in modules(state).items():
        stem = kohya_stem(module, family, **options)
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = a, b
        alpha = alphas.get(module) if isinstance(alphas, dict) else alphas
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def diffusers(state, *, attention_only=False, nested=True):
    """The tensors of diffusers' present format.

    attention_only: modules other than attention have PEFT's names.
    """
    tensors = {}
    for module, (a, b) in modules(state).items():
        name = module if nested else module.replace(".text_model.", ".")
        attends = ".attn" in module or ".self_attn." in module
        middle = ".lora" if module.startswith("unet.") else ".lora_linear_layer"
        down, up = (f"{middle}.down", f"{middle}.up") if attends or not attention_only else (".lora_A", ".lora_B")
        tensors[f"{name}{down}.weight"], tensors[f"{name}{up}.weight"] = a, b
    return tensors


def old_diffusers(state):
    """The tensors of diffusers' former format, of attention processors, for a LoRA on attention modules alone."""
    tensors = {}
    for module, (a, b) in modules(state).items():
        head, _, last = module.removesuffix(".0").rpartition(".")
        name = f"{head}.processor.{last}_lora" if head.startswith("unet.") else f"{head}.{OLD_TEXT[last]}_lora"
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = a, b
    return tensors


def with_uneven_ranks(state, seed=0):
    """A LoRA with ranks cut to 1 … r and an alpha for each module, as kohya's resize script makes them.

    Returns its state, its alphas by module, and the true ΔW by module.
    """
    cut, alphas, truth = {}, {}, {}
    for number, (module, (a, b)) in enumerate(modules(state).items()):
        rank = 1 + (number + seed) % len(a)
        alphas[module] = (0.5, 1.0, 8.0)[number % 3]
        cut[f"{module}.lora_A.weight"] = a[:rank].clone()
        cut[f"{module}.lora_B.weight"] = b[:, :rank].clone()
        truth[module] = delta(a[:rank], b[:, :rank], alphas[module] / rank)
    return cut, alphas, truth


def save(path, tensors, metadata=None):
    return write_file(path, tensor_bytes({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata))


def small_state(family="sd1", rank=4, width=8, text=False, want=lambda path: ".attn" in path):
    """A random LoRA of a tiny width on the wanted modules of `family`'s UNet.

    Keys and values of cross-attention have the family's true text width, by which readers recognise the family.
    text: also some modules of the text encoders.
    """
    text_width = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]
    state = {}
    for number, (path, layer) in enumerate(empty_unet(family).named_modules()):
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) or not want(path):
            continue
        kernel = layer.weight.shape[2:]
        side = text_width if path.endswith(("attn2.to_k", "attn2.to_v")) else width
        state |= _pair(f"unet.{path}", (rank, side, *kernel), (width, rank, *(1 for _ in kernel)), number)
    for component in ("text_encoder", "text_encoder_2")[: (2 if family == "sdxl" else 1) if text else 0]:
        for part in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"):
            name = f"{component}.text_model.encoder.layers.3.{part}"
            state |= _pair(name, (rank, width), (width, rank), len(state))
    return state


def _pair(name, down, up, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_A.weight": torch.randn(down, generator=draw),
        f"{name}.lora_B.weight": torch.randn(up, generator=draw),
    }
