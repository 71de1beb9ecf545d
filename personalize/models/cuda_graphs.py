"""Work on a GPU recorded as a CUDA graph: the host then starts all of its kernels at once.

A graph repeats the same operations on the same memory.  What is recorded may neither wait for the device nor copy from
the host, and its branches are those that were taken while it was recorded.

Pure: torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM = 3  # calls before the recording, on a stream of their own: libraries allocate and choose kernels in them


def called_on(stream: Any, work: Callable[[], None]) -> None:
    """Call `work` on the CUDA stream of the warm-up, which torch asks for before a recording."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        work()
    current.wait_stream(stream)


def recorded(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record `work` as a CUDA graph and return the function that replays it; recording itself computes nothing."""
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):  # a capture takes a stream of the current device
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay
