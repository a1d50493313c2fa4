# SPDX-License-Identifier: Apache-2.0
"""The port that a server is given before it listens."""

import socket

import pytest

from sglang_fl.utils import server


def test_a_port_that_nobody_listens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    free = server.free_port()
    assert free in server._PORTS
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", free))
        busy.listen()
        monkeypatch.setattr(server, "_PORTS", range(free, free + 1))
        with pytest.raises(OSError, match=f"all ports from {free} to {free} are in use"):
            server.free_port()
    assert server.free_port() == free
