"""Output of the command line: characters that cannot be printed, and notices."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from personalize.cli import main as command_line
from personalize.cli.main import main, to_exit_code
from personalize.cli.progress import progress
from personalize.cli.terminal import HIDDEN, PlainConsole, json_text, terminal, visible
from personalize.errors import Notice, UserError
from personalize.io.progress import ticked
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny


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


HOSTILE = "a\x1b[2J\rb\x08\x9b31m\u202ec\x07"  # clears the screen, overwrites, colours, turns the direction of writing
SHOWN = "a\\x1b[2J\\rb\\x08\\x9b31m\\u202ec\\x07"


def test_every_kind_of_hidden_character_is_shown_and_all_others_stay() -> None:
    assert visible(HOSTILE) == SHOWN and visible(SHOWN) == SHOWN
    hidden = "\0\x0b\x0c\x0d\x1f\x7f\x80\x85\x9f\xad\u200b\u200f\u2028\u2029\u2066\ufeff\udc9b\U000e0041"
    assert all(visible(each).startswith("\\") for each in hidden)
    plain = "\ta word\n猫 ä é 👩\u200d🚀 नि\u200dक\u200cख “…”"
    assert visible(plain) == plain


def test_whatever_a_command_prints_is_visible(capsys) -> None:
    """What is printed, notes, consoles of rich and errors."""

    def call() -> int:
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        sys.stdout.writelines([HOSTILE, "\n"])
        warnings.warn(HOSTILE, Notice, stacklevel=1)
        PlainConsole(soft_wrap=True).print(f"[red]{HOSTILE}[/red] :smile:", style="bold")
        raise UserError(HOSTILE)

    assert to_exit_code(call) == 2
    out, err = capsys.readouterr()
    assert not HIDDEN.search(out + err) and out.count(SHOWN) == 3 and err.count(SHOWN) == 1
    assert "Note: a\\x1b[2J b" in err and "personalize: a\\x1b[2J b" in err, "in one line, without \\r"
    assert f"[red]{SHOWN}[/red] :smile:" in out


def test_lines_above_bars_are_visible_and_the_bars_move(monkeypatch) -> None:
    """rich obeys the codes of colours in lines that are printed while its bars are shown."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", stream)
    with terminal():
        with progress(console=PlainConsole(force_terminal=True, width=200)):
            for _ in ticked(range(2), "a [bold] \x1b[31mpart"):
                print("\x1b[8mconcealed")
        assert isinstance(sys.stdout, type(sys.stdout)) and "\x1b[2K" in stream.getvalue(), "the bar's own"
    assert "\\x1b[8mconcealed" in stream.getvalue() and "\x1b[8m" not in stream.getvalue()
    assert "a [bold] \\x1b[31mpart" in stream.getvalue() and sys.stdout is stream


