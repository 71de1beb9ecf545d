"""Signals end this process tidily, children end with their parent, and a killed process of a launch is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from personalize.cli import launch
from personalize.cli.main import main, to_exit_code
from personalize.cli.processes import end_with_parent, signals_raise
from personalize.errors import Stopped
from tests.support.children import adopt_orphans, descendants
from tests.support.tiny import tiny_folder

ROOT = Path(__file__).parents[2]
ELASTIC = "1127 04:00:00.000000 12 torch/distributed/elastic/api.py:984]"
REPORT = (
    f"W{ELASTIC} Sending process 13 closing signal SIGTERM\n"
    f"E{ELASTIC} failed (exitcode: -9) local_rank: 1 (pid: 14) of binary: python\n"
    "Traceback (most recent call last):\n" + "  File …\n" * 38
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_runs_what_tidies_up(number) -> None:
    tidied = []

    def work() -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            tidied.append(True)
        return 0

    assert to_exit_code(work) == 128 + number and tidied == [True]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_handlers_of_a_program_that_calls_us_stay() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with signals_raise():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_why_it_was_stopped_is_one_line(capsys) -> None:
    def work() -> int:
        raise Stopped(signal.SIGTERM, "stopped after 3 updates")

    assert to_exit_code(work) == 143 and capsys.readouterr().err == "personalize: stopped after 3 updates\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end_with_parent()
            (tmp_path / "child").write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        time.sleep(0.01)
    child = int((tmp_path / "child").read_text())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]:
                break  # ended, and not yet waited for
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{child}").exists()


def launched(monkeypatch, script: str) -> int:
    monkeypatch.setattr(launch, "accelerate_launch", lambda _: [sys.executable, "-c", script])
    monkeypatch.setattr(launch, "environment", lambda _: dict(os.environ))
    return launch.launch(Path("train.py"), [], 2)


def test_a_killed_process_is_one_line_and_not_42(monkeypatch, capfd) -> None:
    said = "another process of this launch has ended after 4 of 9 updates: checkpoint-4 is saved"
    script = f"""
import json, os, sys
sys.stderr.write("a warning\\n"); sys.stderr.flush()
open(os.environ["PERSONALIZE_ERROR_FILE"], "w").write(json.dumps([{said!r}, 2]) + "\\n")
sys.stderr.write({REPORT!r})
sys.exit(1)
"""
    assert launched(monkeypatch, script) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == (
        "personalize: process 1 of 2 was ended by SIGKILL, as the system does when memory is short; all have stopped "
        "after 4 of 9 updates: checkpoint-4 is saved"
    )
    assert set(lines[:-1]) <= {"a warning"}


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("os.kill(os.getpid(), 15)", 143),  # before torch's launcher listens to signals
        ("sys.stderr.write('torch…SignalException: Process 9 got signal: 15\\n'); sys.exit(1)", 143),
        ("sys.stderr.write('failed (exitcode: 130) local_rank: 0 (pid: 9)\\n'); sys.exit(1)", 130),
    ],
)
def test_a_launcher_that_ends_by_a_signal_is_one_line(monkeypatch, capfd, ends: str, code: int) -> None:
    report = "W1127 13:17:53.115000 13696 torch/distributed/elastic/agent/server/api.py:753] Received 15 death signal"
    script = f"import os, sys; sys.stderr.write({report!r} + chr(10)); sys.stderr.flush(); {ends}"
    assert launched(monkeypatch, script) == code
    name = signal.Signals(code - 128).name
    said = f"personalize: stopped by {name}: no file is half-written; the same command begins anew"
    assert capfd.readouterr().err.splitlines() == [said]


def test_what_a_broken_off_import_raises_is_the_stop(capsys) -> None:
    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            raise RecursionError("of a lazy module") from None
        return 0

    assert to_exit_code(work) == 143
    assert capsys.readouterr().err == "personalize: stopped: no file is half-written; the same command begins anew\n"


@pytest.mark.parametrize("wanted", ["", "1"])
def test_a_fault_in_a_process_is_one_line_of_its_launch(monkeypatch, capfd, wanted: str) -> None:
    monkeypatch.setenv("PERSONALIZE_TRACEBACK", wanted)
    script = """
