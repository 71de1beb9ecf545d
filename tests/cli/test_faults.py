"""Every exception that ends a command is one line and an exit code, with its traceback if it is asked for."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from personalize.cli.faults import is_out_of_memory, memory_advised
from personalize.cli.main import to_exit_code
from personalize.errors import UserError

CPU = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB of which 1 GiB is free."


def ended(error: BaseException) -> int:
    def call() -> int:
        raise error

    return to_exit_code(call)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("a\n bug"), "ValueError: a bug"),
        (OSError(errno.EBADF, "Bad file descriptor"), "OSError: [Errno 9] Bad file descriptor"),
        (KeyError("k"), "KeyError: 'k'"),
        (AssertionError(), "AssertionError"),
        (RecursionError("x" * 5000), "RecursionError: " + "x" * 300),
        (ExceptionGroup("two", [ValueError("a"), TypeError("b")]), "ExceptionGroup: two (2 sub-exceptions)"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_1(capsys, monkeypatch, error: Exception, says: str) -> None:
    monkeypatch.delenv("PERSONALIZE_TRACEBACK", raising=False)
    assert ended(error) == 1
    line = "personalize: a fault of the program: {} (PERSONALIZE_TRACEBACK=1 shows the traceback, to be reported)\n"
    assert capsys.readouterr().err == line.format(says)


@pytest.mark.parametrize(("error", "code"), [(ValueError("bug"), 1), (UserError("no good"), 2)])
def test_tracebacks_are_shown_if_asked_for(capsys, monkeypatch, error: Exception, code: int) -> None:
    monkeypatch.setenv("PERSONALIZE_TRACEBACK", "1")
    assert ended(error) == code
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):") and said.splitlines()[-1].startswith("personalize: ")


def test_the_place_in_the_package_is_said(capsys) -> None:
    def call() -> int:
        from personalize.models.loading import family

        return len(family(None, 1))

    assert to_exit_code(call) == 1
    assert "a fault of the program in models/loading.py, line " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "the memory of the machine did not suffice: free some"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the memory of the machine did not suffice: free some"),
        (RuntimeError(CPU), "the memory of the machine did not suffice (64 bytes more were asked for): free some"),
        (torch.OutOfMemoryError(CUDA), "the memory of the device did not suffice (2.50 GiB more were asked for): free"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "the memory of the device"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "the memory of the device did not suffice"),
    ],
)
def test_memory_that_does_not_suffice_is_said(capsys, error: Exception, says: str) -> None:
    assert ended(error) == 1 and is_out_of_memory(error)
    said = capsys.readouterr().err
    assert said.startswith(f"personalize: {says}") and said.count("\n") == 1


def test_it_is_found_below_an_error_about_a_file(capsys) -> None:
    """`except Exception` around a library's reader makes "cannot be loaded: " of it, with nothing to do."""

    def call() -> int:
        try:
            raise torch.OutOfMemoryError(CUDA)
        except RuntimeError as error:
            raise UserError("cannot load the base model") from error

    with pytest.raises(UserError, match="^the memory of the device .*2.50 GiB .*: try a smaller --resolution, or"):
        with memory_advised({"resolution": int}):
            call()


@pytest.mark.parametrize("line", ["train single_image {} --caption a", "edit {}/adapter --prompt a"])
def test_a_command_says_which_of_its_options_to_lower(capsys, monkeypatch, tmp_path: Path, line: str) -> None:
    from personalize.cli import main

    def fail(_: object) -> None:
        raise torch.OutOfMemoryError(CUDA)

    picture = Path(__file__).parents[2] / "examples" / "quickstart.png"
    if line.startswith("train"):
        script = main.launch.load_script(main.launch.scripts("train")["single_image"])
        monkeypatch.setattr(script, "main", fail)
        wanted = ["--train_batch_size", "--gradient_checkpointing", "--resolution", "--load_in_4bit"]
    else:
        from personalize.cli.commands import edit

        monkeypatch.setattr(main, "check", lambda _: None)
        monkeypatch.setattr(edit, "run", fail)
        wanted = ["--num_images", "--height and --width", "--mixed_precision bf16"]
    words = line.format(picture).split() + ["--output_dir", str(tmp_path / "out")]
    assert main.main(words) == 1
    said = capsys.readouterr().err
    assert all(option in said for option in wanted) and said.count("\n") == 1


@dataclass
class _Odd(Exception):
    def __str__(self) -> str:
        return "no memory of it"


def test_other_errors_about_memory_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(_Odd()) and not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(UserError("the memory of the device"))
