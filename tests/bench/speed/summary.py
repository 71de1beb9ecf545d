"""The tables of `accelerator.sh` as one page: python -m tests.bench.speed.summary FOLDER PAGE."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def page(folder: Path, lines: list[str]) -> str:
    """Markdown: the device, the tables of every run below `folder`, and `lines` that other benches printed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU with {os.cpu_count()} cores"
    parts = ["# On an accelerator", "    bash tests/bench/accelerator.sh DIFFUSERS"]
    parts.append(f"{device}, torch {torch.__version__}.")
    for file in sorted(folder.glob("*/*.md")):
        parts += [f"## {file.parent.name}, {file.stem}", file.read_text(encoding="utf-8").strip()]
    return "\n\n".join([*parts, *lines]) + "\n"


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    others = [file.read_text(encoding="utf-8").strip() for file in sorted(source.glob("*.txt"))]
    target.write_text(page(source, others), encoding="utf-8")
    print(target)
