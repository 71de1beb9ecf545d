"""Loading a base model as a stock diffusers pipeline: from a diffusers folder, a single-file checkpoint or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from personalize.errors import UserError
from personalize.io.json_files import read_json
from personalize.io.plain_files import require_plain_tree
from personalize.io.tensor_files import TensorFile
from personalize.models.config import (
    INPAINTING,
    TEXT_TO_IMAGE,
    check_base_name,
    check_channels,
    safetensors_alone,
    stated_channels,
)
from personalize.models.offline import without_network
from personalize.models.quiet import quiet_loading
from personalize.models.supported import predicted_quantity
from personalize.models.weight_files import (
    check_weight_files,
    require_same_unet,
    require_unscaled,
    require_variant,
    require_whole,
    weight_header,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPTokenizer

CONFIGS = Path(__file__).parent / "configs"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@quiet_loading()
def load_pipeline(
    source: str | Path,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    inpainting: bool = False,
    local_files_only: bool = False,
) -> DiffusionPipeline:
    """The stock pipeline at `source`, its UNet in `dtype` and everything else in fp32.

    `prediction_type` overrides what the base says of itself; `inpainting` allows UNets of nine input channels;
    `local_files_only` takes a hub id only from this machine's cache.  From the hub only .safetensors are taken.

    Raises UserError, in one line, for anything that is not a Stable Diffusion model.
    """
    check_base_name(source)
    path = Path(source)
    if path.is_file():
        return load_single_file(path, dtype, prediction_type, inpainting)
    extra: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if path.is_dir():
        require_plain_tree(path)
        index = read_index(path)
        require_parts(index, path)
        require_variant(path, variant)
        check_weight_files(path, variant)
        check_channels(stated_channels(path) or TEXT_TO_IMAGE, source, inpainting=inpainting)
        extra = {name: None for name in extra if name in index}
    from diffusers import DiffusionPipeline

    local_files_only = local_files_only or path.is_dir()
    try:
        with without_network(local_files_only):
            pipe = DiffusionPipeline.from_pretrained(
                str(source), dtype={"unet": dtype, "default": torch.float32}, revision=revision, variant=variant,
                local_files_only=local_files_only, use_safetensors=safetensors_alone(path), **extra,
            )  # fmt: skip
    except Exception as error:
        raise _unreadable(source, error) from error
    require_whole(pipe.components, source, path if path.is_dir() else None, variant)
    if prediction_type is not None:
        pipe.scheduler.register_to_config(prediction_type=prediction_type)
    return pipe


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a diffusers folder; UserError if it is no JSON object."""
    path = folder / "model_index.json"
    try:
        return read_json(path)
    except UserError as error:
        raise _unreadable(folder, error) from error


def require_parts(names: Iterable[str], source: object) -> None:
    """UserError if `names`, the components of `source`, lack a part of a Stable Diffusion model."""
    present = set(names)
    if {"unet", "text_encoder_2"} <= present and "text_encoder" not in present:
        raise UserError(f"{source} is an SDXL refiner (one text encoder); the SDXL base model is needed")
    if missing := [part for part in PARTS if part not in present]:
        raise UserError(f"{source} is no Stable Diffusion 1.x, 2.x or XL model: it has no {' and no '.join(missing)}")


def load_single_file(
    path: Path, dtype: torch.dtype, prediction_type: str | None = None, inpainting: bool = False
) -> DiffusionPipeline:
    """The pipeline of a single-file checkpoint in the original layout; configs and tokenizer come from `configs`.

    Nothing is downloaded.  An SD 2.x file that does not say what its UNet predicts is found out by one forward pass.
    """
    header = weight_header(path, path)
    kind, overrides = _kind_of(header, path.name)
    channels = (*header.tensors[FIRST_CONVOLUTION].shape, 0, 0)[1]
    check_channels(channels, path.name, inpainting=inpainting)
    require_unscaled(header.tensors, path.name)
    require_same_unet(header.tensors, *_unet_without_weights(kind), path.name)
    try:
        pipe = _assembled(path, kind, channels)
    except Exception as error:
        raise _unreadable(path, error) from error
    require_whole(pipe.components, path)
    if kind == "sd21v" and prediction_type is None and not header.metadata.get("modelspec.prediction_type"):
        alphas, width = pipe.scheduler.alphas_cumprod, pipe.unet.config.cross_attention_dim
        prediction_type = predicted_quantity(pipe.unet, alphas, width)
    if kind == "sd21v" and prediction_type == "epsilon":  # the published ε model is the one of 512 px
        smaller = read_json(CONFIGS / "sd21" / "unet" / "config.json")
        pipe.unet.register_to_config(sample_size=smaller["sample_size"])
    overrides |= {} if prediction_type is None else {"prediction_type": prediction_type}
    pipe.unet.to(dtype)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **overrides)
    return pipe


