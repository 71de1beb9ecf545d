"""The launchable scripts: where they are, and running one in several processes through `accelerate launch`.

In a checkout the checkout's own `train/`, `export/` and `configs/` are used, in an installed wheel the copies in
`personalize/_launch/`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from personalize.errors import UserError

PACKAGE = Path(__file__).parent
ERROR_FILE = "PERSONALIZE_ERROR_FILE"  # environment: where a launched process leaves its one-line error


def home() -> Path:
    """The folder that holds `train/`, `export/` and `configs/`."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else PACKAGE / "_launch"


def scripts(room: str) -> dict[str, Path]:
    """Name → file of every script in `room`."""
    return {path.stem: path for path in sorted((home() / room).glob("*.py"))}


def presets(name: str) -> dict[str, Path]:
    """Preset → file of every `configs/PRESET/<name>.yaml`."""
    return {path.parent.name: path for path in sorted((home() / "configs").glob(f"*/{name}.yaml"))}


def summary(script: Path) -> str:
    """The first line of a script's docstring, read without running it."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def load_script(path: Path) -> ModuleType:
    """The module of a script with its `Config` and `main`, not run as `__main__`."""
    name = f"{path.parent.name}.{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and the help texts look for their source
    spec.loader.exec_module(module)
    return module


def process_count(values: Sequence[str]) -> int:
    """The last of the values given for `--num_processes`, 1 if there is none."""
    text = values[-1] if values else "1"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--num_processes must be a whole number from 1, got {text}")
    return int(text)


def launch(script: Path, args: Sequence[str], processes: int) -> int:
    """Run `script` in several processes; their exit code, and their one-line error printed once.

    The first process that fails with a mistake of the user leaves its line in a file; from then on the launcher's own
    report about the failed process is withheld, since the line says it.
    """
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors")
        process = subprocess.Popen(
            [*accelerate_launch(processes), str(script), *args],
            env=environment(processes) | {ERROR_FILE: str(errors)},
            stderr=subprocess.PIPE,
        )
        try:
            _pass_on(process, errors)
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the signal too
            raise
        if code and errors.exists():
            first = json.loads(errors.read_text(encoding="utf-8").splitlines()[0])
            return complain(first)
        return code


def accelerate_launch(processes: int) -> list[str]:
    """The launcher's own command line; every value is given, so that it has nothing to warn about."""
    size = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, *size, "--mixed_precision", "no", "--dynamo_backend", "no"]


def environment(processes: int) -> dict[str, str]:
    """This environment, with the cores shared out, this package importable, and gloo in use without accelerators."""
    import torch

    devices = torch.accelerator.device_count()
    if 0 < devices < processes:
        raise UserError(f"--num_processes {processes} needs as many accelerators, found {devices}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    chosen = {"OMP_NUM_THREADS": str(max(1, cores // processes)), "PYTHONPATH": path}
    return os.environ | chosen | ({} if devices else {"ACCELERATE_USE_CPU": "true"})


def complain(message: str) -> int:
    """Print a user's mistake as one line on stderr, or leave it to the launching parent; exit code 2."""
    line = " ".join(message.split())
    if ERROR_FILE in os.environ:
        with open(os.environ[ERROR_FILE], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    else:
        print(f"personalize: {line}", file=sys.stderr)
    return 2


def _pass_on(process: subprocess.Popen[bytes], errors: Path) -> None:
    """Copy the processes' stderr to ours as it comes, until one of them has left an error."""
    assert process.stderr is not None
    while chunk := os.read(process.stderr.fileno(), 65536):
        if not errors.exists():
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()
