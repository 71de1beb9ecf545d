"""The command line's own training process keeps freed memory, or gives all of it back to spare memory; nothing else
changes anybody's allocator.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personalize.cli import launch, main, pages
from personalize.training.config import SingleImageConfig
from personalize.training.single_image import learn
from tests.support.tiny import tiny_sd1

# In a process of its own: what other tests have left on the heap may serve as the block.
FAULTS = """
import resource, torch
from personalize.cli.pages import keep_freed_memory

def cleared():
    for use in range(18):
        if use == 16:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = cleared()
keep_freed_memory()
print(returned, cleared())
"""
SCRIPT = '''"""Train nothing."""

from dataclasses import dataclass
from personalize.cli.main import run_script

@dataclass(frozen=True)
class Config:
    rank: int = 4
    """Rank."""
    offload: bool = False
    """Spare memory."""

def main(config):
    pass

if __name__ == "__main__":
    run_script(Config, main)
'''


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is kept")
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's own ways"
)
def test_speed_freed_pages_are_kept() -> None:
    """Two uses of 64 MiB are 32,768 pages of 4 KiB, or 64 of 2 MiB, which the system clears if it got them back."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, run.stdout.split())
    assert kept < 32 < 64 <= returned


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is set with mallopt(3), on whatever system this is."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: calls.append((option, value)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one script, which does nothing, in `train/` and in `export/`."""
    for folder in ("train", "export"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "nothing.py").write_text(SCRIPT, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"{folder}.nothing", raising=False)
    monkeypatch.setattr(launch, "scripts_home", lambda: tmp_path)
    return tmp_path / "train" / "nothing.py"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["train", "nothing"], True),
        (["--config", "preset.yaml", "train", "nothing", "--rank", "8"], True),
        (["export", "nothing"], None),
        (["train", "nothing", "--offload"], False),
        (["export", "nothing", "--offload"], None),
    ],
)
@pytest.mark.usefixtures("trainer")
def test_speed_only_commands_that_train_keep_memory(
    words: list[str], kept: bool | None, options: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With --offload they give it back: weights that have left would otherwise stay in memory, as free blocks."""
    (tmp_path / "preset.yaml").write_text("rank: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["personalize", *words])
    assert main.main() == 0
    wanted: dict[bool | None, dict[int, int]] = {True: pages._KEEP, False: pages._RETURN}
    assert options == list(wanted.get(kept, {}).items())


def test_speed_a_script_started_by_itself_keeps_memory(
    trainer: Path, options: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard of a script runs in a process of its own unless it is handed its arguments."""
    module = launch.load_script(trainer)
    assert main.run_script(module.Config, module.main, []) == 0 and not options
    monkeypatch.setattr(sys, "argv", [str(trainer)])
    assert main.run_script(module.Config, module.main) == 0
    assert options == list(pages._KEEP.items())


@pytest.mark.usefixtures("trainer")
def test_a_library_alters_no_allocator(options: list[tuple[int, int]]) -> None:
    """Neither learning nor a command line that another program runs."""
    model = tiny_sd1()
    learn(
        model, torch.zeros(1, 3, 32, 32), "a cat", SingleImageConfig(rank=1, samples_per_update=1, max_train_samples=1)
    )
    assert main.main(["train", "nothing"]) == 0
    assert not options


def test_speed_other_systems_and_processes_with_a_gpu_are_left_alone(
    options: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pages.keep_freed_memory()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", "win32")
    pages.keep_freed_memory()
    assert not options
