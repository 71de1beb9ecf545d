"""LoRA and embedding files as other programs write them, made by their documented rules.

Nothing of `personalize.formats` or `personalize.lora_names` is used: these are what the tests read with them.
"""

from __future__ import annotations

from functools import cache

import torch

from personalize.files import tensor_bytes, write_file
from personalize.reader_names import empty_unet, original_paths

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
    component, path = module.split(".", 1)
    if component == "unet":
        path = original_names()[path] if family == "sdxl" and blocks == "original" else path
        return "lora_unet_" + path.replace(".", "_")
    prefix = {"text_encoder": "lora_te1" if family == "sdxl" else "lora_te", "text_encoder_2": "lora_te2"}[component]
    path = path if nested else path.removeprefix("text_model.")
    return f"{prefix}_{path.replace('.', '_')}"


def kohya(state, family, alphas=None, **options):
    """kohya's file; `alphas` by module, or one for all, or None for no alpha keys."""
    found = {}
    for module, (a, b) in modules(state).items():
        stem = kohya_stem(module, family, **options)
        found[f"{stem}.lora_down.weight"], found[f"{stem}.lora_up.weight"] = a, b
        alpha = alphas.get(module) if isinstance(alphas, dict) else alphas
        if alpha is not None:
            found[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return found


def diffusers(state, *, attention_only=False, nested=True):
    """Today's diffusers names; `attention_only` leaves all other modules in PEFT's: the mixed style."""
    found = {}
    for module, (a, b) in modules(state).items():
        name = module if nested else module.replace(".text_model.", ".")
        attends = ".attn" in module or ".self_attn." in module
        middle = ".lora" if module.startswith("unet.") else ".lora_linear_layer"
        down, up = (f"{middle}.down", f"{middle}.up") if attends or not attention_only else (".lora_A", ".lora_B")
        found[f"{name}{down}.weight"], found[f"{name}{up}.weight"] = a, b
    return found


def old_diffusers(state):
    """The names of diffusers' former attention processors, for attention modules."""
    found = {}
    for module, (a, b) in modules(state).items():
        head, _, last = module.removesuffix(".0").rpartition(".")
        name = f"{head}.processor.{last}_lora" if head.startswith("unet.") else f"{head}.{OLD_TEXT[last]}_lora"
        found[f"{name}.down.weight"], found[f"{name}.up.weight"] = a, b
    return found


def uneven(state, seed=0):
    """The same LoRA with ranks cut to 1 … r and an alpha per module, as kohya's resize leaves them; and the truth."""
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
    """A LoRA on the modules of `family`'s UNet at a tiny width, with the family's text width where it tells."""
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
