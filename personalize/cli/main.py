"""The command line: `personalize train|export NAME …` and the commands of `personalize.cli.options`.

Options are parsed and checked before torch is imported.  A script of `train/` or `export/` defines a frozen dataclass
`Config` and a function `main(config)`; with these last lines it can also be started as a file:

    if __name__ == "__main__":
        raise SystemExit(run_script(Config, main))

Exit codes: 0 done, 1 a file does not verify, 2 a mistake that the user can correct (one line on stderr), 130
interrupted, 128 and the number of another signal that ended it, 141 if the reader of the output has gone.  A fault of
the program, or memory that does not suffice, is one line too and 1; PERSONALIZE_TRACEBACK=1 shows tracebacks.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import personalize
from personalize.cli import launch
from personalize.cli.faults import described, memory_advised, show_traceback
from personalize.cli.options import COMMANDS, resolve_command
from personalize.cli.pages import keep_freed_memory, return_freed_memory
from personalize.cli.parser import HELP, QUIET, option_types, parse, take_option
from personalize.cli.processes import end_with_parent, signals_raise
from personalize.cli.progress import progress
from personalize.cli.redrawing import redrawn
from personalize.cli.terminal import give_up_unwritable, terminal
from personalize.cli.wording import worded
from personalize.errors import UserError, nearest
from personalize.models.quiet import hidden_messages

SCRIPT_FOLDERS = {
    "train": "Train an adapter, or the embedded model.",
    "export": "Export an adapter to another format.",
}
TRAINING = {"train", "quickstart"}  # commands, and the folder of scripts, that train
READER_GONE = 141  # as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    own_process = argv is None  # not called by another program
    args = sys.argv[1:] if argv is None else list(argv)
    return to_exit_code(lambda: dispatch(args, own_process), quiet=QUIET in args)


def dispatch(args: list[str], own_process: bool = False) -> int:
    """Run the command that `args` name; a training command may tune `own_process`."""
    if args[:1] == [QUIET]:  # may stand before the command
        args = [*args[1:], QUIET]
    if not args or args[0] in HELP:
        print(commands_help())
        return 0
    if args[0] == "--version":
        print(f"personalize {personalize.__version__}")
        return 0
    configs, args = take_option(args, "config")  # may stand before the command too
    args += [f"--config={file}" for file in configs]
    command, rest = args[0], args[1:]
    if command in SCRIPT_FOLDERS:
        return run_named_script(command, rest, own_process)
    if command not in COMMANDS:
        raise UserError(f"unknown command {command}: {nearest(command, [*SCRIPT_FOLDERS, *COMMANDS])}")
    name, recorded = resolve_command(command, rest), {}
    if command == "edit" and (pictures := take_option(rest, "from")[0]):
        name, rest, recorded = redrawn(rest, Path(pictures[-1]))
    config, target = COMMANDS[name]
    about = inspect.getdoc(config) or ""
    options = parse(config, rest, prog=f"personalize {command}", description=about, recorded=recorded)
    with worded(option_types(config)), memory_advised(option_types(config)):
        check(options)
        prepare(options, trains=own_process and command in TRAINING)
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(options)
    return 0


def run_named_script(folder: str, args: list[str], own_process: bool = False) -> int:
    """Run `personalize train NAME …` or `personalize export NAME …`, in several processes with `--num_processes`."""
    processes, args = take_option(args, "num_processes")
    known = launch.scripts(folder)
    if not known:
        raise UserError(f"personalize {folder}: this version has nothing to {folder}")
    words = [index for index, token in enumerate(args) if not token.startswith("-")]
    if not words:
        if HELP & set(args):
            print(scripts_help(folder, known))
            return 0
        raise UserError(f"personalize {folder} needs a name: {', '.join(known)}")
    name = args.pop(words[0]).replace("-", "_")
    if name not in known:
        raise UserError(f"there is no personalize {folder} {name}: {nearest(name, known)}")
    script = launch.load_script(known[name])
    prog, about, presets = f"personalize {folder} {name}", inspect.getdoc(script) or "", launch.presets(name)
    config = parse(script.Config, args, prog=prog, description=about, presets=presets)
    with worded(option_types(script.Config)), memory_advised(option_types(script.Config)):
        check(config)
        count = launch.process_count(processes)
        if count > 1:
            return launch.launch(known[name], args, count)
        prepare(config, trains=own_process and folder in TRAINING)
        script.main(config)
    return 0


def run_script(config: type, run: Callable[[Any], object], argv: Sequence[str] | None = None) -> int:
    """What a script of `train/` or `export/` does under `__main__`: parse the options, run, return the exit code."""
    path = Path(sys.modules[config.__module__].__file__ or config.__module__)
    if "LOCAL_RANK" in os.environ:
        end_with_parent()

    args = sys.argv[1:] if argv is None else argv

    def call() -> int:
        description = inspect.getdoc(sys.modules[config.__module__]) or ""
        options = parse(config, args, prog=path.name, description=description, presets=launch.presets(path.stem))
        if launch.ERROR_FILE not in os.environ:  # otherwise the launching process has done it
            check(options)
        prepare(options, trains=argv is None and path.parent.name in TRAINING)
        with worded(option_types(config)), memory_advised(option_types(config)):
            run(options)
        return 0

    return to_exit_code(call, quiet=QUIET in args)


def to_exit_code(call: Callable[[], int], *, quiet: bool = False) -> int:
    """The exit code of `call`; every exception becomes one line on stderr and a code, see `faults.described`.

    quiet: no progress is shown.
    """
    with terminal():
        try:
            return _reported(call, quiet)
        except OSError as error:  # the line itself could not be printed
            return READER_GONE if isinstance(error, BrokenPipeError) else UserError.exit_code
        finally:
            give_up_unwritable()


def _reported(call: Callable[[], int], quiet: bool) -> int:
    """The exit code of `call`, after the line about the exception that ended it; BrokenPipeError goes on."""
    try:
        with hidden_messages(), signals_raise(), progress(quiet=quiet):
            code = call()
            if sys.stdout is not None:  # as with `>&-`
                sys.stdout.flush()
            return code
    except KeyboardInterrupt as stop:
        if str(stop) or launch.ERROR_FILE not in os.environ:  # a launched process leaves that to its parent
            launch.report_error(str(stop) or f"stopped: {launch.NOTHING_KEPT}", getattr(stop, "exit_code", 130))
        return getattr(stop, "exit_code", 130)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        raise
    except Exception as error:
        show_traceback(error)
        return launch.report_error(*described(error))


def check(options: Any) -> None:
    """Check what `options` name and how they fit together, before torch is imported, if their class has a `check`."""
    own = getattr(options, "check", None)
    if own is not None:
        own()


def prepare(options: Any, *, trains: bool) -> None:
    """Settings of this process, made after the `options` are checked; `trains` if it is ours alone and does that."""
    if trains:
        (return_freed_memory if getattr(options, "offload", False) else keep_freed_memory)()


def commands_help() -> str:
    """The text of `personalize --help`."""
    lines = {f"{folder} NAME": text for folder, text in SCRIPT_FOLDERS.items() if launch.scripts(folder)}
    lines |= {name: (inspect.getdoc(config) or "").partition("\n")[0] for name, (config, _) in COMMANDS.items()}
    usage = "usage: personalize COMMAND [options]      personalize COMMAND --help      personalize --version"
    return f"{usage}\n\n{_columns(lines)}"


def scripts_help(folder: str, known: Mapping[str, Path]) -> str:
    """The text of `personalize train --help`."""
    usage = f"usage: personalize {folder} NAME [--config FILE] [--num_processes N] [options]"
    lines = {name: launch.summary(path) for name, path in known.items()}
    return f"{usage}\n\n{_columns(lines)}\n\nThe options of each: personalize {folder} NAME --help"


def _columns(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines), default=0) + 4
    return "\n".join(f"  {name:{width}}{text}" for name, text in lines.items())
