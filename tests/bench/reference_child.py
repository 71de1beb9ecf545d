"""Run another program's training script and write down when it began, ended each optimiser step, and had saved.

It begins when its UNet gets the adapter: the base is loaded by then.

python -m tests.bench.reference_child MARKS.json SCRIPT.py ARGUMENTS …
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
    marks: dict[str, list[float]] = {"began": [], "steps": [], "saved": []}

    def note(key: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks[key].append(time.perf_counter())

    def noted(call: Callable[..., Any], *, before: str | None = None, after: str | None = None) -> Callable[..., Any]:
        @wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                note(before)
            out = call(*args, **kwargs)
            if after:
                note(after)
            return out

        return wrapped

    saver = StableDiffusionLoraLoaderMixin
    with (
        patch.object(PeftAdapterMixin, "add_adapter", noted(PeftAdapterMixin.add_adapter, before="began")),
        patch.object(torch.optim.AdamW, "step", noted(torch.optim.AdamW.step, after="steps")),
        patch.object(saver, "save_lora_weights", noted(saver.save_lora_weights, after="saved")),
        patch.object(sys, "argv", [str(script), *arguments]),
    ):
        runpy.run_path(str(script), run_name="__main__")
    file.write_text(json.dumps(marks | {"threads": torch.get_num_threads()}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
