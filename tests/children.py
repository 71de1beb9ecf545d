"""Running a function in a forked copy of this process: warm, and free to die or to eat memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback

import torch


def in_child(function, *, seconds=240):
    """The JSON-able result of `function()` in a fork, and by how many MiB its peak memory grew.

    Fails if the child raises, is killed, or hangs for `seconds`.
    """
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
    with os.fdopen(reader, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    assert text, f"the child died or hung: {os.waitstatus_to_exitcode(status)}"
    told = json.loads(text)
    assert "error" not in told, told.get("error")
    return told["result"], told["grown"]
