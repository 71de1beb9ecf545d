"""Verify: read the files we wrote the way their readers do, rebuild every ΔW, and compare.

    ΔW = (alpha / r) · B A

Keys are mapped to modules by `reader_names`, which shares nothing with the code that wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from personalize import token_files
from personalize.errors import Mismatch, UserError
from personalize.files import TensorFile, plain_name, read_json, read_tensors
from personalize.model import EMBEDDED, StableDiffusion
from personalize.phantoms import Phantom, phantom
from personalize.reader_names import Factors, ReaderKeys

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name by which diffusers finds it in a folder
SOURCE_FILE = "source_embedding.safetensors"
MANIFEST = "adapter.json"
FAMILIES = ("sd1", "sd2", "sdxl")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest |ΔW in the file − ΔW| / max |ΔW|: fp32 rounding of a product; rounding of both factors to half precision."""


@dataclass(frozen=True)
class FileReport:
    """One file as one reader sees it: modules whose ΔW is right, out of all, and what is wrong."""

    file: str
    matched: int
    total: int
    deviation: float
    worst: str
    problems: tuple[str, ...]
    unit: str = "modules"

    def __str__(self) -> str:
        text = f"{self.file}: {self.matched} / {self.total} {self.unit} match, largest deviation {self.deviation:.1e}"
        lines = [text + (f" ({self.worst})" if self.deviation else "")]
        shown = [f"  {problem}" for problem in self.problems[:20]]
        hidden = len(self.problems) - len(shown)
        return "\n".join([*lines, *shown, *([f"  and {hidden} more"] if hidden else [])])


@dataclass(frozen=True)
class VerificationReport:
    """What verifying found, file by file."""

    files: tuple[FileReport, ...]

    @property
    def ok(self) -> bool:
        return not any(file.problems for file in self.files)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.files), "verified" if self.ok else "NOT verified"])

    def require(self) -> VerificationReport:
        """This report if all is well; else UserError with the first problem and their number."""
        found = [f"{file.file}: {problem}" for file in self.files for problem in file.problems]
        if found:
            raise UserError(f"the adapter does not verify, {len(found)} problem(s); first: {found[0]}")
        return self


class VerifyConfig(Protocol):
    """What `personalize verify FOLDER [--base MODEL]` passes."""

    @property
    def path(self) -> str | Path: ...

    @property
    def base(self) -> str | Path | None: ...


def run(config: VerifyConfig) -> VerificationReport:
    """Verify an adapter folder or a single file, and print the result; `Mismatch` (exit code 1) if anything is wrong.

    A file that belongs to an adapter folder stands for the folder.  Without `base` the embedded model or a local base
    named in the adapter is used; a base from the hub is not fetched.
    """
    path = Path(config.path)
    folder = path.parent if path.is_file() else path
    if path.is_file() and not _belongs(path):
        report = verify_file(path, None if config.base is None else StableDiffusion.load(config.base))
        base = config.base or (True if len(report.files) > 1 else None)
    else:
        named = str((read_json(folder / MANIFEST).get("base") or {}).get("name"))
        base = config.base or (EMBEDDED if named == "embedded" else named if Path(named).exists() else None)
        report = verify_folder(folder, None if base is None else StableDiffusion.load(base))
    print(report)
    if base is None:
        print("Checked without a base model: give --base to check shapes, and loading by diffusers, as well.")
    if not report.ok:
        raise Mismatch(f"{path} does not verify, {sum(len(file.problems) for file in report.files)} problem(s)")
    return report


def _belongs(path: Path) -> bool:
    """Is the file part of the adapter folder it lies in?"""
    manifest = path.parent / MANIFEST
    return manifest.is_file() and path.name in (read_json(manifest).get("files") or [])


def verify_file(path: Path, model: StableDiffusion | None = None) -> VerificationReport:
    """Check one LoRA file by itself: every key must lead to a module, and diffusers must compute the same with it.

    The file is read through the independent name map; then diffusers' own loader reads it into `model` or, without
    one, into a model of the released size without weights, if the file is for one.

    Raises:
        UserError: no readable file.
    """
    content = read_tensors(path)
    kohya = any(key.startswith("lora_") for key in content.tensors)
    family = model.family if model is not None else _family(content, kohya)
    base = model if model is not None else phantom(family)
    names = ReaderKeys(family, base.unet)
    live, problems = names.kohya(content) if kohya else names.peft(content)
    if model is None and _unusual(live, names.shapes or {}):
        base, names = None, ReaderKeys(family)
    read = compare(path.name, live, problems, live, names.shapes)
    stems = {key.removesuffix(ending) for ending in _ENDINGS for key in content.tensors if key.endswith(ending)}
    reports = [replace(read, total=max(len(stems), len(live)))]
    if not live:
        reports = [replace(read, problems=(*read.problems[:1], "no LoRA module that any reader knows is in it"))]
    elif base is not None:
        reports.append(compare_through_diffusers(path, base, live))
    return VerificationReport(tuple(reports))


