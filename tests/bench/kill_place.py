"""The place of the bench of kills: a tiny base, pictures, a table, and the results of work that nobody interrupted."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from personalize.cli.main import main as personalize
from personalize.formats.adapter_folders import DIFFUSERS_FILE
from personalize.formats.verification import verify_folder
from tests.bench.kills import child, finished
from tests.support.tiny import tiny_folder

ROWS = 20
LEARNING = ["--targets", "attention", "--rank", "2", "--preview_steps", "0", "--samples_per_update", "1"]


@dataclass
class Place:
    """A folder with a tiny base, pictures, a table, and the results of work that nobody interrupted."""

    root: Path
    seconds: dict[str, float]
    expected: dict[str, str]

    def training(self, output: Path, *more: str) -> list[str]:
        words = ["train", "single_image", str(self.root / "0.png"), "--caption", "a cat", *self._base(output)]
        return [*words, "--max_train_samples", "8", "--checkpointing_steps", "1", *more]

    def catalogue(self, output: Path) -> list[str]:
        words = ["train", "catalogue", str(self.root / "items.csv"), *self._base(output)]
        return [*words, "--max_train_samples", "1"]

    def _base(self, output: Path) -> list[str]:
        base = ["--pretrained_model_name_or_path", str(self.root / "tiny-sd1"), "--output_dir", str(output)]
        return [*base, *LEARNING]


def prepared(root: Path) -> Place:
    """Make the place, and do each work once."""
    tiny_folder("sd1", root)
    for number in range(ROWS):
        Image.new("RGB", (64, 64), (10 * number, 80, 60)).save(root / f"{number}.png")
    rows = [f"{number}.png,a cat,n{number}" for number in range(ROWS)]
    (root / "items.csv").write_text("\n".join(["image,caption,name", *rows]))
    place = Place(root, {}, {})
    measure(place)
    place.expected = {"training": weights(root / "whole")}
    place.expected |= {f"n{number}": weights(root / "rows" / f"n{number}") for number in range(ROWS)}
    return place


def measure(place: Place) -> None:
    """Do each work of one process once, and remember how long it took."""
    for folder in ("whole", "rows"):
        shutil.rmtree(place.root / folder, ignore_errors=True)
    whole, rows = place.root / "whole", place.root / "rows"
    for kind, words in (("training", place.training(whole)), ("catalogue", place.catalogue(rows))):
        began = time.monotonic()
        assert finished(child(lambda words=words: personalize(words))) == 0, kind
        place.seconds[kind] = time.monotonic() - began


def weights(folder: Path) -> str:
    """A hash of the adapter's weights; "" if there is no whole adapter."""
    with suppress(Exception):
        if verify_folder(folder).ok:
            return sha256((folder / DIFFUSERS_FILE).read_bytes()).hexdigest()
    return ""
