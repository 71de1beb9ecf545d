"""Finding the scripts of `train/` and `export/`, and running one in several processes through `accelerate launch`.

In a checkout of the repository its own `train/`, `export/` and `configs/` are used, in an installed wheel the copies in
`personalize/_launch/`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

from personalize.cli.faults import traceback_wanted
from personalize.errors import UserError
from personalize.io.json_files import checked, parse_json
from personalize.io.signals import ending_signals_handled

PACKAGE = Path(__file__).parents[1]
ERROR_FILE = "PERSONALIZE_ERROR_FILE"  # environment variable: file for the one-line error of a launched process
REPORT = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.MULTILINE)  # the launcher's, about failed processes
KILLED = re.compile(r"failed \(exitcode: -(\d+)\) local_rank: (\d+)")
ENDED = re.compile(  # the launcher itself was ended by a signal, or a process by one before it could say so
    r"SignalException: Process \d+ got signal: (\d+)|failed \(exitcode: (129|130|143)\)"
)
PROGRESS = re.compile(r"after \d+ of .*")
GRACE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}  # seconds to save a checkpoint after a signal; torch's own: 30
NOTHING_KEPT = "no file is half-written; the same command begins anew"


def scripts_home() -> Path:
    """The folder that holds `train/`, `export/` and `configs/`."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else PACKAGE / "_launch"


def scripts(folder: str) -> dict[str, Path]:
    """Every script in `folder`, "train" or "export": name → file."""
    return {path.stem: path for path in sorted((scripts_home() / folder).glob("*.py"))}


def presets(name: str) -> dict[str, Path]:
    """The presets of the script `name`, which are the files `configs/PRESET/<name>.yaml`: preset → file."""
    return {path.parent.name: path for path in sorted((scripts_home() / "configs").glob(f"*/{name}.yaml"))}


def summary(script: Path) -> str:
    """The first line of a script's docstring; the script is parsed, not run."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def load_script(path: Path) -> ModuleType:
    """Import a script as a module, with its `Config` and `main`; its `__main__` part does not run."""
    name = f"{path.parent.name}.{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and tyro look here for the module of a class
    spec.loader.exec_module(module)
    return module


def process_count(values: Sequence[str]) -> int:
    """The number given with `--num_processes`, of several the last, by default 1; UserError if it is no number."""
    text = values[-1] if values else "1"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--num_processes must be a whole number from 1, got {text}")
    return int(text)


def launch(script: Path, args: Sequence[str], processes: int) -> int:
    """Run `script` in several processes, print one line if one fails, and return the exit code.

    A process that fails through a mistake of the user writes its line into a file.  From then on the launcher's own
    report of the failed processes is not shown, because the line says what is wrong.  A signal to this process ends all
    of them: SIGINT, SIGTERM and SIGHUP once they have saved a checkpoint, and at once if it comes again; after SIGKILL
    the operating system tells them.
    """
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors")
        process = subprocess.Popen(
            [*accelerate_launch(processes), str(script), *args],
            env=environment(processes) | {ERROR_FILE: str(errors)},
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's signals reach them through us, in order
        )
        with forwarded(process) as received:
            report = _pass_on(process, errors)
            code = process.wait()
        lines = errors.read_text(encoding="utf-8").splitlines() if errors.exists() else []
        first, failed = checked(parse_json(lines[0], errors), tuple[str, int], errors) if lines else ("", 0)
        if received:
            return report_error(first or f"stopped by {_name(received[0])}: {NOTHING_KEPT}", 128 + received[0])
        if killed := KILLED.search(report):
            return report_error(_about_killed(int(killed[2]), int(killed[1]), processes, first))
        if number := _ended_by(code, report):
            return report_error(first or f"stopped by {_name(number)}: {NOTHING_KEPT}", 128 + number)
        if code and (not first or traceback_wanted()):
            sys.stderr.write(report)
        if code and first:
            return report_error(first, failed)
        return code


def _about_killed(rank: int, number: int, processes: int, said: str) -> str:
    """For the message: the process `rank` was ended by the signal `number`, and what another said before it ended."""
    name = _name(number)
    cause = ", as the system does when memory is short" if name == "SIGKILL" else ""
    progress = PROGRESS.search(said)  # of the main process, which may have saved a checkpoint
    stopped = (
        said if said.startswith("stopped") else f"stopped {progress[0]}" if progress else f"stopped: {NOTHING_KEPT}"
    )
    return f"process {rank} of {processes} was ended by {name}{cause}; all have {stopped}"


def _ended_by(code: int, report: str) -> int:
    """The signal that ended the launcher, before it listened to signals or after, or a process of it; 0 if none did."""
    found = ENDED.search(report)
    return -code if code < 0 else int(found[1] or int(found[2]) - 128) if found else 0


def _name(number: int) -> str:
    """ "SIGTERM" for 15."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


@contextmanager
def forwarded(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Run the body so that signals that would end us end `process` and what it has started; yields their numbers."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL if received else signal.SIGTERM)
        received.append(number)

    with ending_signals_handled(forward):
        yield received


def accelerate_launch(processes: int) -> list[str]:
    """The command line of `accelerate launch`; all values are given, so that it does not warn about defaults."""
    size = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "personalize.cli.launched"]
    return [*launcher, *size, "--mixed_precision", "no", "--dynamo_backend", "no"]


def environment(processes: int) -> dict[str, str]:
    """Environment of the launched processes: cores divided, this package importable, device chosen, time to save."""
    import torch

    devices = torch.accelerator.device_count()
    if 0 < devices < processes:
        raise UserError(f"--num_processes {processes} needs as many accelerators, found {devices}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "PYTHONPATH": path}
    return GRACE | os.environ | settings | ({} if devices else {"ACCELERATE_USE_CPU": "true"})


def report_error(message: str, code: int = UserError.exit_code) -> int:
    """Print `message` as one line on stderr, or in a launched process write it to `ERROR_FILE`; returns `code`."""
    line = " ".join(message.split())
    if ERROR_FILE in os.environ:
        with open(os.environ[ERROR_FILE], "a", encoding="utf-8") as file:
            file.write(json.dumps([line, code]) + "\n")
    else:
        print(f"personalize: {line}", file=sys.stderr)
    return code


def _pass_on(process: subprocess.Popen[bytes], errors: Path) -> str:
    """Copy the stderr of `process` to ours as it arrives, until a launched process has failed; returns the rest.

    It has failed if it has written the file `errors`, or if the launcher begins its own report.
    """
    assert process.stderr is not None
    text = ""
    while chunk := os.read(process.stderr.fileno(), 65536):
        text += chunk.decode(errors="replace")
        if errors.exists() or REPORT.search(text):
            continue
        shown = text.rfind("\n") + 1 or len(text)  # a line of the report may have come in part
        sys.stderr.write(text[:shown])
        sys.stderr.flush()
        text = text[shown:]
    return text