import sys
from personalize.cli.main import to_exit_code
sys.exit(to_exit_code(lambda: 1 // 0))
"""
    assert launched(monkeypatch, script) == 1
    said = capfd.readouterr().err
    assert "a fault of the program: ZeroDivisionError: " in said.splitlines()[-1] and "=1 shows" in said
    assert ("Traceback" in said) == bool(wanted) and (wanted or said.count("\n") == 1)


def test_a_process_that_fails_before_the_program_begins_shows_its_traceback(monkeypatch, capfd) -> None:
    assert launched(monkeypatch, "1 / 0") == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_signal_goes_to_the_launch_and_ends_it(monkeypatch, tmp_path, capfd) -> None:
    script = """
import json, os, signal, sys, time
def stop(*_):
    open(os.environ["PERSONALIZE_ERROR_FILE"], "w").write(json.dumps(["stopped after 2 updates", 2]) + "\\n")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(30)
"""
    assert launched(monkeypatch, script) == 143
    assert capfd.readouterr().err == "personalize: stopped after 2 updates\n"


@pytest.mark.slow  # four interpreters that import torch, and a training in two processes
@pytest.mark.parametrize(
    ("victim", "number"),  # 0 is the command, 1 the launcher, 2 and 3 are what it has started
    [(0, signal.SIGTERM), (0, signal.SIGINT), (0, signal.SIGHUP), (0, signal.SIGKILL), (1, signal.SIGTERM),
     (2, signal.SIGTERM), (3, signal.SIGTERM), (3, signal.SIGKILL)],
)  # fmt: skip
def test_all_processes_end_and_a_checkpoint_is_there(tmp_path, victim, number) -> None:
    tiny_folder("sd1", tmp_path)
    adopt_orphans()
    before, output = set(descendants()), tmp_path / "out"
    words = ["train", "single_image", str(ROOT / "examples" / "quickstart.png"), "--caption", "a cat", "--rank", "2",
             "--targets", "attention", "--pretrained_model_name_or_path", str(tmp_path / "tiny-sd1"), "--preview_steps",
             "0", "--max_train_steps", "2000", "--samples_per_update", "2", "--checkpointing_steps", "20",
             "--validation_steps", "9999", "--num_processes", "2", "--output_dir", str(output)]  # fmt: skip
    command = subprocess.Popen([sys.executable, "-m", "personalize", *words], stderr=subprocess.PIPE, text=True)
    while not list(output.glob("checkpoint-*")):
        time.sleep(0.2)
    os.kill(sorted(set(descendants()) - before)[victim], number)
    said = command.communicate()[1].splitlines()
    deadline = time.monotonic() + 60
    while (remaining := set(descendants()) - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not remaining and list(output.glob("checkpoint-*"))
    if (victim, number) != (0, signal.SIGKILL):  # after which nobody is there to speak
        (line,) = [line for line in said if not line.startswith("Learning: ")]
        assert "is saved, go on with" in line, said


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "replaced", "says"),
    [
        ("edit adapter --prompt cat", "edit.Editor.configured", "are written when all are drawn; the same command"),
        ("edit p.png --source cat --target dog", "edit_image.Editor.configured", "the same command begins anew"),
        ("drag p.png --from 1,2 --to 9,9", "drag.Editor.configured", "when the drag is finished; the same command"),
        ("edit t.csv --output_dir o", "edit_table.edit_one", "stopped in line 2: o has the finished rows; the same"),
        ("quickstart", "quickstart.StableDiffusion.load", "the same command begins anew"),
        ("inspect x.safetensors", "inspect.inspect_file", "no file is half-written; the same command begins anew"),
        ("verify adapter", "verify.verify_folder", "no file is half-written; the same command begins anew"),
        ("convert x.safetensors --to peft --output y", "convert.open_adapter", "no file is half-written; the same"),
        ("evaluate o --results o", "evaluate.read_benchmark", "no file is half-written; the same command begins anew"),
        ("export lora adapter --output y", "personalize.adapters.adapter.Adapter.load", "no file is half-written; the"),
    ],
)
def test_an_interrupt_says_what_is_kept(command, replaced, says, tmp_path, monkeypatch, capsys) -> None:
    """An interrupt left the prompt without a word; a second message does not take the first one's place."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("p.png")
    Path("t.csv").write_text("file,source,target\np.png,cat,dog\n")
    Path("x.safetensors").write_bytes(b"")
    Path("o").mkdir()
    Path("adapter").mkdir()
    Path("adapter", "adapter.json").write_text('{"concepts": {}}')
    commands = "personalize.cli.commands"
    monkeypatch.setattr(f"{commands}.edit_table.Editor.configured", lambda *_, **__: object())
    monkeypatch.setattr(replaced if replaced.startswith("personalize.") else f"{commands}.{replaced}", interrupted)
    assert main([*command.split(), "--quiet"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("personalize: stopped") and says in line, line
