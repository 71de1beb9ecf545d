"""`verify` for a LoRA file of a diffusion transformer: its names and shapes, and what diffusers reads from it."""

from __future__ import annotations

from pathlib import Path

from personalize.errors import UserError
from personalize.formats.diffusion_transformers.families import FAMILIES
from personalize.formats.diffusion_transformers.readers import through_diffusers
from personalize.formats.diffusion_transformers.reading import model_of, read, sort
from personalize.formats.integrity import header_problems
from personalize.formats.verification_report import FileReport, VerificationReport
from personalize.io.tensor_files import TensorFile


def verify_transformer_file(path: Path, content: TensorFile, family: str) -> VerificationReport:
    """Check a file by itself: every key must name a layer, and diffusers' converter must give the same changes.

    Raises:
        UserError: the file's changes cannot be computed.
    """
    file = sort(content, family)
    title, (_, misfits) = FAMILIES[family].title, model_of(file)
    problems = [f"no layer of {title} has the key {key[:120]!r}" for key in file.unknown]
    problems += [f"the key {key[:120]!r} gives a tensor a second time" for key in file.twice]
    problems += [f"layer {stem[:120]} has a shape of no released model of {title}" for stem in misfits]
    problems += header_problems(path, content)
    total = len(file.parts) + len(file.unknown)
    names = FileReport(path.name, len(file.parts) - len(misfits), total, 0.0, "", tuple(problems), "layers")
    if file.unknown or file.twice:
        return VerificationReport((names,))
    lora = read(path, content, family)
    reading, count = through_diffusers(content, lora), len(lora.pairs)
    wrong = [f"refused: {reading.refused}; convert --to diffusers"] if reading.refused else []
    wrong += [f"layer {name} is not loaded: convert --to diffusers" for name in reading.dropped]
    wrong += [f"layer {name} is loaded with another change: convert --to diffusers" for name in reading.wrong]
    matched = 0 if reading.refused else count - len(reading.dropped) - len(reading.wrong)
    loaded = FileReport(f"{path.name} through diffusers", matched, count, 0.0, "", tuple(wrong), "layers")
    return VerificationReport((names, loaded))


def require_no_base(path: Path, base: object) -> None:
    """UserError if a base model is given, for those of these families are not loaded here."""
    if base is not None:
        raise UserError(
            f"{path} is for a diffusion transformer, of which no base is loaded: leave --base and --on_base out"
        )
