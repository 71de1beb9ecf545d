"""`personalize doctor`: what this installation has, what it lacks, and whether it can work here."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import personalize
from personalize.cli.terminal import json_text
from personalize.errors import Mismatch

EXTRA = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")
TIMEOUT = 2.0  # seconds that nvidia-smi may take; a driver in trouble does not answer


class DoctorConfig(Protocol):
    """The options of `personalize doctor [--json]`."""

    @property
    def json(self) -> bool: ...


def run(config: DoctorConfig) -> dict[str, Any]:
    """`personalize doctor`: print versions, devices, memory, missing packages and whether the caches can be written.

    Neither torch nor another heavy library is imported: GPUs are asked of the driver.

    Raises:
        Mismatch: something is wrong (exit code 1).
    """
    found = report()
    print(json_text(found) if config.json else as_text(found))
    if found["problems"]:
        raise Mismatch(f"{len(found['problems'])} problem(s): {'; '.join(found['problems'])}")
    return found


def report() -> dict[str, Any]:
    """What was found, as values that JSON can hold: sizes in bytes, a path's problem or null, versions by package."""
    required, extras = packages()
    devices, folders = gpus(), {name: folder_state(path) for name, path in caches().items()}
    found = {
        "personalize": personalize.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_free": available_memory(),
        "devices": devices,
        "packages": required,
        "extras": extras,
        "folders": folders,
        "offline": os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"),
    }
    return found | {"problems": list(problems(found))}


def packages() -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """For each required package its version and the one asked for; for each extra what it lacks or has too old."""
    required: dict[str, dict[str, Any]] = {}
    missing: dict[str, list[str]] = {}
    for line in requirements():
        text, _, marker = line.partition(";")
        name, extra = re.split(r"[\s<>=!~\[]", text.strip(), maxsplit=1)[0], EXTRA.search(marker)
        version, wanted = installed(name), re.sub(r"^\[.*?\]", "", text.strip()[len(name) :].strip()).strip()
        if extra is None:
            if applies(marker):
                required[name] = {"version": version, "wanted": wanted}
        elif name != "personalize":
            old = version is not None and not _fits(version, wanted)
            lacks = [f"{name}{wanted} ({version} is there)"] if old else [] if version else [name]
            missing.setdefault(extra[1], []).extend(lacks)
    return required, missing


def requirements() -> list[str]:
    """The requirements of this package; of a checkout that is not installed those of its pyproject.toml."""
    try:
        return metadata.requires("personalize") or []
    except metadata.PackageNotFoundError:
        import tomllib

        project = Path(personalize.__file__).parents[1] / "pyproject.toml"
        if not project.is_file():
            return []
        content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        extras = content["optional-dependencies"].items()
        own = [f'{line} ; extra == "{extra}"' for extra, lines in extras for line in lines]
        return [*content["dependencies"], *own]


def applies(marker: str) -> bool:
    """Whether a requirement with this environment marker is one of this system."""
    if not marker.strip():
        return True
    try:
        from packaging.markers import Marker
    except ImportError:
        return True
    return Marker(marker.strip()).evaluate()


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpus() -> list[dict[str, Any]]:
    """The GPUs that can be used, with their memory in bytes, by the driver's own tool; the CPU if there is none."""
    tool = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    lines: list[str] = []
    if tool:
        try:
            done = subprocess.run([tool, *query], capture_output=True, text=True, timeout=TIMEOUT, check=True)
            lines = done.stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            return [{"kind": "cuda", "name": "the driver does not answer", "memory": None, "free": None}]
    rows = [[part.strip() for part in line.split(",")] for line in lines if line.count(",") == 3]
    found: list[dict[str, Any]] = [
        {"kind": "cuda", "name": name, "memory": _mebibytes(total), "free": _mebibytes(free), "driver": driver}
        for name, total, free, driver in rows
    ]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append({"kind": "mps", "name": "Apple GPU", "memory": None, "free": None})
    return found or [{"kind": "cpu", "name": platform.processor() or platform.machine(), "memory": None, "free": None}]


def available_memory() -> int | None:
    """Bytes of main memory that programs can still have; None if nothing tells."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdecimal() else None


def caches() -> dict[str, Path]:
    """The folders that downloads, temporary files and results go to."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return {"models": hub.expanduser(), "temporary": Path(tempfile.gettempdir()), "here": Path.cwd()}


def folder_state(path: Path) -> dict[str, Any]:
    """Where a folder is, its free space in bytes, and what keeps it from being written (None: nothing)."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            problem = None
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
    return {"path": str(path), "free": shutil.disk_usage(there).free, "problem": problem}


def problems(found: dict[str, Any]) -> Iterator[str]:
    """What keeps this installation from working, a line each with the remedy."""
    for name, package in found["packages"].items():
        if package["version"] is None:
            yield f"{name} is missing: pip install '{name}{package['wanted']}'"
        elif not _fits(package["version"], package["wanted"]):
            yield f"{name} is {package['version']}, wanted {package['wanted']}: pip install '{name}{package['wanted']}'"
    for name, folder in found["folders"].items():
        if folder["problem"] is not None:
            yield f"the folder for {name}, {folder['path']}, cannot be written: {folder['problem']}"
    kinds, build = {device["kind"] for device in found["devices"]}, found["packages"].get("torch", {}).get("version")
    if "cuda" in kinds and build and "+cpu" in build:
        yield f"there is a GPU, but torch {build} is a build without CUDA: see pytorch.org for one with it"


def _fits(version: str, wanted: str) -> bool:
    """Whether an installed version is one that is asked for."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    width = max(map(len, [*found["packages"], "temporary", "personalize"])) + 2
    lines = [(key, str(found[key])) for key in ("personalize", "python", "system", "cores")]
    lines += [("free memory", _size(found["memory_free"]))]
    for device in found["devices"]:
        memory = f", {_size(device['free'])} of {_size(device['memory'])} free" if device["memory"] else ""
        lines.append((device["kind"], f"{device['name']}{memory}"))
    for name, package in found["packages"].items():
        lines.append((name, f"{package['version'] or 'MISSING'} (wanted {package['wanted'] or 'any'})"))
    for name, lacks in found["extras"].items():
        lines.append((f"[{name}]", f"without {', '.join(lacks)}" if lacks else "installed"))
    for name, folder in found["folders"].items():
        state = folder["problem"] or "can be written"
        lines.append((name, f"{folder['path']}: {state}, {_size(folder['free'])} free"))
    if found["offline"]:
        lines.append(("offline", "HF_HUB_OFFLINE is set: nothing is downloaded"))
    return "\n".join(f"{key:{width}}{value}" for key, value in lines)


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
