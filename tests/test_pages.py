"""Freed memory is kept while asked for, and given back otherwise."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from personalize.lean import lean
from personalize.pages import kept_pages
from tests.tiny import tiny_sd1

resource = pytest.importorskip("resource")
BLOCK = 2**26  # bytes; glibc maps every block above 2²⁵ anew
HUGE = 2 * BLOCK // 2**21  # pages of two blocks if all of them are of 2 MiB
FEW = HUGE // 2


def cleared() -> int:
    """Pages that the system had to provide for two more uses of a block, after enough of them to find its place."""

    def used() -> None:
        torch.empty(BLOCK, dtype=torch.uint8).fill_(1)

    for _ in range(16):
        used()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    used()
    used()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's own ways"
)


@glibc
def test_speed_freed_pages_are_kept_and_then_given_back() -> None:
    """Two uses are 32,768 pages of 4 KiB, or 64 of 2 MiB."""
    with kept_pages():
        assert cleared() < FEW
        with kept_pages(False):
            assert cleared() >= HUGE
        assert cleared() < FEW
    with pytest.raises(KeyError), kept_pages():
        raise KeyError
    assert cleared() >= HUGE


@glibc
def test_speed_a_lean_unet_keeps_its_pages() -> None:
    with lean(tiny_sd1().unet):
        assert cleared() < FEW


def test_speed_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    with kept_pages():
        pass
