"""The default run is offline, on the CPU, and the same on a large machine as on a small one."""

from __future__ import annotations

import gc
import os
import socket

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; two processes share the tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
LOCAL = {"localhost", "127.0.0.1", "::1", "", None, socket.gethostname()}


class NetworkUsed(RuntimeError):
    """Something asked for the network; no OSError, so that no library takes it for a bad connection and carries on."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--base", help="folder of a real Stable Diffusion checkpoint, for tests marked `hub`")


def pytest_configure(config: pytest.Config) -> None:
    if not wants_hub(config):
        os.environ["HF_HUB_OFFLINE"] = "1"  # also for the processes that tests start


def pytest_collection_finish() -> None:
    """What the imports made stays for good: not to go through it again and again spares a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def wants_hub(config: pytest.Config) -> bool:
    """Was the marker `hub` selected, as in `pytest -m hub`?"""
    words = config.getoption("-m").replace("(", " ").replace(")", " ").split()
    return any(word == "hub" and words[index - 1 : index] != ["not"] for index, word in enumerate(words))


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection and name look-up beyond this machine raises, except in tests marked `hub`."""
    if request.node.get_closest_marker("hub"):
        return

    def guarded(function, host_of):
        def call(*args, **kwargs):
            if host_of(*args) not in LOCAL:
                raise NetworkUsed(f"the default test run is offline, but something asked for {host_of(*args)!r}")
            return function(*args, **kwargs)

        return call

    def peer(sock: socket.socket, address: object) -> object:
        return address[0] if isinstance(address, tuple) else "localhost"  # a Unix socket's address is a path

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect, peer))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex, peer))
    monkeypatch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_: host))
