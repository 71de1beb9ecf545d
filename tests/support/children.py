"""Running a function in a fork of this process, which has its imports and may be killed or use much memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import time
import traceback
from contextlib import suppress
from ctypes import CDLL
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


def in_child(function, *, seconds=240):
    """Call `function()` in a fork; returns its result, which must be JSON, and by how many MiB its peak memory grew.

    Fails if the child raises, is killed, or takes longer than `seconds`.
    """
    return start_child(function, seconds=seconds)()


def start_child(function, *, seconds=240):
    """Start `function()` in a fork; returns a function that waits for it and returns what `in_child` would.

    The returned function's attribute `process` is the child's process id.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # instead of pytest's handler, so that the alarm ends the child
        signal.alarm(seconds)
        torch.set_num_threads(1)  # a fork does not have the parent's threads
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            message = {"result": function()}
        except BaseException:
            message = {"error": traceback.format_exc()}
        message["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(writer, json.dumps(message).encode()[:60_000])
        os._exit(0)
    os.close(writer)

    def finished():
        with os.fdopen(reader, "rb") as stream:
            text = stream.read()
        _, status = os.waitpid(child, 0)
        assert text, f"the child died or hung: {os.waitstatus_to_exitcode(status)}"
        message = json.loads(text)
        assert "error" not in message, message.get("error")
        return message["result"], message["grown"]

    finished.process = child
    return finished


def run_processes(function, count):
    """Call `function(rank)` in `count` forks that form one process group, as under `accelerate launch`, with gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
              "LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}  # fmt: skip

    def run(rank):
        os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        AcceleratorState._reset_state(reset_partial_state=True)
        return function(rank)

    children = [start_child(lambda rank=rank: run(rank)) for rank in range(count)]
    return [child()[0] for child in children]


def adopt_orphans():
    """Become the parent of every process below this one that loses its own, so that `descendants` finds them all."""
    CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants():
    """Living processes that this one has started, and those that they have started, by id."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":  # ended, and nobody has asked for its exit code yet
                parents[int(path.parent.name)] = int(parent)
    found, level = [], {os.getpid()}
    while level := {process for process, parent in parents.items() if parent in level}:
        found += level
    return sorted(found)


def living(seconds):
    """How many processes below this one still live after so many seconds; it returns as soon as there is none."""
    deadline = time.monotonic() + seconds
    while (found := descendants()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return len(found)