_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha")


def _family(content: TensorFile, kohya: bool) -> str:
    """The family whose name map knows most of the keys; between SD 1.x and 2.x the text's width decides."""
    maps = {family: ReaderKeys(family) for family in FAMILIES}
    found = {family: (each.kohya if kohya else each.peft)(content)[0] for family, each in maps.items()}
    best = max(FAMILIES, key=lambda family: len(found[family]))
    widths = {a.shape[1] for module, (a, _, _) in found[best].items() if module.endswith("attn2.to_k")}
    return "sd2" if best == "sd1" and 1024 in widths else best


def _unusual(live: Factors, shapes: Mapping[str, torch.Size]) -> bool:
    """Is no module of the file of the shape that the released model has?"""
    made = {module: (b.shape[0], *a.shape[1:]) for module, (a, b, _) in live.items() if module in shapes}
    return not any(shape == tuple(shapes[module]) for module, shape in made.items())


def verify_folder(folder: str | Path, model: StableDiffusion | None = None) -> VerificationReport:
    """Compare the files of an adapter folder with what `adapter.json` recorded of the weights, and with one another.

    With a `model` the shapes must fit it too, and both files are also loaded through diffusers' own loader into it (and
    removed again).

    Raises:
        UserError: no adapter folder, unreadable files, or a `model` of another family or with an adapter loaded.
    """
    folder = Path(folder)
    family, twin, strength, digests, source, concepts = _manifest(folder / MANIFEST)
    if model is not None and model.family != family:
        raise UserError(
            f"the adapter is for the family {family}, the base {model.name} is {model.family}: name another base"
        )
    names = ReaderKeys(family, None if model is None else model.unet)
    content = read_tensors(folder / DIFFUSERS_FILE)
    live = {module: (a, b, strength) for module, (a, b, _) in names.peft(content)[0].items()}
    reports = [compare_digests(DIFFUSERS_FILE, content.tensors, digests), *compare_files(folder, twin, live, names)]
    if source:
        reports.append(compare_digests(SOURCE_FILE, read_tensors(folder / SOURCE_FILE).tensors, source))
    for name, (token, encoder) in token_files.token_file_names(concepts).items():
        rows = concepts[token] if encoder is None else {encoder: concepts[token][encoder]}
        reports.append(compare_digests(name, token_files.read_concept(folder / name).rows, rows))
    if model is not None:
        reports += [compare_through_diffusers(folder / file, model, live) for file in (DIFFUSERS_FILE, twin)]
    return VerificationReport(tuple(reports))


def _manifest(path: Path) -> tuple[str, str, float, dict[str, str], dict[str, str], dict[str, dict[str, str]]]:
    """Family, name of the twin, alpha / rank, and the digests: of the LoRA, the source embedding and each token."""
    manifest = read_json(path)
    try:
        family, twin = str(manifest["base"]["family"]), str(manifest["twin"])
        strength = float(manifest["alpha"]) / int(manifest["rank"])
        digests, source = dict(manifest["tensors"]), dict(manifest["source_tensors"])
        concepts = {str(token): dict(rows) for token, rows in dict(manifest.get("concepts", {})).items()}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged or of another kind: {error!r}") from error
    if family not in FAMILIES:
        raise UserError(f"{path} is for the family {family[:40]!r}, expected sd1, sd2 or sdxl")
    return family, plain_name(twin), strength, digests, source, concepts


