"""Load the pretended device, and let torch's Python side know it.

Must be called before torch is imported: torch asks for the hooks of a device once.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from types import SimpleNamespace
from typing import Any

from tests.rehearsal.build import built
from tests.rehearsal.record import RECORD

# what waits for the device inside, because the shape of the result depends on values
SYNCHRONIZING = (
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount",
    "repeat_interleave", "is_nonzero", "_linalg_check_errors",
)  # fmt: skip
TOTAL = 80 << 30
MPS_KERNELS: list[Any] = []  # kept, for a library's kernels go with it


def begin(kind: str, count: int = 1) -> Any:
    """Make torch a build with `count` devices of `kind`, "cuda" or "mps"; returns the shared library."""
    assert "torch" not in sys.modules, "the pretended device must be there before torch is imported"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # bitsandbytes' plain optimisers compile themselves otherwise
    library = ctypes.CDLL(str(built(kind)), mode=ctypes.RTLD_GLOBAL)
    library.pretended_bytes.restype = library.pretended_peak.restype = ctypes.c_int64
    importlib.import_module("torch")
    library.pretended_begin(count)
    for name in _unchecked():
        library.pretended_unchecked(name.encode())
    for name in SYNCHRONIZING:
        library.pretended_synchronizing(f"aten::{name}".encode())
    RECORD.listen(library)
    _cuda(library, count) if kind == "cuda" else _mps(library)
    return library


def _unchecked() -> list[str]:
    """Operators whose own CUDA wrappers do not compare devices, by torch's table of all operators."""
    import torchgen
    import yaml

    file = f"{list(torchgen.__path__)[0]}/packaged/ATen/native/native_functions.yaml"
    with open(file) as stream:
        every = yaml.load(stream, yaml.CSafeLoader)
    return ["aten::" + one["func"].split("(")[0] for one in every if one.get("device_check") == "NoCheck"]


def _cuda(library: Any, count: int) -> None:
    import torch

    from tests.rehearsal import graphs, streams

    try:  # now: its kernels for CUDA are not in torch's CPU build, so that ours are used
        importlib.import_module("bitsandbytes")
    except ImportError:
        pass
    properties = SimpleNamespace(
        name="Pretended GPU", major=9, minor=0, total_memory=TOTAL, multi_processor_count=132, warp_size=32,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    )  # fmt: skip

    def index(device: Any = None) -> int:
        if device is None or isinstance(device, int):
            return library.pretended_current() if device is None else device
        number = torch.device(device).index
        return library.pretended_current() if number is None else number

    def allocated(device: Any = None) -> int:
        return library.pretended_bytes(index(device))

    def reset_peak(device: Any = None) -> None:
        library.pretended_peak(index(device), 1)

    _replace(
        torch.cuda, _lazy_init=lambda: None, init=lambda: None, _initialized=True, is_initialized=lambda: True,
        is_available=lambda: True, _is_compiled=lambda: True, _is_in_bad_fork=lambda: False,
        device_count=lambda: count, current_device=library.pretended_current,
        set_device=lambda device: library.pretended_set(index(device)),
        is_bf16_supported=lambda including_emulation=True: True, get_device_capability=lambda device=None: (9, 0),
        get_device_name=lambda device=None: properties.name, get_device_properties=lambda device=None: properties,
        mem_get_info=lambda device=None: (TOTAL - allocated(device), TOTAL), memory_allocated=allocated,
        memory_reserved=allocated, max_memory_allocated=lambda device=None: library.pretended_peak(index(device), 0),
        max_memory_reserved=lambda device=None: library.pretended_peak(index(device), 0),
        reset_peak_memory_stats=reset_peak, empty_cache=lambda: None, ipc_collect=lambda: None,
    )  # fmt: skip
    streams.install(library, index)
    _generators(index, count)
    graphs.install()


def _generators(index: Any, count: int) -> None:
    import torch

    generators = tuple(torch.Generator(device=f"cuda:{number}") for number in range(count))

    def seed_all(seed: int) -> None:
        for one in generators:
            one.manual_seed(int(seed))

    def set_all(states: Any) -> None:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)

    functions = {
        "manual_seed_all": seed_all, "manual_seed": lambda seed: generators[index()].manual_seed(int(seed)),
        "get_rng_state": lambda device="cuda": generators[index(device)].get_state(),
        "set_rng_state": lambda state, device="cuda": generators[index(device)].set_state(state),
        "get_rng_state_all": lambda: [one.get_state() for one in generators], "set_rng_state_all": set_all,
    }  # fmt: skip
    _replace(torch.cuda, default_generators=generators, **functions)
    _replace(torch.cuda.random, **functions)


def _mps(library: Any) -> None:
    import torch

    generator = torch.Generator(device="mps")
    _replace(torch.backends.mps, is_available=lambda: True, is_built=lambda: True)
    _replace(
        torch.mps, device_count=lambda: 1, synchronize=lambda: RECORD.add("sync", "torch.mps.synchronize"),
        manual_seed=lambda seed: generator.manual_seed(int(seed)), get_rng_state=generator.get_state,
        set_rng_state=generator.set_state, empty_cache=lambda: None, recommended_max_memory=lambda: 16 << 30,
        current_allocated_memory=lambda: library.pretended_bytes(0),
        driver_allocated_memory=lambda: library.pretended_bytes(0), _get_default_mps_generator=lambda: generator,
    )  # fmt: skip

    def attention(
        q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False, **how: Any
    ) -> Any:
        return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, None, **how)[0]

    MPS_KERNELS.append(torch.library.Library("aten", "IMPL"))
    for key in ("MPS", "AutogradMPS"):  # torch chooses a kernel by a table in which the CPU's build has no MPS
        MPS_KERNELS[-1].impl("scaled_dot_product_attention", attention, key)


def _replace(module: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(module, name, value)