def test_bars_of_tqdm_move_and_texts_do_not(capsys) -> None:
    from tqdm import tqdm

    with terminal():
        for _ in tqdm(range(2), desc="\x1b[31mfile", mininterval=0, file=sys.stderr):
            pass
        print("a", "\rb", file=sys.stderr)
        print("c", "\x1b[A", file=sys.stderr)
    bars, text = capsys.readouterr().err.rsplit("\n", 3)[:2]
    assert "\r\\x1b[31mfile" in bars and "\\r" not in bars
    assert text == "a \\rb"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A folder whose names, captions and metadata hold control characters."""
    place = tmp_path_factory.mktemp("hostile")
    adapter = random_adapter(tiny("sd1"))
    adapter.info["caption"] = HOSTILE
    adapter.save(place / "adapter")
    marks = PngImagePlugin.PngInfo()
    marks.add_text("parameters", f"{HOSTILE}\nSteps: 3")
    Image.new("RGB", (8, 8)).save(place / "picture.png", pnginfo=marks)
    (place / f"{HOSTILE}.yaml").write_text("promt: a")
    (place / "items.csv").write_text(f"image,caption,name\n{HOSTILE}.png,a cat,{HOSTILE}\n", encoding="utf-8")
    return place


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["inspect", "adapter"], 0),
        (["inspect", "adapter", "--json"], 0),
        (["inspect", "picture.png"], 0),
        (["inspect", "picture.png", "--json"], 0),
        (["inspect", f"{HOSTILE}.png"], 2),
        (["verify", HOSTILE], 2),
        (["edit", "adapter", "--prompt", "a", "--output_dir", "out", f"--{HOSTILE}", "1"], 2),
        (["edit", "adapter", "--prompt", "a", "--config", f"{HOSTILE}.yaml"], 2),
        (["train", "single_image", f"{HOSTILE}.png", "--caption", "a", "--output_dir", "out"], 2),
        (["train", HOSTILE], 2),
        (["train", "catalogue", "items.csv", "--output_dir", "out"], 2),
        ([HOSTILE], 2),
    ],
)
def test_commands_show_the_control_characters_of_names_captions_and_metadata(
    hostile: Path, monkeypatch, capsys, words: list[str], code: int
) -> None:
    monkeypatch.chdir(hostile)
    assert main(words) == code
    out, err = capsys.readouterr()
    assert not HIDDEN.search(out + err) and (out or err)
    if "--json" in words:
        json.loads(out)


def test_json_that_is_printed_stays_json(monkeypatch) -> None:
    kinds = [("utf-8", "猫"), ("ascii", "猫"), ("cp1252", "猫"), ("utf-8", HOSTILE), ("utf-8", "\x7f\U000e0041")]
    for encoding, text in kinds:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        printed = visible(json_text({"a": text})).encode(encoding)
        assert json.loads(printed.decode(encoding)) == {"a": text}


def started(words: list[str], folder: Path, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = " ".join([f"'{sys.executable}'", "-m", "personalize", *words, shell])
    settings = {**os.environ, "PYTHONPATH": str(Path(command_line.__file__).parents[2]), **environment}
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, env=settings, capture_output=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("words")
    marks = PngImagePlugin.PngInfo()
    marks.add_itxt("parameters", "猫 “ä” 👩\nSteps: 3")
    Image.new("RGB", (8, 8)).save(place / "猫ä.png", pnginfo=marks)
    return place


LINES = ("inspect 猫ä.png", "inspect 猫ä.png --json", "verify 猫ä", "train 猫", "edit --help")
FAST = {("ascii", LINES[1]), ("cp1252", LINES[3]), ("ascii", LINES[4])}  # each starts an interpreter


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        pytest.param(encoding, line, marks=() if (encoding, line) in FAST else pytest.mark.slow)
        for encoding in ("ascii", "cp1252", "utf-16-le")
        for line in LINES
    ],
)
def test_an_output_that_lacks_characters_gets_their_codes(words: Path, encoding: str, line: str) -> None:
    done = started(line.split(), words, PYTHONIOENCODING=encoding)
    said = done.stdout.decode(encoding) + done.stderr.decode(encoding)
    assert done.returncode == (2 if line[0] in "vt" else 0) and said and "Traceback" not in said
    if "--json" in line:
        assert "猫 “ä”" in json.dumps(json.loads(done.stdout.decode(encoding)), ensure_ascii=False)


@pytest.mark.parametrize(
    ("line", "shell", "code"),
    [
        ("--help", "| head -n 0", 141),
        pytest.param("inspect 猫ä.png", "| head -n 0", 141, marks=pytest.mark.slow),
        ("train 猫", "2>&1 | head -n 0", 141),
        ("--help", ">&-", 0),
        ("train 猫", "2>&-", 2),
        ("--help", "> /dev/full", 2),
        ("train 猫", "2> /dev/full", 2),
    ],
)
def test_an_output_without_a_reader_or_space_ends_quietly(words: Path, line: str, shell: str, code: int) -> None:
    done = started(line.split(), words, shell, PYTHONUNBUFFERED="")
    assert done.returncode == code
    said = done.stderr.decode()
    assert said in ("", "personalize: no space left on device\n") and (not said or "full" in shell)
