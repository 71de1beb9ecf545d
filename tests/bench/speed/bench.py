"""Speed of training and sampling as ratios: each optimisation alone, all together, and against diffusers' script.

    python -m tests.bench.speed                                    # every part, on two idle cores or one GPU
    python -m tests.bench.speed --only lora pictures --groups 6    # some parts
    python -m tests.bench.speed --base sd15 --latent 32 --only together --groups 3 # SD 1.5 in shape, random weights

Each arm is one JSON line, appended when its part is finished; finished parts are not measured again.  The machine must
be idle: if other processes use more than half a core, the bench refuses to start.  --force measures anyway; --clock cpu
is then fairer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tests.bench.cells import Cells
from tests.bench.speed.arms import refuse_if_busy, table


@dataclass(frozen=True)
class SpeedBench:
    only: list[str] = field(default_factory=list)
    """Parts to measure; by default all that need no further options."""
    base: str = "embedded"
    """"embedded", "sd15" or "sdxl" (random weights in their shapes), or a folder."""
    latent: int | None = None
    """Side of the latents; by default the base's own."""
    batch: int = 4
    """Samples in an update."""
    rank: int = 16
    """Rank of the LoRA."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the base."""
    groups: int = 20
    """Number of groups of calls in which every arm is timed."""
    calls: int = 1
    """Calls in a group."""
    reference: Path | None = None
    """A diffusers checkout, or its train_dreambooth_lora.py, which part "reference" compares with."""
    steps: int = 30
    """Updates of each run in part "reference", of which the first is left out."""
    clock: Literal["wall", "cpu"] = "wall"
    """Wall clock, or the CPU time of this process."""
    seconds: float | None = None
    """Once a part has taken this long, no further group of it begins."""
    force: bool = False
    """Measure although other processes are running."""
    output_dir: Path = Path("runs/bench/speed")
    """Where BASE-PRECISION-BATCH-LATENT.jsonl and .md go."""


def main(bench: SpeedBench) -> str:
    """Measure the parts that are not finished; returns the table."""
    from tests.bench.speed.parts import DEFAULT, PARTS

    load = refuse_if_busy(bench.force)
    wanted = bench.only or list(DEFAULT)
    if unknown := [name for name in wanted if name not in PARTS]:
        raise SystemExit(f"no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    stamp = {"base": bench.base, "latent": bench.latent, "batch": bench.batch, "rank": bench.rank}
    stamp |= {"mixed_precision": bench.mixed_precision, "threads": torch.get_num_threads()}
    name = "-".join([Path(bench.base).name, bench.mixed_precision, str(bench.batch), str(bench.latent or "native")])
    cells = Cells(bench.output_dir / f"{name}.jsonl", stamp)
    for name in wanted:
        rows = None if f"done/{name}" in cells else _measure(name, PARTS[name], bench)
        for row in rows or ():
            cells.add(f"{name}/{row['part']}/{row['arm']}", row | {"foreign_load": load})
            print(table([row]).splitlines()[-1], flush=True)
        if rows:
            cells.add(f"done/{name}", {})
    text = table([row for key, row in cells.rows.items() if not key.startswith("done/")])
    cells.path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _measure(name: str, part: Callable[[SpeedBench], list[dict[str, Any]]], bench: SpeedBench) -> list[dict[str, Any]]:
    start = time.perf_counter()
    try:
        rows = part(bench)
    except (RuntimeError, MemoryError, NotImplementedError) as error:  # the other parts are still measured
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"part {name} was left out: {reason}", flush=True)
        return []
    return [row | {"wall_s": time.perf_counter() - start, "base": bench.base} for row in rows]
