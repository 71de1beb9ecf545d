"""Freed memory is kept while asked for, and given back otherwise."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from personalize import pages
from personalize.lean import lean
from personalize.pages import kept_pages
from tests.tiny import tiny_sd1

# In a process of its own: what other tests have left on the heap may serve as the block.
FAULTS = """
import resource, torch
from personalize.pages import kept_pages

def cleared():
    for use in range(18):
        if use == 16:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = cleared()
with kept_pages():
    print(returned, cleared())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's own ways"
)
def test_speed_freed_pages_are_kept() -> None:
    """Two uses of 64 MiB are 32,768 pages of 4 KiB, or 64 of 2 MiB, which the system clears if it got them back."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, run.stdout.split())
    assert kept < 32 < 64 <= returned


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the C library is told, on whatever system this is."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: calls.append((option, value)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return calls


def test_speed_pages_are_given_back_when_the_outermost_body_raises(told: list[tuple[int, int]]) -> None:
    keep, give = list(pages._KEPT.items()), list(pages._RETURNED.items())
    with pytest.raises(KeyError), kept_pages():
        with kept_pages(False):
            pass
        raise KeyError
    assert told == keep + give + keep + give


def test_speed_a_lean_unet_keeps_its_pages(told: list[tuple[int, int]]) -> None:
    with lean(tiny_sd1().unet):
        assert told == list(pages._KEPT.items())


def test_speed_other_systems_are_left_alone(told: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with kept_pages():
        pass
    assert not told
