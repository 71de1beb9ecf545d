"""Verify adapter files: read them as other programs do, compute every weight update ΔW, and compare it with ours.

    ΔW = (alpha / r) · B A

Keys are mapped to modules by `reader_keys`, which shares no code with the modules that write the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.errors import UserError
from personalize.formats import layouts, textual_inversion_files
from personalize.formats.adapter_folders import DIFFUSERS_FILE, MANIFEST, SOURCE_FILE
from personalize.formats.integrity import NO_HASHES, absurd_weight, changed_files, header_problems, same_numbers
from personalize.formats.layer_sizes import require_fitting
from personalize.formats.manifest import read_manifest, tensor_digest
from personalize.formats.reader_keys import Factors, ReaderKeys
from personalize.formats.verification_report import FileReport, VerificationReport
from personalize.io.progress import ticked
from personalize.io.tensor_files import TensorFile, read_tensors
from personalize.models.config import FAMILIES
from personalize.models.empty import EmptyModel, adaptable_layers, empty_model, parts_of
from personalize.models.lora_modules import is_lora_layer
from personalize.models.quiet import hidden_messages
from personalize.models.stable_diffusion import StableDiffusion

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest allowed |ΔW in the file − ΔW| / max |ΔW|, by the file's dtype: rounding of A, B and their product."""


def verify_file(path: Path, model: StableDiffusion | None = None) -> VerificationReport:
    """Check one LoRA file by itself: every key must name a module, and diffusers must load the same ΔW from it.

    The file is read with the keys of `reader_keys`; then diffusers' own loader reads it into `model` or, without a
    `model`, into one of the released size without weights, if the file's shapes are of that size.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_tensors(path)
    kohya = any(key.startswith("lora_") for key in content.tensors)
    family = model.family if model is not None else _family(content, kohya)
    base = model if model is not None else empty_model(family)
    keys = ReaderKeys(family, base.unet)
    factors, problems = keys.kohya(content) if kohya else keys.peft(content)
    _require_fitting(path, factors, family)
    if model is None and not _any_shape_matches(factors, keys.shapes or {}):
        base, keys = None, ReaderKeys(family)
    report = compare(path.name, factors, [*problems, *header_problems(path, content)], factors, keys.shapes)
    stems = {key.removesuffix(ending) for ending in _ENDINGS for key in content.tensors if key.endswith(ending)}
    reports = [replace(report, total=max(len(stems), len(factors)))]
    if not factors:
        tokens = layouts.classify_tensors(content.tensors).file_kind.startswith("textual inversion")
        reports = [replace(report, problems=(*report.problems[:1], TOKENS if tokens else NOTHING))]
    elif base is not None:
        reports.append(compare_through_diffusers(path, base, factors))
    return VerificationReport(tuple(reports))


TOKENS = "it holds learned tokens and no LoRA, of which alone changes are compared: `personalize inspect` says more"
NOTHING = "it has no LoRA module that any program reads: convert it"
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha")


def _require_fitting(path: Path, factors: Factors, family: str) -> None:
    """UserError unless every ΔW is at most as large as its layer in the family's model."""
    require_fitting(path, {module: {"A": a, "B": b} for module, (a, b, _) in factors.items()}, family)


def _family(content: TensorFile, kohya: bool) -> str:
    """The family that has most of the file's modules; of several (SD 1.x and 2.x), by shapes and header."""
    readers = {family: ReaderKeys(family) for family in FAMILIES}
    factors = {family: (keys.kohya if kohya else keys.peft)(content)[0] for family, keys in readers.items()}
    detected = layouts.detect_family(layouts.classify_tensors(content.tensors), content.metadata)[0]
    return max(FAMILIES, key=lambda family: (len(factors[family]), family == detected))


def _any_shape_matches(factors: Factors, shapes: Mapping[str, torch.Size]) -> bool:
    """True if the ΔW of at least one module has the shape of the released model's weight."""
    updates = {module: (b.shape[0], *a.shape[1:]) for module, (a, b, _) in factors.items() if module in shapes}
    return any(shape == tuple(shapes[module]) for module, shape in updates.items())


