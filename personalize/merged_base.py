"""An adapter merged into its base, W = W₀ + (alpha / rank) · B A, as a diffusers folder or an original single file.

The model at hand is not altered: changed weights are new tensors, all others are shared, and every tensor is cast to
the file's precision when its turn to be written comes.  A single file is read back through diffusers' own converters,
a folder tensor by tensor, before either takes its final name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import single_file_utils as theirs
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from personalize import formats
from personalize.adapter import Adapter
from personalize.checkpoint_layout import TEXT_ENCODER_PREFIXES, Weights, original_state
from personalize.errors import UserError
from personalize.files import Content, tensor_parts, write_file, write_folder
from personalize.lora_names import with_text_model
from personalize.model import StableDiffusion

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1", ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v", ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}  # fmt: skip
STANDARD = {"sd1": (320, 768), "sd2": (320, 1024), "sdxl": (320, 2048)}  # first width, width of the text


def parts(model: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    """The weights of "unet", "vae", "text_encoder" (and "text_encoder_2"), the last two always with `text_model.`."""
    modules = {"unet": model.unet, "vae": model.vae}
    modules |= dict(zip(TEXT_ENCODER_PREFIXES[model.family], model.text_encoders, strict=True))
    if any(isinstance(layer, LoraLayer) for module in modules.values() for layer in module.modules()):
        raise UserError("the base model carries an adapter already: unload it before merging another")
    return {
        component: {_key(component, name): tensor.detach() for name, tensor in module.state_dict().items()}
        for component, module in modules.items()
    }


def _key(component: str, name: str) -> str:
    if component in ("unet", "vae"):
        return name
    return with_text_model(component, name).partition(".")[2]


def merged_weights(model: StableDiffusion, adapter: Adapter, *, any_base: bool = False) -> dict[str, dict[str, Tensor]]:
    """The weights of `model` with the adapter in them, by part; changed ones are new, in fp32.

    Raises:
        UserError: another family or (unless `any_base`) another base of it, or a module that the model does not have.
    """
    adapter.check_base(model, any_base=any_base)
    found, strength = parts(model), adapter.alpha / adapter.rank
    for module, (a, b) in formats.factor_pairs(adapter.lora).items():
        component, path = module.split(".", 1)
        weight = found.get(component, {}).get(f"{path}.weight")
        if weight is None or weight.shape != (len(b), *a.shape[1:]):
            has = "no such module" if weight is None else f"shape {tuple(weight.shape)}"
            raise UserError(
                f"the adapter changes {module}, shape {(len(b), *a.shape[1:])}, the base has {has}: it is another base"
            )
        change = (b.flatten(1).float() @ a.flatten(1).float()) * strength
        found[component][f"{path}.weight"] = weight.float().cpu() + change.reshape(weight.shape)
    return found


def has_published_sizes(model: StableDiffusion) -> bool:
    """Does `model` have the sizes of the published models, which is all that programs for single files expect?"""
    config = model.unet.config
    return (config.block_out_channels[0], config.cross_attention_dim) == STANDARD[model.family]


def export_single_file(
    model: StableDiffusion, weights: Mapping[str, Weights], output: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write `weights` of `model` as one checkpoint in the original layout, verified.

    Raises:
        UserError: v prediction on SD 1.x (a single file cannot say so), disk full, or what was written is not right.
    """
    told = (model.family, model.prediction_type)
    if told not in ARCHITECTURES:
        raise UserError("a single file cannot say that an SD 1.x model predicts v: export a folder instead")
    state = original_state(weights, model.family)
    if told == ("sdxl", "v_prediction"):
        state["v_pred"] = torch.zeros(0)
    if model.family == "sdxl" and model.scheduler.config.get("rescale_betas_zero_snr"):
        state["ztsnr"] = torch.zeros(0)
    header = {
        "format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": ARCHITECTURES[told],
        "modelspec.implementation": "diffusers", "modelspec.title": output.stem,
        "modelspec.prediction_type": "epsilon" if model.prediction_type == "epsilon" else "v",
        "modelspec.resolution": f"{model.resolution}x{model.resolution}",
    }  # fmt: skip
    _require_finite(weights, dtype)
    content = tensor_parts(state, header, dtype)
    return write_file(output, content, check=lambda path: _require(read_single_file(path, model), weights, dtype))


def export_folder(
    model: StableDiffusion, weights: Mapping[str, Weights], output: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write `weights` of `model` as a diffusers folder with configurations, tokenizers and scheduler, verified.

    Raises:
        UserError: disk full, or what was written is not right.
    """
    _require_finite(weights, dtype)
    files: dict[str, Content] = dict(_settings(model, dtype))
    names = {component: f"{component}/{WEIGHTS.get(component, 'model')}.safetensors" for component in weights}
    for component, name in names.items():
        files[name] = tensor_parts(weights[component], {"format": "pt"}, dtype)

    def check(folder: Path) -> None:
        _require({component: _opened(folder / name) for component, name in names.items()}, weights, dtype)

    return write_folder(output, files, check=check)


def _settings(model: StableDiffusion, dtype: torch.dtype) -> dict[str, bytes]:
    """Every file of a diffusers folder but the weights, by its path in the folder; without paths of this machine."""
    pipe: Any = model.pipeline()
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        pipe.save_config(root)
        for name, part in pipe.components.items():
            if isinstance(part, ModelMixin):
                part.save_config(root / name)
            elif part is not None and not isinstance(part, torch.nn.Module):
                part.save_pretrained(root / name)
            elif isinstance(part, PreTrainedModel):
                part.config.save_pretrained(root / name)
                _edit_json(root / name / "config.json", architectures=[type(part).__name__], dtype=str(dtype)[6:])
        for path in root.rglob("*.json"):
            _edit_json(path, _name_or_path=None)
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None takes a key away."""
    values = json.loads(path.read_text("utf-8"))
    if isinstance(values, dict):
        values = {key: value for key, value in (values | changes).items() if key not in changes or changes[key]}
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_single_file(path: Path, model: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    """The parts of a single file as diffusers' own converters take it apart, in the shape of `parts`."""
    state: dict[str, Any] = _opened(path)
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(state, config=dict(model.unet.config)),
        "vae": theirs.convert_ldm_vae_checkpoint(state, config=dict(model.vae.config)),
    }
    for encoder, (component, (prefix, kind)) in zip(model.text_encoders, TEXT_ENCODER_PREFIXES[model.family].items(), strict=True):
        if kind == "clip":
            found[component] = theirs.convert_ldm_clip_checkpoint(state)
        else:
            found[component] = theirs.convert_open_clip_checkpoint(encoder, state, prefix=prefix)
    return found


def _opened(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _require(found: Mapping[str, Weights], expected: Mapping[str, Weights], dtype: torch.dtype) -> None:
    """UserError unless both hold the same tensors, bit for bit, after the cast to `dtype`."""
    for component, weights in expected.items():
        names = set(weights) ^ set(found[component])
        wrong = next(iter(sorted(names)), None) or next(_different(found[component], weights, dtype), None)
        if wrong is not None:
            raise UserError(f"the written model does not verify: {component} comes back with another {wrong}")


def _different(found: Weights, expected: Weights, dtype: torch.dtype) -> Iterator[str]:
    for name, tensor in expected.items():
        wanted = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
        if found[name].shape != wanted.shape or not torch.equal(found[name], wanted):
            yield name


def _require_finite(weights: Mapping[str, Weights], dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for component, tensors in weights.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not float(tensor.abs().max()) <= largest:
                raise UserError(f"{component}'s {name} does not fit into {dtype}: write the model in torch.float32")
