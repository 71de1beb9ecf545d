"""The command line: checked before torch is imported; a mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from personalize import __version__
from personalize.cli import launch, main, parser
from personalize.cli.options import COMMANDS
from personalize.cli.parser import parse
from personalize.errors import UserError
from personalize.training.stopping import PATIENCE

ROOT = Path(__file__).parents[2]


def python(*args: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own that can import this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | extra
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one trainer, `miniature`, whose preset is `small`, and nothing to export."""
    script = tmp_path / "train" / "miniature.py"
    script.parent.mkdir()
    script.write_text(SCRIPT, encoding="utf-8")
    preset = tmp_path / "configs" / "small" / "miniature.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text("learning_rate: 2e-3\n", encoding="utf-8")
    monkeypatch.setattr(launch, "scripts_home", lambda: tmp_path)
    monkeypatch.delitem(sys.modules, "train.miniature", raising=False)
    return tmp_path


SCRIPT = '''"""Train in miniature."""

from dataclasses import dataclass

from personalize.cli.main import run_script
from personalize.errors import UserError


@dataclass(frozen=True)
class Config:
    rank: int
    """Rank; 13 is refused."""
    learning_rate: float = 1e-4
    """Rate."""


def main(config):
    if config.rank == 14:
        from accelerate import Accelerator

        accelerator = Accelerator()
        line = f"process {accelerator.process_index} of {accelerator.num_processes}\\n"
        print(line, end="", flush=True)  # one write: unbuffered Python writes every argument by itself
        accelerator.wait_for_everyone()
        if accelerator.process_index == 1:
            raise UserError("process 1 does not like\\nrank 14")
        return
    if config.rank == 13:
        raise UserError("rank 13 is bad luck:\\nchoose another")
    print(config)


if __name__ == "__main__":
    raise SystemExit(run_script(Config, main))
'''


def test_help_and_version(capsys: pytest.CaptureFixture[str], room: Path):
    assert main.main(["--version"]) == 0 and capsys.readouterr().out == f"personalize {__version__}\n"
    assert main.main([]) == main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train NAME", *COMMANDS)) and "export NAME" not in text  # nothing to export
    assert main.main(["train", "--help"]) == 0 and "miniature    Train in miniature." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main.main(["train", "miniature", "--help"])
    text = capsys.readouterr().out
    assert "--learning_rate FLOAT" in text and "or a preset: small" in text and "13 is refused" in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("edti", "unknown command edti: did you mean edit?"),
        ("train", "personalize train needs a name: miniature"),
        ("train miniatur", "there is no personalize train miniatur: did you mean miniature?"),
        ("export lora", "this version has nothing to export"),
        ("train miniature", "personalize train miniature needs --rank"),
        ("train miniature --rank 4 --num_processes two", "--num_processes must be a whole number from 1, got two"),
        ("train miniature --rank 13", "rank 13 is bad luck: choose another"),
        ("train miniature --rank 4 --config smal", "--config smal: no such file; presets: small"),
        ("edit folder --prompt a --num_processes 2", "unknown option --num_processes"),
        ("edit folder --promt a", "unknown option --promt: did you mean --prompt"),
        ("quickstart a.png b.png", "b.png is more than the command takes"),
        ("edit a.png --prompt b", "unknown option --prompt"),
        ("edit a.png --target b", "personalize edit needs --source"),
        ("edit a.png --source b --tagret c", "unknown option --tagret: did you mean --target?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], room: Path, line: str, says: str):
    assert main.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("personalize: ") and says in err and err.count("\n") == 1


@pytest.mark.parametrize("line", ["train miniature --rank 4 --config small", "--config small train miniature --rank=4"])
def test_a_script_runs_in_process_with_its_preset(capsys: pytest.CaptureFixture[str], room: Path, line: str):
    assert main.main(line.split()) == 0
    assert capsys.readouterr().out == "Config(rank=4, learning_rate=0.002)\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("no\n  good"), 2, "no good"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "no space left on device: a/b"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.png"), 2, "no such file or directory: x.png"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "permission denied: x"),
        (KeyboardInterrupt(), 130, "stopped: no file is half-written; the same command begins anew"),
    ],
)
def test_what_a_user_can_mend_has_no_traceback(capsys: pytest.CaptureFixture[str], error, code: int, says: str):
    assert main.to_exit_code(lambda: (_ for _ in ()).throw(error)) == code
    assert capsys.readouterr().err == (f"personalize: {says}\n" if says else "")


def test_every_declared_command_is_there():
    for config, target in COMMANDS.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), target
        assert config.__doc__ and config.__dataclass_params__.frozen


