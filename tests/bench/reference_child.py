"""Run another program's training script and write down when each of its optimiser steps ended.

python -m tests.bench.reference_child MARKS.json SCRIPT.py ARGUMENTS …
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main(marks: Path, script: Path, arguments: list[str]) -> None:
    ends: list[float] = []
    before = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = before(self, *args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return out

    torch.optim.AdamW.step = step  # pyright: ignore
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
    marks.write_text(json.dumps({"ends": ends, "threads": torch.get_num_threads()}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
