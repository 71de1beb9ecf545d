"""Running a function in a fork of this process, which has its imports and may be killed or use much memory."""

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
