"""Writing a base model with an adapter merged into it, as a diffusers folder or as one file in the original layout.

    W = W₀ + (alpha / rank) · B A

The loaded model is not changed: changed weights are new tensors, all others are shared with it.  Each tensor is cast to
the file's precision only while it is written, which saves memory.  Before a single file takes its final name it is read
back through diffusers' own converters, and a folder tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.merging import require_constant_rank
from personalize.errors import UserError
from personalize.formats import lora_files
from personalize.formats.changed_layers import changed
from personalize.formats.coverage import TEXT_LAYERS
from personalize.formats.layer_kinds import fitted
from personalize.formats.lora_keys import with_text_model
from personalize.formats.original_checkpoint import TEXT_ENCODER_PREFIXES, Weights, original_state
from personalize.io.atomic import Content, write_file, write_folder
from personalize.io.json_files import utf8
from personalize.io.progress import ticked
from personalize.io.tensor_files import tensor_parts
from personalize.models.empty import CONFIGS, FOLDERS
from personalize.models.lora_modules import is_lora_layer
from personalize.models.ranges import check_number
from personalize.models.stable_diffusion import StableDiffusion

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1", ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v", ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}  # fmt: skip
# The UNet's first block_out_channels, and its cross_attention_dim.
PUBLISHED_SIZES = {"sd1": (320, 768), "sd2": (320, 1024), "sdxl": (320, 2048)}


def component_weights(model: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    """The weights of "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2", by component and name.

    Names inside text encoders always begin with `text_model.`.  UserError if the model has an adapter already.
    """
    modules = {"unet": model.unet, "vae": model.vae}
    modules |= dict(zip(TEXT_ENCODER_PREFIXES[model.family], model.text_encoders, strict=True))
    if any(is_lora_layer(layer) for module in modules.values() for layer in module.modules()):
        raise UserError("the base model has an adapter already: unload it before merging another")
    return {
        component: {_key(component, name): tensor.detach() for name, tensor in module.state_dict().items()}
        for component, module in modules.items()
    }


def _key(component: str, name: str) -> str:
    if component in ("unet", "vae"):
        return name
    return with_text_model(component, name).partition(".")[2]


def merged_weights(
    model: StableDiffusion, adapter: Adapter, *, any_base: bool = False, strength: float = 1.0
) -> dict[str, dict[str, Tensor]]:
    """The weights of `model` with the adapter merged into them, by component; changed ones are new fp32 tensors.

    `strength` is how far each weight and bias moves, of a LoRA as of changes of other algorithms.

    Raises:
        UserError: the adapter is for another family or, unless `any_base`, for another base model, it changes a module
            that `model` does not have, or its rank depends on the timestep.
    """
    require_constant_rank(adapter, "the adapter")
    adapter.check_base(model, any_base=any_base)
    check_number("strength", strength)
    weights, scaling = component_weights(model), strength * adapter.alpha / adapter.rank
    for module, (a, b) in ticked(lora_files.factor_pairs(adapter.lora).items(), "Merging"):
        weight = _weight_of(weights, module)
        a, b = fitted(a, b, weight.shape)
        if weight.shape != (len(b), *a.shape[1:]):
            raise UserError(
                f"the adapter changes {module}, shape {(len(b), *a.shape[1:])}, the base has shape "
                f"{tuple(weight.shape)}: name its own"
            )
        component, path = module.split(".", 1)
        change = (b.flatten(1).float() @ a.flatten(1).float()) * scaling
        weights[component][f"{path}.weight"] = weight.float().cpu() + change.reshape(weight.shape)
    for module, parts in adapter.others.items():
        component, path = module.split(".", 1)
        weight, bias = _weight_of(weights, module).float().cpu(), weights[component].get(f"{path}.bias")
        weight, bias = changed(module, parts, weight, None if bias is None else bias.cpu(), strength)
        weights[component][f"{path}.weight"] = weight
        weights[component] |= {} if bias is None else {f"{path}.bias": bias}
    return weights


def _weight_of(weights: Mapping[str, Weights], module: str) -> Tensor:
    """The weight of a module; UserError if the base has no such module."""
    component, path = module.split(".", 1)
    weight = weights.get(component, {}).get(f"{path}.weight")
    if weight is None:
        raise UserError(f"the adapter changes {module}, the base has no such module: name its own")
    return weight


def has_published_sizes(model: StableDiffusion) -> bool:
    """True if `model` has the sizes of the published models; programs that read single files know no others.

    Text encoders count too: one that was saved without its last layer, as for clip skip, would get a random one there.
    """
    config, layers = model.unet.config, tuple(encoder.config.num_hidden_layers for encoder in model.text_encoders)
    sizes = (config.block_out_channels[0], config.cross_attention_dim)
    return sizes == PUBLISHED_SIZES[model.family] and layers == TEXT_LAYERS[model.family]


def export_single_file(
    model: StableDiffusion, weights: Mapping[str, Weights], output: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write `weights` of `model` as one checkpoint in the original layout, and verify it.

    Raises:
        UserError: the model is an SD 1.x that predicts v, or has another noise schedule than its family, which a single
            file cannot say; a number does not fit `dtype`; the disk is full; or the file read back is not equal.
    """
    kind = (model.family, model.prediction_type)
    if kind not in ARCHITECTURES:
        raise UserError("a single file cannot say that an SD 1.x model predicts v: export a folder instead")
    _require_usual_noise(model)
    state = original_state(weights, model.family)
    if kind == ("sdxl", "v_prediction"):
        state["v_pred"] = torch.zeros(0)
    if model.family == "sdxl" and model.scheduler.config.get("rescale_betas_zero_snr"):
        state["ztsnr"] = torch.zeros(0)
    header = {
        "format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": ARCHITECTURES[kind],
        "modelspec.implementation": "diffusers", "modelspec.title": output.stem,
        "modelspec.prediction_type": "epsilon" if model.prediction_type == "epsilon" else "v",
        "modelspec.resolution": f"{model.resolution}x{model.resolution}",
    }  # fmt: skip
    _require_finite(weights, dtype)
    content = tensor_parts(state, header, dtype)
    return write_file(output, content, check=lambda path: _require_equal(read_single_file(path, model), weights, dtype))


