"""The network block itself."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_a_connection_beyond_this_machine_raises(call: str):
    with socket.socket() as sock, pytest.raises(RuntimeError, match="192.0.2.1"):  # an address reserved for examples
        getattr(sock, call)(("192.0.2.1", 80))


def test_a_name_look_up_raises():
    with pytest.raises(RuntimeError, match="example.invalid"):
        socket.getaddrinfo("example.invalid", 80)


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
