"""Kill this program at random moments, fill its disk, and count what is lost.

    python -m tests.bench.torture --kills 200 --output tests/bench/results/torture.jsonl

Each kill is a cell: a signal after a random share of the time that the work takes, then the same work again to its end.
A signal that comes after the end is no kill: the work is begun anew, and taken to be shorter; how long it takes is
measured again after every 20 kills.

Counted are adapters that are not, byte for byte, those of work that nobody interrupted (of saves: neither the old one
nor the new one); files of another program that are gone; hidden files that are left; processes of the killed work that
still live a minute later (whoever loses its parent becomes a child of the bench, so that none is overlooked); and kills
after which more was said than one line.
It resumes where it was interrupted.  The base is a tiny one of random weights: what is tried is not the learning.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from personalize.adapters.adapter import Adapter
from personalize.cli.main import main as personalize
from tests.bench.cells import Cells
from tests.bench.full_disks import full_disk
from tests.bench.kill_place import ROWS, Place, measure, prepared, weights
from tests.bench.kills import GRACE, TooLate, child, finished, hidden, hit, killed, row, theirs
from tests.support.children import adopt_orphans, descendants, living
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny

SHARES = {"training": 5, "saving": 5, "exporting": 3, "catalogue": 1, "processes": 4, "disk": 2}  # of 20 kills
TRIES = 8  # of one kill, if it comes too late
AGAIN = 20  # kills after which durations are measured again


def training(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A training killed at any moment, and resumed."""
    number, output = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), folder / "out"
    files = theirs(output, 0)
    after, said = draw.uniform(0, place.seconds["training"]), folder / "said"
    alive = killed(lambda: personalize(place.training(output)), number, after, said)
    files += theirs(output, 1)
    code = finished(child(lambda: personalize(place.training(output, "--resume_from_checkpoint", "latest"))))
    equal = code == 0 and weights(output) == place.expected["training"]
    return row(equal, files, alive, hidden(output, folder), said, signal=number)


