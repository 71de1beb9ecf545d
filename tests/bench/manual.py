"""The pictures of the manual, made again by the commands that stand beside them.

    python -m tests.bench.manual                    # are they of today's weights and commands?
    python -m tests.bench.manual --run              # about 10 minutes on two idle CPU cores

`examples/pictures/made.json` says by what they were made.  The studio's screenshots are taken by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from PIL import Image

from personalize.models.stable_diffusion import EMBEDDED, StableDiffusion
from tests.bench.world import weights_of

ROOT = Path(__file__).parents[2]
MANUAL, PLACE = ROOT / "examples" / "README.md", ROOT / "examples" / "pictures"
RECORD = PLACE / "made.json"
PICTURES = {  # picture of the manual: what its command writes
    "learned.png": "runs/my-car/reconstruction.png",
    "concepts.webp": "runs/my-pets/attention.png",
    "row-cat.png": "runs/adapters/cat/reconstruction.png",
    "row-fox.png": "runs/adapters/fox/reconstruction.png",
    "edit.webp": "runs/desert/grid.png",
    "auto.webp": "runs/beach/grid.png",
    "photo.webp": "runs/photo/before-after.png",
    "attention.webp": "runs/photo/attention.png",
    "report.webp": "runs/report/nouns.png",
    "kept.webp": "runs/kept/before-after.png",
    "drag-overlay.png": "runs/drag/overlay-001.png",
    "dragged.png": "runs/drag/dragged-001.png",
    "attached.png": "attached.png",
    "plain.png": "plain.png",
    "coverage.webp": "runs/coverage.png",
}
SCREENSHOTS = tuple(f"studio-{tab}.webp" for tab in ("learn", "edit", "photo", "drag", "files"))
BAD_ROW = "train catalogue"  # its table holds a bad row on purpose: exit code 2


@dataclass(frozen=True)
class ManualPictures:
    run: bool = False
    """Run the commands and take their pictures; otherwise say whether that is due."""
    folder: Path | None = None
    """Where the commands run, kept afterwards; what is there already is not made again. Default: a temporary folder."""


def boxes(text: str) -> list[str]:
    """The boxes of commands that the manual's `text` marks as running offline, in their order."""
    return re.findall(r"^```bash\n(# runs here.*?)^```", text, re.MULTILINE | re.DOTALL)


def stamp() -> dict[str, Any]:
    """What the pictures depend on: the embedded model's weights, and the commands with the scripts that they run."""
    commands = "".join(boxes(MANUAL.read_text(encoding="utf-8")))
    commands += "".join((ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"examples/\w+\.py", commands))
    return {"weights": weights_of(StableDiffusion.load(EMBEDDED)), "commands": sha256(commands.encode()).hexdigest()}


def out_of_date(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of `now` differs from what the pictures were made by."""
    return [name for name, value in now.items() if record.get(name) != value]


def make(folder: Path) -> None:
    """Run all boxes in `folder`; the output of each is in `box-N.log`, and a finished one is not run again.

    Raises:
        SystemExit: a command failed.
    """
    if not (folder / "examples").exists():
        shutil.copytree(ROOT / "examples", folder / "examples")
    for number, box in enumerate(boxes(MANUAL.read_text(encoding="utf-8"))):
        log = folder / f"box-{number}.log"
        if log.is_file():
            continue
        print(box, flush=True)
        done = subprocess.run(
            ["bash", "-ec", box], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode != (2 if BAD_ROW in box else 0):
            raise SystemExit(f"exit code {done.returncode}:\n{done.stdout}")
        log.write_text(done.stdout, encoding="utf-8")


def take(pictures: Mapping[str, str], folder: Path) -> None:
    """Put `pictures` of `folder` into the manual; those named .webp are stored as such."""
    for name, made in pictures.items():
        with Image.open(folder / made) as image:
            image.convert("RGB").save(PLACE / name, quality=85)


def main(options: ManualPictures) -> None:
    now = stamp()
    if not options.run:
        stale = out_of_date(json.loads(RECORD.read_text(encoding="utf-8")), now)
        sys.exit(f"The manual's pictures are of other {' and '.join(stale)}: run with --run" if stale else 0)
    with TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        take(PICTURES, folder)
    RECORD.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(ManualPictures, config=(tyro.conf.OmitArgPrefixes,)))
