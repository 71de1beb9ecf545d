"""Running a function in a forked copy of this process: warm, and free to die or to eat memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import traceback

import torch
from accelerate.state import AcceleratorState


def in_child(function, *, seconds=240):
    """The JSON-able result of `function()` in a fork, and by how many MiB its peak memory grew.

    Fails if the child raises, is killed, or hangs for `seconds`.
    """
    return begun(function, seconds=seconds)()


def begun(function, *, seconds=240):
    """As `in_child`, but started only: what it returns is to be called for the result."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not pytest's: the child dies of it
        signal.alarm(seconds)
        torch.set_num_threads(1)  # the parent's threads were not copied
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            told = {"result": function()}
        except BaseException:
            told = {"error": traceback.format_exc()}
        told["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(writer, json.dumps(told).encode()[:60_000])
        os._exit(0)
    os.close(writer)

    def finished():
        with os.fdopen(reader, "rb") as stream:
            text = stream.read()
        _, status = os.waitpid(child, 0)
        assert text, f"the child died or hung: {os.waitstatus_to_exitcode(status)}"
        told = json.loads(text)
        assert "error" not in told, told.get("error")
        return told["result"], told["grown"]

    finished.process = child
    return finished


def together(function, count):
    """Results of `function(rank)` in `count` forks that find one another as under `accelerate launch` (gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
              "LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}  # fmt: skip

    def run(rank):
        os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        AcceleratorState._reset_state(reset_partial_state=True)
        return function(rank)

    children = [begun(lambda rank=rank: run(rank)) for rank in range(count)]
    return [child()[0] for child in children]