def _require_usual_noise(model: StableDiffusion) -> None:
    """UserError unless the noise schedule is the one that single files are read with; only SDXL's can say zero SNR."""
    from diffusers import DDIMScheduler

    own: Any = model.scheduler.config
    usual: Any = DDIMScheduler.load_config(CONFIGS / FOLDERS[model.family] / "scheduler")
    zero_snr = bool(own.get("rescale_betas_zero_snr"))
    found, read = (
        DDIMScheduler.from_config(config, rescale_betas_zero_snr=rescaled).alphas_cumprod  # pyright: ignore
        for config, rescaled in ((own, zero_snr), (usual, zero_snr and model.family == "sdxl"))
    )
    if found.shape != read.shape or not torch.allclose(found, read, rtol=1e-4):
        raise UserError(
            "a single file cannot say this base's noise schedule (its betas, or zero SNR of an SD 1.x or 2.x): export "
            "a folder instead"
        )


def export_folder(
    model: StableDiffusion, weights: Mapping[str, Weights], output: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write `weights` of `model` as a diffusers folder with configurations, tokenizers and scheduler, and verify it.

    Raises:
        UserError: a number does not fit `dtype`, the disk is full, or the folder read back is not equal.
    """
    _require_finite(weights, dtype)
    files: dict[str, Content] = dict(_configuration_files(model, dtype))
    names = {component: f"{component}/{WEIGHTS.get(component, 'model')}.safetensors" for component in weights}
    for component, name in names.items():
        files[name] = tensor_parts(weights[component], {"format": "pt"}, dtype)

    def check(folder: Path) -> None:
        _require_equal({component: _read_tensors(folder / name) for component, name in names.items()}, weights, dtype)

    return write_folder(output, files, check=check)


def _configuration_files(model: StableDiffusion, dtype: torch.dtype) -> dict[str, bytes]:
    """All files of a diffusers folder except the weights, by path in the folder; local paths are removed from them."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

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
    """Set keys of the JSON object in `path`; None removes a key."""
    values = json.loads(path.read_text("utf-8"))
    if isinstance(values, dict):
        values = {key: value for key, value in (values | changes).items() if key not in changes or changes[key]}
        path.write_bytes(utf8(json.dumps(values, indent=2, ensure_ascii=False) + "\n"))


def read_single_file(path: Path, model: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    """The weights in a single file by component, as `component_weights` has them, through diffusers' own converters."""
    from diffusers.loaders import single_file_utils

    state: dict[str, Any] = _read_tensors(path)
    weights = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(state, config=dict(model.unet.config)),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(state, config=dict(model.vae.config)),
    }
    components = TEXT_ENCODER_PREFIXES[model.family].items()
    for encoder, (component, (prefix, kind)) in zip(model.text_encoders, components, strict=True):
        if kind == "clip":
            weights[component] = single_file_utils.convert_ldm_clip_checkpoint(state)
        else:
            weights[component] = single_file_utils.convert_open_clip_checkpoint(encoder, state, prefix=prefix)
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _require_equal(written: Mapping[str, Weights], expected: Mapping[str, Weights], dtype: torch.dtype) -> None:
    """UserError unless `written` holds the same tensors as `expected` cast to `dtype`, bit for bit."""
    for component, weights in expected.items():
        names = set(weights) ^ set(written[component])
        wrong = next(iter(sorted(names)), None) or next(_different(written[component], weights, dtype), None)
        if wrong is not None:
            raise UserError(f"the written model does not verify: {component} comes back with another {wrong}")


def _different(written: Weights, expected: Weights, dtype: torch.dtype) -> Iterator[str]:
    """Names of the tensors that are not equal to `expected` cast to `dtype`."""
    for name, tensor in expected.items():
        wanted = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
        if written[name].shape != wanted.shape or not torch.equal(written[name], wanted):
            yield name


def _require_finite(weights: Mapping[str, Weights], dtype: torch.dtype) -> None:
    """UserError if a weight is not finite or too large for `dtype`."""
    largest = torch.finfo(dtype).max
    for component, tensors in weights.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not float(tensor.abs().max()) <= largest:
                raise UserError(f"{component}'s {name} does not fit into {dtype}: write the model in torch.float32")
