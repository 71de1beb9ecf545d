"""Convert an adapter file from any program's layout to another's, and check the result before it is saved.

    personalize convert FILE --to diffusers|kohya|peft --output F

Alphas and ranks that differ between modules become one rank with alpha = rank, because not every program supports
others; every ΔW = (alpha / r) · B A stays as it was.  Module names are corrected: mixed naming schemes, a missing
`text_model`, a missing `unet.`, diffusers' block names in SDXL files, words of wrappers.  LoHa, LoKr and full
differences become LoRAs that equal them.  Learned tokens are converted between the layouts of diffusers and of the
graphical programs; those inside a LoRA file are written beside the result, for no layout holds both.

A result is verified against the file itself, read a second time by `source_reading`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats import layouts, lora_files, textual_inversion_files, verification
from personalize.formats.foreign_files import AdapterFile
from personalize.formats.layer_kinds import known_paths
from personalize.formats.peft_files import read_peft_keys
from personalize.formats.reader_keys import Factors, ReaderKeys
from personalize.formats.source_reading import deviations
from personalize.formats.verification_report import VerificationReport
from personalize.io.tensor_files import TensorFile, read_tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-5  # of max |ΔW|: single precision, once multiplied out from the factors and once from their products


def factors(state: Mapping[str, Tensor], scaling: float) -> Factors:
    """For each module A, B and `scaling` = alpha / r, as `verification.compare` takes them."""
    return {module: (a, b, scaling) for module, (a, b) in lora_files.factor_pairs(state).items()}


def require(path: Path, expected: Factors, family: str | None, *, kohya: bool) -> None:
    """UserError unless the file, read with the keys of `reader_keys`, gives every ΔW of `expected`."""
    content = read_tensors(path)
    found = ReaderKeys(family).kohya(content) if kohya and family else read_peft_keys(content, family)
    VerificationReport((verification.compare("the result", *found, expected),)).require()


def metadata(lora: AdapterFile, family: str, title: str) -> dict[str, str]:
    """The header of a kohya file: the source's `ss_*` and `modelspec.*` strings, except those about its layout."""
    ours = lora_files.kohya_metadata(title=title, family=family, rank=lora.rank, info={"base": lora.base})
    return lora_files.kept_metadata(ours, lora.header, family)


def require_tokens(
    path: Path, concepts: Mapping[str, dict[str, Tensor]], token: str | None, dtype: torch.dtype
) -> None:
    """UserError unless the file gives back the rows of every token."""
    found = textual_inversion_files.read_concepts(path, read_tensors(path), token)
    same = found.keys() == concepts.keys() and all(
        found[name].keys() == rows.keys()
        and all(torch.equal(found[name][key], rows[key].to(dtype).float()) for key in rows)
        for name, rows in concepts.items()
    )
    if not same:
        raise UserError("the result does not give back the token's rows: the disk or memory is faulty")


def require_source(content: TensorFile, expected: Factors, family: str | None, name: object) -> None:
    """UserError unless every ΔW of `expected` is the one that the file `content` says, by a reading of its own."""
    guess = family or layouts.detect_family(layouts.classify_tensors(content.tensors), {})[0] or "sd1"
    components = {module.partition(".")[0] for module in expected}
    elsewhere = [module for module in expected if module not in known_paths(guess)]
    if elsewhere:
        raise UserError(
            f"{name}: {len(elsewhere)} module(s), first {elsewhere[0][:120]!r}, are in no model of {guess}: "
            "is --family right?"
        )
    try:
        found = deviations(content, expected, guess)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise UserError(f"{name}: its settings are of the wrong kind ({error!r:.80}): get the file again") from error
    wrong = {m: value for m, value in found.items() if value > TOLERANCE and m.partition(".")[0] in components}
    missing = sorted(expected.keys() - found.keys())
    if wrong or missing:
        worst = max(wrong, key=wrong.__getitem__) if wrong else missing[0]
        raise UserError(
            f"{name}: two readings of it do not agree on module {worst} ({wrong.get(worst, float('nan')):.1e}): "
            "please report this file"
        )
