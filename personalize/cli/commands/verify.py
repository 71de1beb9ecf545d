"""`personalize verify`: check an adapter folder or file by an independent reading."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from personalize.cli.terminal import json_text
from personalize.errors import Mismatch, UserError
from personalize.formats.adapter_folders import (
    DIFFUSERS_FILE,
    MANIFEST,
    is_adapter_folder,
    is_diffusers_folder,
    no_adapter,
)
from personalize.formats.adapter_source import fetched, open_adapter
from personalize.formats.coverage import KINDS, ordered_blocks, table_picture
from personalize.formats.diffusion_transformers.checking import require_no_base, verify_transformer_file
from personalize.formats.diffusion_transformers.reading import identify
from personalize.formats.foreign_files import as_lora, read_adapter_file
from personalize.formats.lora_files import factor_pairs
from personalize.formats.manifest import is_part_of_adapter
from personalize.formats.quantized_merge import base_weights, survival_cells, survival_text, survivals
from personalize.formats.verification import verify_file, verify_folder
from personalize.formats.verification_report import VerificationReport
from personalize.io.atomic import write_file
from personalize.io.figures import png
from personalize.io.json_files import read_json
from personalize.models.known_bases import base_here
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion

if TYPE_CHECKING:
    from personalize.cli.options import VerifyConfig


def run(config: VerifyConfig) -> VerificationReport:
    """`personalize verify`: verify an adapter folder or a single file, and print the result.

    If the file belongs to an adapter folder, the whole folder is verified; of a folder that diffusers' training scripts
    have written, its LoRA file.  Without `base`, the base model that the
    adapter names is loaded if it is the embedded model or a local path; nothing is downloaded.

    Raises:
        Mismatch: the files could be read, but something in them is wrong (exit code 1).
        UserError: a file cannot be read.
    """
    path = _checkable(fetched(config.path))
    folder = path.parent if path.is_file() else path
    alone = path.is_file() and not is_part_of_adapter(path)
    if alone and (found := identify(content := open_adapter(path))) is not None:
        require_no_base(path, config.base or config.on_base)
        return _printed(path, verify_transformer_file(path, content, found[0]), checked=True)
    recorded = {} if alone else read_json(folder / MANIFEST).get("base") or {}
    base = config.base or (EMBEDDED if recorded.get("name") == "embedded" else base_here(recorded))
    if config.on_base and base is None:
        raise UserError(f"--on_base {config.on_base} needs the weights of the base: name it with --base")
    model = None if base is None else StableDiffusion.load(base)
    report = verify_file(path, model) if alone else verify_folder(folder, model)
    if config.on_base and model is not None:
        _print_survival(config, model, path if alone else folder / DIFFUSERS_FILE)
    return _printed(path, report, json=config.json, checked=model is not None or (alone and len(report.files) > 1))


def _checkable(path: Path) -> Path:
    """The file or the adapter folder to verify; UserError for any other folder, which says what it is."""
    if not path.is_dir() or (path / MANIFEST).is_file():
        return path
    if is_adapter_folder(path):
        raise UserError(
            f"{path} is a folder of PEFT or of shards, one LoRA file was expected: `personalize convert` makes one of "
            "it, and verifies that"
        )
    if not is_diffusers_folder(path):
        raise UserError(no_adapter(path))
    return path / DIFFUSERS_FILE


def _printed(path: Path, report: VerificationReport, *, checked: bool, json: bool = False) -> VerificationReport:
    """Print the report, beside JSON to the standard error; Mismatch if something in it is wrong.

    `checked` says that the file has been compared with a base model, too.
    """
    output = sys.stderr if json else sys.stdout
    print(report, file=output)
    if not checked:
        print("Checked without a base model: give --base to check shapes and loading by diffusers too.", file=output)
    if not report.ok:
        raise Mismatch(f"{path} does not verify, {sum(len(file.problems) for file in report.files)} problem(s)")
    return report


def _print_survival(config: VerifyConfig, model: StableDiffusion, file: Path) -> None:
    """Print, and draw, what a merge into the base in `config.on_base` leaves of each weight change.

    Raises:
        UserError: the file's changes are no LoRA, or not for this base.
    """
    lora, weights = as_lora(read_adapter_file(file, family=model.family))[0], base_weights(model)
    factors = {module: (a, b, lora.alpha / lora.rank) for module, (a, b) in factor_pairs(lora.state).items()}
    for module, (a, b, _) in factors.items():
        if module not in weights or weights[module].numel() != len(b) * a[0].numel():
            raise UserError(f"{file}: module {module} does not fit {model.name}: name the base it is for with --base")
    base = str(config.on_base)
    found = survivals(factors, weights, base)
    print(json_text([asdict(one) for one in found]) if config.json else survival_text(found, base))
    if config.picture is not None:
        cells = survival_cells(found)
        columns = [kind for kind in KINDS if any(kind == column for _, column in cells)]
        title = f"{file.name}: share of the weight change kept in a base in {base}"
        blocks = ordered_blocks({block for block, _ in cells})
        write_file(config.picture, png(table_picture(blocks, columns, cells, title)))
