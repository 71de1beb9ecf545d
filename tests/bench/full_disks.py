"""Disks that are too small, or that another program fills: small tmpfs, which only a user who may mount can make."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from personalize.cli.main import main as personalize
from personalize.cli.main import to_exit_code
from tests.bench.kill_place import Place, weights
from tests.bench.kills import GRACE, child, finished, hidden, row, theirs
from tests.support.children import living
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny

PAGE = 4096  # bytes, of which a tmpfs has a whole number


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Run the body with the folder a disk of `size` bytes, empty, in whole pages."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // PAGE * PAGE}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disk(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A training, a save over an older adapter, or an export, for which the disk has not enough room."""
    return draw.choice([training, saving, exporting])(place, folder, draw)


def training(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A disk that is too small, or that another program fills while it trains: refused before, or saved elsewhere."""
    room = draw.choice([1, 2, 4, 8])  # MB
    with small_disk(folder / "disk", room * 2**20) as disk:
        output = disk / "out"
        said = folder / "said"
        process = child(lambda: (os.chdir(folder), personalize(place.training(output)))[1], said)
        time.sleep(draw.uniform(0, place.seconds["training"]))
        with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(PAGE)):
                pass
        code, alive = finished(process), living(GRACE)
        kept = [weights(path) for path in (output, *folder.glob("*-rescued*"))]
        begun = any(output.glob("checkpoint-*"))
    refused = code == 2 and not any(kept)
    equal = place.expected["training"] in kept or (refused and not begun)
    return row(equal, [], alive, 0, said, work="training", room=room, refused=refused, begun=begun)


def saving(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A save over an older adapter: the old one stays as it was, or the new one is there, whole."""
    old, new = (random_adapter(tiny("sd1"), seed=seed) for seed in (0, 1))
    hashes = [weights(adapter.save(folder / name)) for name, adapter in (("old", old), ("new", new))]
    needed = sum(file.stat().st_size for file in (folder / "new").rglob("*") if file.is_file())
    room = int(needed * draw.uniform(1.1, 2.6))  # for the old one, and none to all of the new one
    with small_disk(folder / "disk", room) as disk:
        output = disk / "mine"
        old.save(output)
        files, said = theirs(output, 0), folder / "said"
        code = finished(child(lambda: to_exit_code(lambda: int(not new.save(output))), said))
        equal = weights(output) == hashes[0 if code else 1] and code in (0, 2)
        return row(equal, files, living(GRACE), hidden(disk, output), said, work="saving", room=room, refused=code == 2)


def exporting(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """An export: no file, or the whole one; its source stays as it was."""
    source, whole, said = place.root / "whole", folder / "whole" / "cat.safetensors", folder / "said"
    personalize(["export", "lora", str(source), "--output", str(whole), "--quiet"])
    room = int(whole.stat().st_size * draw.uniform(0.1, 1.6))
    with small_disk(folder / "disk", room) as disk:
        output = disk / "cat.safetensors"
        files = theirs(disk, 0)
        code = finished(child(lambda: personalize(["export", "lora", str(source), "--output", str(output)]), said))
        there = output.exists() and output.read_bytes() == whole.read_bytes()
        right = there if code == 0 else code == 2 and not output.exists()
        equal = right and weights(source) == place.expected["training"]
        return row(equal, files, living(GRACE), hidden(disk), said, work="exporting", room=room, refused=code == 2)
