"""`personalize verify`: check an adapter folder or file by an independent reading."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from personalize.errors import Mismatch
from personalize.formats.adapter_source import open_adapter
from personalize.formats.diffusion_transformers.checking import require_no_base, verify_transformer_file
from personalize.formats.diffusion_transformers.reading import identify
from personalize.formats.manifest import MANIFEST, is_part_of_adapter
from personalize.formats.verification import VerificationReport, verify_file, verify_folder
from personalize.io.json_files import read_json
from personalize.models.known_bases import base_here
from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion


class VerifyConfig(Protocol):
    """The options of `personalize verify FOLDER [--base MODEL]`."""

    @property
    def path(self) -> str | Path: ...

    @property
    def base(self) -> str | Path | None: ...


def run(config: VerifyConfig) -> VerificationReport:
    """`personalize verify`: verify an adapter folder or a single file, and print the result.

    If the file belongs to an adapter folder, the whole folder is verified.  Without `base`, the base model that the
    adapter names is loaded if it is the embedded model or a local path; nothing is downloaded.

    Raises:
        Mismatch: the files could be read, but something in them is wrong (exit code 1).
        UserError: a file cannot be read.
    """
    path = Path(config.path)
    folder = path.parent if path.is_file() else path
    alone = path.is_file() and not is_part_of_adapter(path)
    if alone and (found := identify(content := open_adapter(path))) is not None:
        require_no_base(path, config.base)
        report, base = verify_transformer_file(path, content, found[0]), True
    elif alone:
        report = verify_file(path, None if config.base is None else StableDiffusion.load(config.base))
        base = config.base or (True if len(report.files) > 1 else None)
    else:
        recorded = read_json(folder / MANIFEST).get("base") or {}
        base = config.base or (EMBEDDED if recorded.get("name") == "embedded" else base_here(recorded))
        report = verify_folder(folder, None if base is None else StableDiffusion.load(base))
    print(report)
    if base is None:
        print("Checked without a base model: give --base to check shapes and loading by diffusers too.")
    if not report.ok:
        raise Mismatch(f"{path} does not verify, {sum(len(file.problems) for file in report.files)} problem(s)")
    return report