def compare_digests(file: str, tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> FileReport:
    """Compare tensors, bit for bit, with the digests that were taken of them in memory; counts tensors, not modules."""
    wrong = [f"tensor {key} is missing" for key in digests if key not in tensors]
    wrong += [f"tensor {key[:120]} was not in the adapter" for key in tensors if key not in digests]
    found = {key: tensor_digest(tensor) for key, tensor in tensors.items() if key in digests}
    wrong += [f"tensor {key} is not what was saved" for key, value in found.items() if value != digests[key]]
    matched = sum(digests[key] == value for key, value in found.items())
    return FileReport(f"{file} as recorded in {MANIFEST}", matched, len(digests), 0.0, "", tuple(wrong), "tensors")


def tensor_digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of a tensor's shape and bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()[:16]


def compare_through_diffusers(path: Path, model: StableDiffusion | Phantom, live: Factors) -> FileReport:
    """Load the file into `model` with diffusers' own loader, compare what arrived in each layer, and unload it."""
    parts = {"unet": model.unet, **dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))}
    if any(isinstance(module, LoraLayer) for part in parts.values() for module in part.modules()):
        raise UserError("the base model already carries an adapter: unload it before verifying another")
    found: Factors = {}
    pipe = model.pipeline()
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="verify", local_files_only=True)
        for component, part in parts.items():
            for name, layer in part.named_modules():
                if isinstance(layer, LoraLayer):
                    nested = component == "unet" or name.startswith("text_model.")
                    a, b = (side["verify"].weight.detach().cpu() for side in (layer.lora_A, layer.lora_B))  # pyright: ignore
                    path_in_file = name if nested else f"text_model.{name}"
                    found[f"{component}.{path_in_file}"] = (a, b, layer.scaling["verify"])
    except Exception as error:  # whatever the loader raises is the finding
        reason = " ".join(str(error).split())[:200]
        return FileReport(f"{path.name} through diffusers", 0, len(live), 0.0, "", (f"cannot be loaded: {reason}",))
    finally:
        pipe.unload_lora_weights()
    return compare(f"{path.name} through diffusers", found, [], live)


def compare_files(folder: Path, twin: str, live: Factors, names: ReaderKeys) -> list[FileReport]:
    """Reports on both LoRA files of `folder` against the `live` factors."""
    ways = {DIFFUSERS_FILE: names.peft, twin: names.kohya}
    return [compare(file, *read(read_tensors(folder / file)), live, names.shapes) for file, read in ways.items()]


def compare(
    file: str, found: Factors, problems: list[str], live: Factors, shapes: Mapping[str, torch.Size] | None = None
) -> FileReport:
    """Compare ΔW module by module; `problems` already met while reading are passed on."""
    problems, deviations, matched = list(problems), {}, 0
    problems += [f"module {module} is not in the adapter" for module in found if module not in live]
    for module, reference in live.items():
        if module not in found:
            problems.append(f"module {module} is missing")
        elif wrong := _shape_problem(module, found[module], reference, shapes):
            problems.append(wrong)
        else:
            deviations[module] = value = deviation(found[module], reference)
            if value <= TOLERANCE.get(found[module][0].dtype, TOLERANCE[torch.float32]):
                matched += 1
            else:
                problems.append(f"module {module}: ΔW deviates by {value:.1e} of its largest entry")
    worst = max(deviations, key=deviations.__getitem__, default="")
    return FileReport(file, matched, len(live), deviations.get(worst, 0.0), worst, tuple(problems))


def deviation(found: tuple[Tensor, Tensor, float], live: tuple[Tensor, Tensor, float]) -> float:
    """max |ΔW_found − ΔW_live| / max |ΔW_live|; absolute where the live ΔW is zero."""
    (a, b, s), (live_a, live_b, live_s) = found, live
    if s == live_s and torch.equal(a, live_a) and torch.equal(b, live_b):
        return 0.0 if all(bool(tensor.isfinite().all()) for tensor in (a, b)) else float("inf")
    reference = _delta(live_a, live_b, live_s)
    largest = float((_delta(a, b, s) - reference).abs().max())
    value = largest / (float(reference.abs().max()) or 1.0)
    return value if value == value else float("inf")


def _delta(a: Tensor, b: Tensor, strength: float) -> Tensor:
    return (b.detach().float().flatten(1) @ a.detach().float().flatten(1)) * strength


def _shape_problem(
    module: str,
    found: tuple[Tensor, Tensor, float],
    live: tuple[Tensor, Tensor, float],
    shapes: Mapping[str, torch.Size] | None,
) -> str:
    """What is wrong with the shapes (out, in[, k, k]) that a pair makes, or nothing."""
    a, b, _ = found
    if a.ndim != b.ndim or a.ndim not in (2, 4) or a.shape[0] != b.shape[1] or b.shape[2:].numel() != 1:
        return f"module {module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not make a pair"
    made = (b.shape[0], *a.shape[1:])
    expected = (live[1].shape[0], *live[0].shape[1:])
    if shapes is not None and module in shapes:
        expected = tuple(shapes[module])
    return "" if made == expected else f"module {module} has shape {made}, the base model's has {expected}"
