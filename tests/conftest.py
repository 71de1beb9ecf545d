"""Settings of the whole test run: offline, and one thread for each process, so that results do not depend on cores."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is first imported; several processes run the tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
LOCAL = {"localhost", "127.0.0.1", "::1", "", None, socket.gethostname()}


class NetworkUsed(RuntimeError):
    """A test tried to use the network.  It is no OSError, which libraries would take for a failed connection."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--base", help="folder of a real Stable Diffusion checkpoint, for tests marked `hub`")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where the bases of a test lie is remembered in a folder of the run, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_configure(config: pytest.Config) -> None:
    if not wants_hub(config):
        os.environ["HF_HUB_OFFLINE"] = "1"  # in the environment, so that processes started by tests inherit it


def pytest_collection_finish() -> None:
    """Exclude the objects made by imports from garbage collection, which saves a fifth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def wants_hub(config: pytest.Config) -> bool:
    """Whether the marker `hub` is selected, as by `pytest -m hub`."""
    words = config.getoption("-m").replace("(", " ").replace(")", " ").split()
    return any(word == "hub" and words[index - 1 : index] != ["not"] for index, word in enumerate(words))


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise NetworkUsed for every connection to another machine and every name look-up, but in tests marked `hub`."""
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
