"""One small adapter file of every kind that people have, for the tiny models, with what it should change.

Every kind is made by the documented rules of its format; the readers under test are not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.foreign_files import delta, kohya, modules, original_names
from tests.support.lora_states import paths, random_lora
from tests.support.tiny import tiny

BLOCK = "mid_block.attentions.0."
SD1, SDXL = {"ss_base_model_version": "sd_v1"}, {"ss_base_model_version": "sdxl_base_v1-0"}


@dataclass(frozen=True)
class Kind:
    """An adapter file: its tensors, its header, and what it should do.

    base: the tiny model it is for.  updates: ΔW (out, in·k·k) by module.  biases: changes of biases by module.
    tokens: the learned tokens.  needs_base: True if ΔW depends on the base's own weights, then `updates` is empty.
    beside: files beside it, by name.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    base: str = "sd1"
    updates: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    needs_base: bool = False
    beside: dict[str, str] = field(default_factory=dict)
    name: str = "file.safetensors"

    def write(self, folder: Path) -> Path:
        """Write the file, and what stands beside it, into a new `folder`."""
        folder.mkdir(parents=True)
        for name, text in self.beside.items():
            (folder / name).write_text(text)
        save_file({key: tensor.contiguous() for key, tensor in self.tensors.items()}, folder / self.name, self.metadata)
        return folder / self.name


def attention(path: str) -> bool:
    return path.startswith(BLOCK) and path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))


def unet_lora(base: str = "sd1", want: Callable[[str], bool] = attention) -> dict[str, Tensor]:
    return random_lora(paths(tiny(base).unet, want), seed=3, spread=0.3)


def text_lora(base: str = "sd1") -> dict[str, Tensor]:
    return random_lora(
        paths(tiny(base).text_encoders[0], lambda path: ".layers.0." in path), "text_encoder", spread=0.3
    )


def truth(state: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    return {module: delta(a, b, strength) for module, (a, b) in modules(state).items()}


def flat(module: str) -> str:
    return "lora_unet_" + module.removeprefix("unet.").replace(".", "_")


def randoms(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) * 0.3


def shapes(base: str = "sd1", want: Callable[[str], bool] = attention) -> dict[str, tuple[int, ...]]:
    return {f"unet.{path}": tuple(shape) for path, shape in paths(tiny(base).unet, want).items()}


def of_kohya(state: dict[str, Tensor], **more: Any) -> Kind:
    return Kind(kohya(state, more.get("base", "sd1")[:4], alphas=2.0), SD1, updates=truth(state, 0.5), **more)


def peft() -> Kind:
    state = unet_lora()
    settings = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    return Kind(dict(state), {"lora_adapter_metadata": json.dumps(settings)}, updates=truth(state, 2.0))


def peft_folder() -> Kind:
    state = unet_lora()
    tensors = {key.replace("unet.", "base_model.model."): tensor for key, tensor in state.items()}
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {r".*attn2\.to_k": 32}}
    updates = {m: d * (32 if m.endswith("attn2.to_k") else 8) / 2 for m, d in truth(state).items()}  # alpha / √4
    return Kind(tensors, updates=updates, beside={"adapter_config.json": json.dumps(config)},
                name="adapter_model.safetensors")  # fmt: skip


def header_alpha() -> Kind:
    state = unet_lora()
    return Kind(dict(state), {"lora_alpha": "16"}, updates=truth(state, 4.0))


def wrapped() -> Kind:
    state = unet_lora()
    renamed = {key: key.replace("unet.", "unet._orig_mod.").replace(".weight", ".default_0.weight") for key in state}
    return Kind({renamed[key]: tensor for key, tensor in state.items()}, updates=truth(state))


def onetrainer() -> Kind:
    state, names, tensors = unet_lora("sdxl"), original_names(), {}
    for module, (a, b) in modules(state).items():
        stem = f"unet.{names[module[5:]]}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
    return Kind(tensors, SDXL, "sdxl", truth(state, 0.5))


def comfyui() -> Kind:
    state = text_lora("sd2v")
    tensors = {}
    for module, (a, b) in modules(state).items():
        stem = f"text_encoders.clip_h.transformer.{module.partition('.')[2]}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    return Kind(tensors, base="sd2v", updates=truth(state))


def text_projection() -> Kind:
    state, draw = unet_lora("sdxl"), randoms()
    state |= {"text_encoder_2.text_projection.lora_A.weight": draw(4, 40),
              "text_encoder_2.text_projection.lora_B.weight": draw(40, 4)}  # fmt: skip
    state |= random_lora(paths(tiny("sdxl").text_encoders[1], lambda path: ".layers.0.mlp" in path), "text_encoder_2")
    return Kind(kohya(state, "sdxl", alphas=2.0), SDXL, "sdxl", truth(state, 0.5))


def one_by_one() -> Kind:
    state = unet_lora()
    tensors = {key: t[:, :, None, None] if t.ndim == 2 else t for key, t in kohya(state, "sd1", alphas=2.0).items()}
    return Kind(tensors, SD1, updates=truth(state, 0.5))


