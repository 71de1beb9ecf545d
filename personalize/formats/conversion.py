"""Convert a LoRA or a learned token from any program's layout to another's, and check the result before it is saved.

    personalize convert FILE --to diffusers|kohya|peft --output F

Alphas and ranks that differ between modules become one rank with alpha = rank, because not every program supports
others; every ΔW = (alpha / r) · B A stays as it was.  Module names are corrected: mixed naming schemes, a missing
`text_model`, a missing `unet.`, diffusers' block names in SDXL files.  Learned tokens are converted between the layouts
of diffusers and of the graphical programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from personalize.formats import layouts, lora_files, verification
from personalize.formats.peft_files import _read_peft_keys
from personalize.formats.reader_keys import Factors, ReaderKeys
from personalize.io.tensor_files import read_tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def factors(state: Mapping[str, torch.Tensor], scaling: float) -> Factors:
    """For each module A, B and `scaling` = alpha / r, as `verification.compare` takes them."""
    return {module: (a, b, scaling) for module, (a, b) in lora_files.factor_pairs(state).items()}


def require(path: Path, expected: Factors, family: str | None, *, kohya: bool) -> None:
    """UserError unless the file, read with `ReaderKeys`, gives every ΔW of `expected`."""
    content = read_tensors(path)
    factors = ReaderKeys(family).kohya(content) if kohya and family else _read_peft_keys(content, family)
    verification.VerificationReport((verification.compare("the result", *factors, expected),)).require()


def metadata(lora: lora_files.LoraFile, family: str, title: str) -> dict[str, str]:
    """The header of a kohya file: the source's `ss_*` and `modelspec.*` strings, except those about its layout."""
    ours = lora_files.kohya_metadata(title=title, family=family, rank=lora.rank, info={})
    layout = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "modelspec.implementation")
    if layouts.family_from_metadata(lora.metadata) != family:  # what the source says of its base is missing or wrong
        layout += ("ss_base_model_version", "ss_v2", "modelspec.architecture")
    return ours | lora.header | {key: ours[key] for key in layout}