def _assembled(path: Path, kind: str, channels: int) -> Any:
    """The pipeline of the weights in `path` and the configs of `kind`, in fp32."""
    import diffusers

    config, options = str(CONFIGS / kind), {"local_files_only": True, "dtype": torch.float32}
    parts: dict[str, Any]
    if kind == "sdxl":
        pipeline, inpainting = diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLInpaintPipeline
        parts = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
    else:
        pipeline, inpainting = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionInpaintPipeline
        parts = {"tokenizer": clip_tokenizer(EOS if kind == "sd15" else "!")}
    if channels == INPAINTING:
        about = {"config": config, "subfolder": "unet", "in_channels": channels}
        parts["unet"] = diffusers.UNet2DConditionModel.from_single_file(str(path), **about, **options)
        pipeline = inpainting
    return pipeline.from_single_file(str(path), config=config, **options, **parts)


def _unet_without_weights(kind: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """The UNet of one of `configs` on the meta device, and its config."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(CONFIGS / kind / "unet")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config), config  # pyright: ignore


def checkpoint_kind(path: Path) -> tuple[str, dict[str, Any]]:
    """The folder of `configs` that fits a single file, and scheduler settings that the file overrides.

    Both are read from the names of its tensors and its header.  Raises UserError for pickles, LoRA files and
    other families.
    """
    return _kind_of(weight_header(path, path), path.name)


def _kind_of(header: TensorFile, name: str) -> tuple[str, dict[str, Any]]:
    """`checkpoint_kind` of the file `name` by its header."""
    keys, metadata = set(header.tensors), header.metadata
    if FIRST_CONVOLUTION not in keys or not any(key.startswith(("cond_stage_model.", "conditioner.")) for key in keys):
        raise UserError(
            f"{name} is no Stable Diffusion checkpoint (UNet and text encoder expected): is it a LoRA file?"
        )
    if marks := [mark for mark in ("edm_mean", "edm_vpred.sigma_max") if mark in keys]:
        raise UserError(f"{name} is sampled as EDM ({marks[0]}: Playground 2.5 or CosXL), which is not supported")
    if "conditioner.embedders.1.model.ln_final.weight" in keys:
        velocity = "v_pred" in keys or metadata.get("modelspec.prediction_type") == "v"
        overrides = {"prediction_type": "v_prediction"} if velocity else {}
        return "sdxl", overrides | ({"rescale_betas_zero_snr": True} if "ztsnr" in keys else {})
    if "cond_stage_model.model.ln_final.weight" in keys:
        return ("sd21" if metadata.get("modelspec.prediction_type") == "epsilon" else "sd21v"), {}
    if any(key.startswith("cond_stage_model.transformer.") for key in keys):
        velocity = metadata.get("modelspec.prediction_type") == "v"
        return "sd15", {"prediction_type": "v_prediction"} if velocity else {}
    raise UserError(f"{name} is neither Stable Diffusion 1.x, 2.x nor the SDXL base: give one of these")


def clip_tokenizer(pad: str = EOS) -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens; SD 1.x pads with the end token, SD 2.x and SDXL's second encoder with "!"."""
    from transformers import CLIPTokenizer

    merges = [tuple(line.split()) for line in (CONFIGS / "clip" / "merges.txt").read_text("utf-8").splitlines()]
    symbols = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]  # represent the 256 bytes
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # pyright: ignore[reportArgumentType]
        bos_token=BOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=pad,
        model_max_length=77,
    )


def _unreadable(source: str | Path, error: Exception) -> UserError:
    """A one-line error for what a library raised while reading `source`."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"cannot load the base model {source}: {reason}")


def family(unet: Any, text_encoders: int) -> str:
    """ "sd1", "sd2" or "sdxl", from the UNet's config: SDXL has added embeddings, 2.x has linear projections.

    Raises UserError for a UNet like SDXL's with one text encoder, as the refiner and Kolors have it.
    """
    config = unet.config
    if config.addition_embed_type == "text_time":
        if text_encoders != 2:
            raise UserError(
                "the UNet is like SDXL's, but there is one text encoder, as of the refiner or Kolors: the SDXL base "
                "model, which has two, is needed"
            )
        return "sdxl"
    return "sd2" if config.use_linear_projection else "sd1"


def default_device() -> torch.device:
    """The first of CUDA, MPS and CPU that is available."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a CUDA device that computes in it, else fp32."""
    return torch.bfloat16 if device.type == "cuda" and has_bf16(device) else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bf16; GPUs before Ampere (T4, V100, RTX 20xx) emulate it, slowly."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def require_bf16(device: torch.device) -> None:
    """UserError unless `device` computes in bf16."""
    if not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} does not compute in bf16: use --mixed_precision fp16 or no (in Python, another dtype)")