def verify_folder(folder: str | Path, model: StableDiffusion | None = None) -> VerificationReport:
    """Compare the files of an adapter folder with the hashes in `adapter.json`, and with one another.

    With a `model`, the shapes must be those of its layers, and diffusers' own loader loads both LoRA files into it (and
    unloads them again).

    Raises:
        UserError: no adapter folder, files that cannot be read, or a `model` that is of another family or already has
            an adapter loaded.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    family, kohya_file = manifest.family, manifest.kohya_file
    if model is not None and model.family != family:
        raise UserError(
            f"the adapter is for the family {family}, the base {model.name} is {model.family}: name another base"
        )
    keys = ReaderKeys(family, None if model is None else model.unet)
    content = read_tensors(folder / DIFFUSERS_FILE)
    expected = {module: (a, b, manifest.scaling) for module, (a, b, _) in keys.peft(content)[0].items()}
    _require_fitting(folder / DIFFUSERS_FILE, expected, family)
    reports = [compare_bytes(folder), compare_digests(DIFFUSERS_FILE, content.tensors, manifest.tensors)]
    reports += compare_files(folder, kohya_file, expected, keys)
    if manifest.source_tensors:
        source = read_tensors(folder / SOURCE_FILE).tensors
        reports.append(compare_digests(SOURCE_FILE, source, manifest.source_tensors))
    for name, (token, encoder) in textual_inversion_files.token_file_names(manifest.concepts).items():
        hashes = manifest.concepts[token] if encoder is None else {encoder: manifest.concepts[token][encoder]}
        reports.append(compare_digests(name, textual_inversion_files.read_concept(folder / name).rows, hashes))
    if model is not None:
        reports += [compare_through_diffusers(folder / file, model, expected) for file in (DIFFUSERS_FILE, kohya_file)]
    return VerificationReport(tuple(reports))


def compare_bytes(folder: Path) -> FileReport:
    """Compare the files of an adapter folder, byte for byte, with the hashes in its manifest, if it has any."""
    changed, count = changed_files(folder)
    note = "" if count else NO_HASHES
    matched, whole = count - len(changed), f"{MANIFEST} and what it lists"
    return FileReport(whole, matched, count, 0.0, "", tuple(changed), "files", note)


def compare_digests(file: str, tensors: Mapping[str, Tensor], hashes: Mapping[str, str]) -> FileReport:
    """Compare tensors, bit for bit, with the hashes recorded when they were saved (`tensor_digest`)."""
    wrong = [f"tensor {key} is missing" for key in hashes if key not in tensors]
    wrong += [f"tensor {key[:120]} was not in the adapter" for key in tensors if key not in hashes]
    computed = {key: tensor_digest(tensor) for key, tensor in tensors.items() if key in hashes}
    wrong += [f"tensor {key} is not what was saved" for key, value in computed.items() if value != hashes[key]]
    matched = sum(hashes[key] == value for key, value in computed.items())
    return FileReport(f"{file} as recorded in {MANIFEST}", matched, len(hashes), 0.0, "", tuple(wrong), "tensors")


def compare_through_diffusers(path: Path, model: StableDiffusion | EmptyModel, expected: Factors) -> FileReport:
    """Load the file into `model` with diffusers' own loader, compare ΔW in every layer, and unload it.

    Raises:
        UserError: `model` already has an adapter loaded.
    """
    parts = parts_of(model)
    if any(is_lora_layer(module) for part in parts.values() for module in part.modules()):
        raise UserError("the base model already carries an adapter: unload it before verifying another")
    if odd := _misfit(parts, expected):  # diffusers would allocate its layers, of whatever rank, before it refuses
        return FileReport(f"{path.name} through diffusers", 0, len(expected), 0.0, "", (odd,))
    loaded: Factors = {}
    pipe = model.pipeline()
    try:
        with hidden_messages():
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="verify", local_files_only=True)
        for component, part in parts.items():
            for name, layer in part.named_modules():
                if is_lora_layer(layer):
                    a, b = (side["verify"].weight.detach().cpu() for side in (layer.lora_A, layer.lora_B))  # pyright: ignore
                    loaded[_module(component, name)] = (a, b, layer.scaling["verify"])
    except Exception as error:  # an error of the loader, of whatever type, is a result and not a failure of the check
        reason = " ".join(str(error).split())[:200]
        return FileReport(f"{path.name} through diffusers", 0, len(expected), 0.0, "", (f"cannot be loaded: {reason}",))
    finally:
        pipe.unload_lora_weights()
    return compare(f"{path.name} through diffusers", loaded, [], expected)


def _module(component: str, path: str) -> str:
    """The name in files of the layer at `path`, where newer versions of transformers leave out `text_model.`."""
    nested = component == "unet" or path.startswith("text_model.")
    return f"{component}.{path}" if nested else f"{component}.text_model.{path}"


def _misfit(parts: Mapping[str, Any], factors: Factors) -> str:
    """The first module whose ΔW has not the sides of its layer in the model's `parts`; "" if all fit."""
    sides = {}
    for component, part in parts.items():
        for path, layer in adaptable_layers(part):
            sides[_module(component, path)] = (len(layer.weight), layer.weight[0].numel())
    for module, (a, b, _) in factors.items():
        if module in sides and sides[module] != (len(b), a[0].numel()):
            return f"is not loaded: module {module} changes {(len(b), a[0].numel())}, the base has {sides[module]}"
    return ""


