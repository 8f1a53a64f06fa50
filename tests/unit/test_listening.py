"""Who listens is asked of the kernel; nobody is connected to."""

from __future__ import annotations

import socket

import pytest

from dynacut.live.tracing.listening import is_listening


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_counts_once_somebody_listens(family: socket.AddressFamily, address: str) -> None:
    with socket.socket(family) as server:
        try:
            server.bind((address, 0))
        except OSError:
            pytest.skip(f"this machine has no {address}")
        port = server.getsockname()[1]
        assert not is_listening(port)
        server.listen()
        assert is_listening(port)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
        with socket.create_connection((address, port)) as client:
            assert not is_listening(client.getsockname()[1])
    assert not is_listening(port)