def saving(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A save over an older adapter, killed at any moment, while another program writes into the folder."""
    old, new = (random_adapter(tiny("sd1"), seed=seed) for seed in (0, 1))
    output, began = folder / "mine", time.monotonic()
    hashes = {weights(new.save(folder / "new"))}
    length = time.monotonic() - began
    hashes.add(weights(old.save(output)))
    files, number = theirs(output, 0), draw.choice([signal.SIGKILL, signal.SIGTERM])
    process = child(lambda: new.save(output))
    time.sleep(draw.uniform(0, length))
    files += theirs(output, 1)
    alive = hit(process, number)
    Adapter.load(output)
    equal = weights(output) in hashes
    new.save(output)
    return row(equal and weights(output) in hashes, files, alive, hidden(output, folder), signal=number)


def exporting(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """An export killed at any moment leaves its source and either nothing or a whole file, and works again."""
    source, output = place.root / "whole", folder / "exports" / "cat.safetensors"
    words = ["export", "lora", str(source), "--output", str(output)]
    number = draw.choice([signal.SIGKILL, signal.SIGTERM])
    files = theirs(output.parent, 0)
    after, said = draw.uniform(0, place.seconds.setdefault("exporting", 1.0)), folder / "said"
    alive = killed(lambda: personalize(words), number, after, said)
    whole = not output.exists() or personalize(["verify", str(output)]) == 0
    output.unlink(missing_ok=True)
    began = time.monotonic()
    again = finished(child(lambda: personalize(words))) == 0
    place.seconds["exporting"] = time.monotonic() - began
    equal = whole and again and weights(source) == place.expected["training"]
    return row(equal, files, alive, hidden(output.parent), said, signal=number)


def catalogue(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A catalogue of 20 rows killed at any moment and started again: at most one row is learned twice."""
    number, output = draw.choice([signal.SIGKILL, signal.SIGTERM]), folder / "out"
    files, after, said = theirs(output, 0), draw.uniform(0, place.seconds["catalogue"]), folder / "said"
    alive = killed(lambda: personalize(place.catalogue(output)), number, after, said)
    code = finished(child(lambda: personalize(place.catalogue(output))))
    equal = sum(weights(output / f"n{row}") == place.expected[f"n{row}"] for row in range(ROWS))
    ours = hidden(output, output / "results")
    return row(code == 0 and equal == ROWS, files, alive, ours, said, signal=number, adapters=equal)


def processes(place: Place, folder: Path, draw: random.Random) -> dict[str, Any]:
    """Two processes: at any moment the command, the launcher or one of them is killed; all end, and the run resumes."""
    output = folder / "out"
    start, two = [sys.executable, "-m", "personalize"], ["--num_processes", "2", "--samples_per_update", "2"]
    silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if "processes" not in place.expected:  # sums in another order than in one process
        began = time.monotonic()
        subprocess.run([*start, *place.training(place.root / "two", *two)], check=True, **silent)
        place.seconds["processes"] = time.monotonic() - began
        place.expected["processes"] = weights(place.root / "two")
    words, files = [*start, *place.training(output, *two)], theirs(output, 0)
    with (folder / "said").open("w") as said:
        command = subprocess.Popen(words, stdout=said, stderr=said)
    time.sleep(draw.uniform(0, place.seconds["processes"]))
    alive = descendants()  # the command, the launcher, and the two of the launch, in this order
    if not alive:
        command.wait()
        raise TooLate
    number, victim = draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.randrange(len(alive))
    os.kill(alive[victim], number)
    command.wait()
    remaining = living(GRACE)
    files += theirs(output, 1)
    again = subprocess.run([*words, "--resume_from_checkpoint", "latest"], check=False, **silent)
    equal = again.returncode == 0 and weights(output) == place.expected["processes"]
    more = {"signal": number, "victim": victim, "of": len(alive)}
    return row(equal, files, remaining, hidden(output, folder), folder / "said", **more)


WORK = {"training": training, "saving": saving, "exporting": exporting, "catalogue": catalogue,
        "processes": processes, "disk": full_disk}  # fmt: skip


def main(words: list[str] | None = None) -> dict[str, dict[str, int]]:
    """Kill until there are as many cells as wished, print and return the counts by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--output", type=Path, default=Path("torture.jsonl"))
    options = parser.parse_args(words)
    cells = Cells(options.output, {"seed": options.seed, "torch": torch.__version__})
    order = [kind for kind, share in SHARES.items() for _ in range(share)]
    random.Random(options.seed).shuffle(order)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as root:
        place = prepared(Path(root))
        for number in range(options.kills):
            kind = order[number % len(order)]
            key = f"{kind}-{number}"
            if kind in options.only and key not in cells:
                if number % AGAIN == AGAIN - 1:
                    measure(place)
                print(key, cells.add(key, one_kill(kind, place, Path(root, key), f"{options.seed} {key}")), flush=True)
    return summary(cells)


def one_kill(kind: str, place: Place, folder: Path, seed: str) -> dict[str, Any]:
    """One cell; a kill that comes too late is tried again, on work that is taken to be shorter.

    Raises:
        TooLate: so were all.
    """
    for attempt in range(TRIES):
        with suppress(TooLate):
            place_of_try = folder.with_name(f"{folder.name}-{attempt}")
            place_of_try.mkdir()
            return WORK[kind](place, place_of_try, random.Random(f"{seed} {attempt}"))
        if kind in place.seconds:
            place.seconds[kind] *= 0.8
    raise TooLate


def summary(cells: Cells) -> dict[str, dict[str, int]]:
    """Counts by kind: kills, adapters as they should be, files lost, processes and hidden files left, noisy ends."""
    counts: dict[str, dict[str, int]] = {}
    for key, values in cells.rows.items():
        of_kind = counts.setdefault(key.partition("-")[0], {"kills": 0})
        of_kind["kills"] += 1
        for name in ("equal", "lost", "left", "hidden", "noisy"):
            of_kind[name] = of_kind.get(name, 0) + int(values[name])
    print(*counts.items(), sep="\n")
    return counts


if __name__ == "__main__":
    main()