def compare_files(folder: Path, kohya_file: str, expected: Factors, keys: ReaderKeys) -> list[FileReport]:
    """Compare both LoRA files of `folder`, diffusers' and kohya's, with the `expected` matrices."""
    readers = {DIFFUSERS_FILE: keys.peft, kohya_file: keys.kohya}
    return [compare(file, *read(read_tensors(folder / file)), expected, keys.shapes) for file, read in readers.items()]


def compare(
    file: str, found: Factors, problems: list[str], expected: Factors, shapes: Mapping[str, torch.Size] | None = None
) -> FileReport:
    """Compare ΔW module by module.

    Args:
        file: the file's name in the report.
        found: the matrices read from the file.
        problems: those met in reading, which become part of the report.
        expected: the matrices that should be in it.
        shapes: the shape of every layer's weight in the base model, if it is known.
    """
    problems, deviations, matched = list(problems), {}, 0
    problems += [f"module {module} is not in the adapter" for module in found if module not in expected]
    problems += [f"module {module} has {text}" for module, factors in found.items() if (text := absurd_weight(factors))]
    for module, reference in ticked(expected.items(), "Verifying"):
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
    return FileReport(file, matched, len(expected), deviations.get(worst, 0.0), worst, tuple(problems))


def deviation(found: tuple[Tensor, Tensor, float], expected: tuple[Tensor, Tensor, float]) -> float:
    """max |ΔW_found − ΔW| / max |ΔW|, the absolute deviation where ΔW is zero, ∞ for numbers that are not finite."""
    (a, b, scaling), (expected_a, expected_b, expected_scaling) = found, expected
    if scaling == expected_scaling and same_numbers(a, expected_a) and same_numbers(b, expected_b):
        return 0.0 if all(bool(tensor.float().isfinite().all()) for tensor in (a, b)) else float("inf")
    reference = _weight_update(*expected)
    largest = float((_weight_update(*found) - reference).abs().max())
    value = largest / (float(reference.abs().max()) or 1.0)
    return value if value == value else float("inf")


def _weight_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """ΔW = scaling · B A as a matrix (out, in·k·k)."""
    return (b.detach().float().flatten(1) @ a.detach().float().flatten(1)) * scaling


def _shape_problem(
    module: str,
    found: tuple[Tensor, Tensor, float],
    expected: tuple[Tensor, Tensor, float],
    shapes: Mapping[str, torch.Size] | None,
) -> str:
    """What is wrong with the shape (out, in[, k, k]) of a module's ΔW; "" if nothing is."""
    a, b, _ = found
    if a.ndim != b.ndim or a.ndim not in (2, 4) or a.shape[0] != b.shape[1] or b.shape[2:].numel() != 1:
        return f"module {module}: A {tuple(a.shape)} and B {tuple(b.shape)} do not make a pair"
    shape = (b.shape[0], *a.shape[1:])
    required = (expected[1].shape[0], *expected[0].shape[1:])
    if shapes is not None and module in shapes:
        required = tuple(shapes[module])
    return "" if shape == required else f"module {module} has shape {shape}, the base model's has {required}"
