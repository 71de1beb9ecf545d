"""Run another program's training script and record when it begins, ends each optimiser step, and has saved.

    python -m tests.bench.speed.reference_child MARKS.json SCRIPT.py ARGUMENTS …

The beginning is when an adapter is added to its UNet; the base model has been loaded by then.  Times are seconds of
`time.perf_counter`.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.loaders import PeftAdapterMixin, StableDiffusionLoraLoaderMixin


def main(file: Path, script: Path, arguments: list[str]) -> None:
    """Run `script` with `arguments`; write the times to `file` as JSON: {"began": […], "steps": […], "saved": […]}."""
    marks: dict[str, list[float]] = {"began": [], "steps": [], "saved": []}

    def record(key: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks[key].append(time.perf_counter())

    def timed(call: Callable[..., Any], *, before: str | None = None, after: str | None = None) -> Callable[..., Any]:
        """`call`, which also records the time before or after it."""

        @wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                record(before)
            result = call(*args, **kwargs)
            if after:
                record(after)
            return result

        return wrapped

    saver = StableDiffusionLoraLoaderMixin
    with (
        patch.object(PeftAdapterMixin, "add_adapter", timed(PeftAdapterMixin.add_adapter, before="began")),
        patch.object(torch.optim.AdamW, "step", timed(torch.optim.AdamW.step, after="steps")),
        patch.object(saver, "save_lora_weights", timed(saver.save_lora_weights, after="saved")),
        patch.object(sys, "argv", [str(script), *arguments]),
    ):
        runpy.run_path(str(script), run_name="__main__")
    file.write_text(json.dumps(marks | {"threads": torch.get_num_threads()}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