def tucker() -> Kind:
    draw, tensors, updates = randoms(), {}, {}
    for module, (out, into, *kernel) in shapes(want=lambda path: path.startswith("mid_block.resnets.0.conv")).items():
        down, mid, up, name = draw(4, into, 1, 1), draw(4, 4, *kernel), draw(out, 4, 1, 1), flat(module)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up,
                    f"{name}.alpha": torch.tensor(2.0)}  # fmt: skip
        full = torch.einsum("or,rskl,si->oikl", up.double()[..., 0, 0], mid.double(), down.double()[..., 0, 0])
        updates[module] = 0.5 * full.flatten(1)
    return Kind(tensors, SD1, updates=updates)


def loha() -> Kind:
    draw, tensors, updates = randoms(), {}, {}
    for module, (out, into) in shapes().items():
        a1, b1, a2, b2, name = draw(out, 2), draw(2, into), draw(out, 2), draw(2, into), flat(module)
        tensors |= {f"{name}.hada_w1_a": a1, f"{name}.hada_w1_b": b1, f"{name}.hada_w2_a": a2, f"{name}.hada_w2_b": b2,
                    f"{name}.alpha": torch.tensor(16.0)}  # fmt: skip
        updates[module] = 8 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    return Kind(tensors, SD1, updates=updates)


def lokr() -> Kind:
    draw, tensors, updates = randoms(), {}, {}
    for module, (out, into) in shapes().items():
        w1, a, b, name = draw(4, 4), draw(out // 4, 2), draw(2, into // 4), flat(module)
        tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        updates[module] = 0.5 * torch.kron(w1.double(), a.double() @ b.double())
    return Kind(tensors, SD1, updates=updates)


def full_difference() -> Kind:
    draw = randoms()
    changes = {module: draw(*shape) for module, shape in shapes().items()}
    tensors = {f"{flat(module)}.diff": change for module, change in changes.items()}
    return Kind(tensors, SD1, updates={module: change.double() for module, change in changes.items()})


def with_biases() -> Kind:
    state, draw = unet_lora(), randoms()
    biases = {module: draw(len(b)) for module, (_, b) in modules(state).items() if module.endswith("to_out.0")}
    tensors = kohya(state, "sd1", alphas=2.0) | {f"{flat(module)}.diff_b": bias for module, bias in biases.items()}
    return Kind(tensors, SD1, updates=truth(state, 0.5), biases=biases)


def dora() -> Kind:
    state = unet_lora()
    tensors = kohya(state, "sd1", alphas=2.0)
    tensors |= {f"{flat(module)}.dora_scale": torch.full((len(b), 1), 0.7) for module, (_, b) in modules(state).items()}
    return Kind(tensors, SD1, needs_base=True)


def ia3() -> Kind:
    tensors = {}
    for module, (out, _) in shapes(want=lambda path: attention(path) and path.endswith(("to_k", "to_v"))).items():
        tensors |= {f"{flat(module)}.weight": torch.full((out,), 0.3), f"{flat(module)}.on_input": torch.tensor(False)}
    return Kind(tensors, SD1, needs_base=True)


def a1111_token() -> Kind:
    return Kind({"emb_params": randoms()(2, 32)}, tokens=("<file>",))


def two_tokens() -> Kind:
    return Kind({"<a>": randoms()(768), "<b>": randoms(1)(768)}, tokens=("<a>", "<b>"))


def bundle() -> Kind:
    state, draw = unet_lora("sdxl"), randoms()
    tensors = kohya(state, "sdxl", alphas=2.0)
    tensors |= {"bundle_emb.mycat.clip_l": draw(2, 32), "bundle_emb.mycat.clip_g": draw(2, 40)}
    return Kind(tensors, SDXL, "sdxl", truth(state, 0.5), tokens=("<mycat>",))


def custom_diffusion() -> Kind:
    stem = "mid_block.attentions.0.transformer_blocks.0.attn2.processor."
    return Kind({f"{stem}to_{x}_custom_diffusion.weight": randoms()(64, 32) for x in "kv"})


def half(kind: Kind, dtype: torch.dtype) -> Kind:
    """The kind with its factors stored in `dtype`, and what those rounded factors change."""
    state = {key: tensor.to(dtype).float() for key, tensor in unet_lora().items()}
    tensors = kohya(state, "sd1", alphas=2.0)
    tensors = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in tensors.items()}
    return Kind(tensors, SD1, updates=truth(state, 0.5))


KINDS: dict[str, Callable[[], Kind]] = {
    "LoRA, PEFT's names": peft,
    "LoRA, kohya's names": lambda: of_kohya(unet_lora()),
    "LoRA, OneTrainer's names": onetrainer,
    "LoRA, ComfyUI's names": comfyui,
    "PEFT folder": peft_folder,
    "alpha in the header": header_alpha,
    "names with wrappers": wrapped,
    "factors as 1×1 convolutions": one_by_one,
    "float8": lambda: half(Kind({}), torch.float8_e4m3fn),
    "text encoder alone": lambda: of_kohya(text_lora()),
    "text projection": text_projection,
    "self-attention alone": lambda: of_kohya(unet_lora(want=lambda path: attention(path) and ".attn1." in path)),
    "convolutions alone": lambda: of_kohya(unet_lora(want=lambda path: path.startswith("mid_block.resnets.0.conv"))),
    "LoCon with a core": tucker,
    "LoHa": loha,
    "LoKr": lokr,
    "full difference": full_difference,
    "LoRA and biases": with_biases,
    "DoRA": dora,
    "(IA)3": ia3,
    "embedding": a1111_token,
    "two embeddings": two_tokens,
    "LoRA and embeddings": bundle,
    "Custom Diffusion": custom_diffusion,
}