def test_every_launchable_script_is_whole():
    names = [(room, path) for room in main.SCRIPT_FOLDERS for path in launch.scripts(room).values()]
    assert names
    for room, path in names:
        script = launch.load_script(path)
        assert script.Config.__dataclass_params__.frozen and callable(script.main), path
        assert launch.summary(path) and "run_script(Config, main)" in path.read_text(encoding="utf-8"), (room, path)


def test_every_option_is_documented():
    files = {path: "Config" for room in main.SCRIPT_FOLDERS for path in launch.scripts(room).values()}
    classes = [(path, name) for path, name in files.items()]
    classes += [(Path(inspect.getfile(config)), config.__name__) for config, _ in COMMANDS.values()]
    shared = {
        "models.config": ("BaseModelOptions", "InferenceOptions"),
        "training.config": ("LoraTrainingConfig", "SingleImageConfig", "MultiConceptConfig"),
        "training.run_options": ("RunOptions", "PriorPreservationOptions"),
    }
    for module, names in shared.items():
        classes += [(ROOT / "personalize" / f"{module.replace('.', '/')}.py", name) for name in names]
    for path, name in classes:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), (path, field.lineno)


def test_every_preset_is_accepted():
    """Every YAML file below configs/ but those for Accelerate itself names a script, and only options of it."""
    scripts = {**launch.scripts("train"), **launch.scripts("export")}
    for path in (launch.scripts_home() / "configs").rglob("*.yaml"):
        if path.parent.name == "accelerate":
            continue
        config = launch.load_script(scripts[path.stem]).Config
        required = [f for f in fields(config) if f.default is f.default_factory is MISSING]
        given = ["1" if parser._is_positional(config, f.name) else f"--{f.name}=1" for f in required]
        assert parse(config, ["--config", str(path), *given], prog=path.stem)


# Processes


def test_parsing_and_help_import_no_torch():
    code = """
import contextlib, io, sys
from personalize.cli import launch, main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for room in main.SCRIPT_FOLDERS:
        for name in launch.scripts(room):
            for args in ([room, name, "--help"], [room, name, "--nonsense"]):
                with contextlib.suppress(SystemExit):
                    main.main(args)
                assert "torch" not in sys.modules, args
    for args in ([], ["--help"], ["edit", "--help"], ["edit", "x"], ["edit", "x.png", "--help"],
            ["edit", "x.png"], ["quickstart", "--help"], ["verify"]):
        with contextlib.suppress(SystemExit):
            main.main(args)
        assert "torch" not in sys.modules, args
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_script_started_by_hand_does_the_same(room: Path, monkeypatch, capsys):
    script = room / "train" / "miniature.py"
    done = python(script, "--rank", "13")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "personalize: rank 13 is bad luck: choose another\n")
    monkeypatch.setattr(sys, "argv", [str(script), "--rank", "4"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code and capsys.readouterr().out == "Config(rank=4, learning_rate=0.0001)\n"


@pytest.mark.slow  # four interpreters that import torch, one after the other
def test_two_processes_share_the_cores_and_pass_on_one_line(room: Path):
    code = f"""
from pathlib import Path
from personalize.cli.launch import launch
raise SystemExit(launch(Path({str(room / "train" / "miniature.py")!r}), ["--rank", "14"], 2))
"""
    done = python("-c", code, PYTHONUNBUFFERED="1")  # the harder case: two processes write at the same moment
    assert (done.returncode, done.stderr) == (2, "personalize: process 1 does not like rank 14\n")
    assert sorted(re.findall(r"process \d of \d", done.stdout)) == ["process 0 of 2", "process 1 of 2"]


def test_environment_of_the_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    chosen = launch.environment(3)
    assert chosen["OMP_NUM_THREADS"] == "2" and chosen["PYTHONPATH"].startswith(str(ROOT))


def test_launched_processes_have_time_to_save(monkeypatch: pytest.MonkeyPatch):
    """torch's launcher killed them 30 s after a signal: an update with its checkpoint, or pictures, may take longer."""
    from torch.distributed.launcher.api import LaunchConfig

    ((name, seconds),) = launch.GRACE.items()
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(name, launch.environment(2)[name])
    waits = getattr(LaunchConfig(1, 1, 2), "shutdown_timeout", 600)  # torch 2.6 cannot be told
    assert waits == int(seconds) > 2 * PATIENCE  # the other processes leave first
    monkeypatch.setenv(name, "5")
    assert launch.environment(2)[name] == "5"


def test_a_launched_process_leaves_its_line_to_the_parent(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "errors"))
    assert launch.report_error("a\nb") == 2 and capsys.readouterr().err == ""
    assert json.loads((tmp_path / "errors").read_text()) == ["a b", 2]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_accelerate_reads_its_configurations(count: int):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{count}_gpu.yaml"))
    assert config.num_processes == count and (config.distributed_type == "MULTI_GPU") == (count > 1)


def test_output_whose_reader_has_gone_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "personalize", "drag", "--help"], stdout=write, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
