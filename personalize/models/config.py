"""Options that name a base model and its precision; every command and trainer has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from personalize.errors import UserError

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


def check_base_name(source: str | Path) -> None:
    """UserError unless `source` is a diffusers folder, a single-file checkpoint, or has the form of a hub id."""
    path = Path(source)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{path} is no base model: it has no model_index.json; give a folder saved by diffusers")
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(
            f"{path.name} is no .safetensors file: convert the checkpoint to .safetensors (pickles can run code)"
        )
    if not path.exists() and not re.fullmatch(HUB_ID, str(source)):
        raise UserError(
            f"no base model at {source}: give a diffusers folder, a .safetensors file or a hub id owner/name"
        )


@dataclass(frozen=True, kw_only=True)
class BaseModelOptions:
    """Options that choose the base model."""

    pretrained_model_name_or_path: str | None = None
    """Base: a diffusers folder, hub id or single-file checkpoint; by default the adapter's own, or the package's."""
    revision: str | None = None
    """Revision of a base from the hub."""
    variant: str | None = None
    """Variant of the base's files, e.g. fp16."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base's UNet predicts; if not given, what the base says, or what one forward pass shows."""

    def check(self) -> None:
        """UserError for what the options name and how they fit together; the command line calls it before torch."""
        if self.pretrained_model_name_or_path is not None:
            check_base_name(self.pretrained_model_name_or_path)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(BaseModelOptions):
    """Options of every command that draws pictures."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the base model: "no" is fp32; if not given, bf16 on GPUs that support it, else fp32."""
    cpu: bool = False
    """Run on the CPU even if there is an accelerator."""
