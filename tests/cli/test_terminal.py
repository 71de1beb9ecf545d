"""Output of the command line: characters that cannot be printed, and notices."""

from __future__ import annotations

import io
import sys
import warnings

import pytest

from personalize.cli.terminal import terminal
from personalize.errors import Notice


@pytest.mark.parametrize(("encoding", "printed"), [("ascii", b"\\u732b \\xe4"), ("latin-1", b"\\u732b \xe4")])
def test_characters_that_cannot_be_printed_are_their_codes(
    monkeypatch: pytest.MonkeyPatch, encoding: str, printed: bytes
) -> None:
    """A remark that cannot be printed ended the training with a traceback."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with terminal():
        print("猫 ä", end="")
    assert stream.buffer.getvalue() == printed and stream.errors == "strict"  # type: ignore[attr-defined]


def test_a_notice_is_one_line_printed_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    show = warnings.showwarning
    with terminal():
        for text in ("one\n two", "one\n two", "three"):
            warnings.warn(text, Notice, stacklevel=1)
        monkeypatch.setenv("RANK", "1")
        warnings.warn("four", Notice, stacklevel=1)
    assert capsys.readouterr().err == "Note: one two\nNote: three\n" and warnings.showwarning is show
