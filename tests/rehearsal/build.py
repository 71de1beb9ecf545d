"""Compile the pretended device, once for each version of its source and of torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NATIVE = Path(__file__).parent / "native"


def obstacle() -> str | None:
    """Why the device cannot be pretended here, or None."""
    if shutil.which("g++") is None:
        return "the pretended device is compiled by g++, which is not installed"
    if "cuda: Optional[str] = None" not in (torch_folder() / "version.py").read_text():
        return "a device is pretended in torch's CPU build; this torch is for CUDA"
    return None


def torch_folder() -> Path:
    """Where torch lies, found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def built(kind: str) -> Path:
    """The shared library of the device `kind`, "cuda" or "mps", for the torch that would be imported."""
    torch, sources = torch_folder(), sorted(NATIVE.iterdir())
    text = "".join(one.read_text() for one in (*sources, torch / "version.py"))
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"pretended-device-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{kind}-{key}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        include = torch / "include"
        subprocess.run(
            ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-DPRETENDED_{kind.upper()}", "-o", str(fresh)]
            + [str(one) for one in sources if one.suffix == ".cpp"]
            + [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
            + [f"-Wl,-rpath,{torch}/lib"],
            check=True,
        )
        fresh.rename(library)
    return library
