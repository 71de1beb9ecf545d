"""Merge an adapter into its base model: a diffusers folder, or one .safetensors checkpoint in the original layout.

    personalize export checkpoint my-cat --output my-cat-model
    personalize export checkpoint my-cat --output my-cat-model.safetensors --dtype float16 --forget decoder=0.5

The result is read back, single files through diffusers' own converters, before it gets its final name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from personalize.errors import UserError


@dataclass(frozen=True)
class Config:
    adapter: tyro.conf.Positional[Path]
    """Adapter folder, or a LoRA file of any layout."""
    output: Path
    """A single file if the name ends in .safetensors, otherwise a diffusers folder; must not exist yet."""
    pretrained_model_name_or_path: str | None = None
    """Base model: a diffusers folder, hub id or single-file checkpoint; by default the one named in the adapter."""
    allow_download: bool = False
    """Get the base that the adapter names from the hub; one that you name, or had before, needs no leave."""
    revision: str | None = None
    """Revision of a base model from the hub."""
    variant: str | None = None
    """Variant of the base model's files, e.g. fp16."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, written into the result; by default as in training on it, or what it shows itself."""
    any_base: bool = False
    """Allow another base model of the family than the one the adapter was made for."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the numbers written; merging is done in float32."""
    forget: tuple[str, ...] = ()
    """Forgetting rules to multiply into the weights, e.g. `decoder=0.5` (keep half of what the decoder learned)."""
    strength: float = 1.0
    """Strength at which the adapter is merged."""
    timestep_rank: Literal["full", "share"] = "share"
    """Of timestep-dependent rank: all components at full strength, or each by its share of timesteps."""

    def check(self) -> None:
        from personalize.adapters.forgetting import parse_rules
        from personalize.cli.checks import check_adapters
        from personalize.io.output_folder import require_absent

        check_adapters([self.adapter])
        parse_rules(self.forget)
        require_absent(self.output)


def main(config: Config) -> Path:
    """Merge, write, and print what was written; returns its path."""
    import torch

    from personalize.adapters.adapter import Adapter
    from personalize.adapters.export import DTYPES, baked, describe_resolved
    from personalize.adapters.fuse import export_folder, export_single_file, has_published_sizes, merged_weights
    from personalize.adapters.merging import missed_without
    from personalize.editing.adapter_base import notice_other_prediction
    from personalize.io.output_folder import is_tensor_name, require_absent
    from personalize.models.known_bases import find_base
    from personalize.models.stable_diffusion import StableDiffusion

    output = require_absent(config.output)
    if not config.strength:
        raise UserError("nothing of the adapter is left: use a strength other than 0")
    adapter, note = describe_resolved(baked(Adapter.load(config.adapter), config.forget), config.timestep_rank)
    base = config.pretrained_model_name_or_path or adapter.base.get("name")
    if not base:
        raise UserError(f"{config.adapter} does not say its base: give --pretrained_model_name_or_path")
    same = adapter.base.get("sha256") and not config.any_base  # `merged_weights` refuses another base
    predicts = config.prediction_type or (adapter.base.get("prediction_type") if same else None)
    about: dict[str, Any] = {"revision": config.revision, "variant": config.variant, "prediction_type": predicts}
    if (named := config.pretrained_model_name_or_path) is None:
        named = find_base(adapter.base, allow_download=config.allow_download)
        about["local_files_only"] = not config.allow_download
    model = StableDiffusion.load(named, device="cpu", dtype=torch.float32, **about)
    notice_other_prediction(adapter, model)
    weights = merged_weights(model, adapter, any_base=config.any_base, strength=config.strength)
    single = is_tensor_name(output)
    (export_single_file if single else export_folder)(model, weights, output, DTYPES[config.dtype])
    count = len(adapter.lora) // 2 + len(adapter.others)
    lines = (note, f"{output}: {count} modules merged into {base}, {config.dtype}, verified", *missed_without(adapter))
    print(*filter(None, lines), sep="\n")
    if single and not has_published_sizes(model):
        print("The base has sizes of its own, or layers; graphical programs can only read models as published.")
    return output


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
