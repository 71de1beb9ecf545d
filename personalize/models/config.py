"""Options that name a base model and its precision; every command and trainer has them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from personalize.errors import Notice, UserError
from personalize.io.content_credentials import check_signing
from personalize.io.json_files import read_json
from personalize.io.output_folder import is_tensor_name

FAMILIES = ("sd1", "sd2", "sdxl")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # as diffusers' pipelines name them; SD 1 and 2 have the first alone
TEXT_TO_IMAGE, INPAINTING = 4, 9  # input channels of a UNet: the latents; the same, a mask and the masked latents
EMBEDDED = Path(__file__).parents[1] / "embedded" / "model"  # the base that ships with the package
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
HUB_FILE = re.compile(rf"({HUB_ID}):((?:[\w-][\w. -]*/)*[\w-][\w. -]*)")  # one file of a repository


def base_name(source: str) -> str:
    """What the base at `source` is called: that itself, but "embedded" for the package's own, also by its path."""
    return "embedded" if source and os.path.realpath(source) == os.path.realpath(EMBEDDED) else source


def safetensors_alone(place: str | Path) -> bool | None:
    """`use_safetensors` for transformers and diffusers: nothing pickled comes from the hub; a folder may hold it."""
    return None if Path(place).is_dir() else True


def check_base_name(source: str | Path) -> None:
    """UserError unless `source` is a diffusers folder, a single-file checkpoint, or has the form of a hub id."""
    path = Path(source)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{path} is no base model: it has no model_index.json; give a folder saved by diffusers")
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is a pipe or a device, no base model: give a diffusers folder or a .safetensors file")
    if path.is_file() and path.suffix != ".safetensors":
        if is_tensor_name(path):
            raise UserError(f"{path.name}: rename it to {path.stem}.safetensors, or diffusers takes it for a pickle")
        raise UserError(
            f"{path.name} is no .safetensors file: convert the checkpoint to .safetensors (pickles can run code)"
        )
    if not path.exists() and not re.fullmatch(HUB_ID, str(source)):
        raise UserError(
            f"no base model at {source}: give a diffusers folder, a .safetensors file or a hub id owner/name"
        )


def check_channels(channels: int, name: object, *, inpainting: bool = False) -> None:
    """UserError unless a UNet of so many input channels is a text-to-image model's, or if allowed an inpainting one's.

    Args:
        name: of the base, for the message.
        inpainting: whether nine channels are taken.
    """
    if channels == TEXT_TO_IMAGE or (inpainting and channels == INPAINTING):
        return
    if channels == INPAINTING:
        raise UserError(
            f"{name} is an inpainting model ({channels} input channels), which only drags take: give a text-to-image "
            "one here"
        )
    raise UserError(
        f"the UNet of {name} has {channels} input channels: text-to-image models have {TEXT_TO_IMAGE}, inpainting "
        f"models, which only drags take, {INPAINTING}"
    )


def cell_pixels(base: str | Path | None) -> int:
    """Pixels on a side of one latent cell, as the autoencoder's folder says; 8, as of every SD, where none does."""
    folder = EMBEDDED if base is None else Path(base)
    try:
        return 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
    except (UserError, KeyError, TypeError):
        return 8


def check_resolution(resolution: int | None, base: str | Path | None) -> None:
    """UserError if `resolution` is below 8 latent cells of the base, which its UNet needs on each side."""
    least = 8 * cell_pixels(base)
    if resolution is not None and resolution < least:
        raise UserError(f"--resolution is {resolution}: this base needs at least {least} px on a side")


def notice_unused(config: Any, uses: Mapping[str, tuple[bool, str]], how: str = "without") -> None:
    """A Notice for options that are given though they have no effect without another one, or beside it.

    uses: that other option → whether the options, which are named then, have an effect.
    how: "without" or "beside" that other option they have none.
    """
    usual = {field.name: field.default for field in fields(config)}  # none has a default_factory
    for owner, (effective, names) in uses.items():
        idle = [name for name in names.split() if not effective and getattr(config, name) != usual[name]]
        shown = [f"--no_{name}" if getattr(config, name) is False else f"--{name}" for name in idle]
        if idle:
            warnings.warn(f"nothing comes of {' and '.join(shown)} {how} {owner}", Notice, stacklevel=2)


def stated_channels(folder: Path) -> int | None:
    """The input channels of the UNet that a diffusers folder states; None if it states none that can be read."""
    try:
        channels = read_json(folder / "unet" / "config.json").get("in_channels")
    except UserError:
        return None
    return channels if isinstance(channels, int) else None


@dataclass(frozen=True, kw_only=True)
class BaseModelOptions:
    """Options that choose the base model."""

    inpainting: ClassVar[bool] = False  # whether this command takes inpainting models

    pretrained_model_name_or_path: str | None = None
    """Base: a diffusers folder, hub id or single-file checkpoint; by default the adapter's own, or the package's."""
    revision: str | None = None
    """Revision of a base from the hub."""
    variant: str | None = None
    """Variant of the base's files, e.g. fp16."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base's UNet predicts; by default as in the adapter's training, or what the base or a test shows."""

    def check(self) -> None:
        """UserError for what the options name and how they fit together; the command line calls it before torch."""
        if self.pretrained_model_name_or_path is not None:
            check_base_name(self.pretrained_model_name_or_path)
            channels = stated_channels(Path(self.pretrained_model_name_or_path))
            if channels is not None:
                check_channels(channels, self.pretrained_model_name_or_path, inpainting=self.inpainting)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(BaseModelOptions):
    """Options of every command that draws pictures."""

    allow_download: bool = False
    """Get the base that the adapter names from the hub; one that you name, or had before, needs no leave."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the base model: "no" is fp32; if not given, bf16 on GPUs that support it, else fp32."""
    cpu: bool = False
    """Run on the CPU even if there is an accelerator."""
    metadata: bool = True
    """Write prompt, settings and hashes into the pictures, so that `edit --from PICTURE` draws them again."""
    provenance: bool = True
    """Write into the pictures that a model made them (IPTC's digital source type)."""
    c2pa: tuple[Path, ...] = ()
    """Sign the pictures (Content Credentials): a certificate chain and its private key, two PEM files."""

    def check(self) -> None:
        super().check()
        check_signing(self.c2pa, provenance=self.provenance)
