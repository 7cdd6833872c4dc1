"""Scrapers that come in crowds, or say nothing, hold up nobody for long."""

import http.client
import socket
import time

from ipsecq.metrics import server
from ipsecq.metrics.server import MetricsServer
from ipsecq.metrics.source import Snapshot


class Source:
    def snapshot(self):
        return Snapshot()


def get(port):
    """The status, or None where the server closed at once."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().status
    except ConnectionError:
        return None
    finally:
        connection.close()


def test_clients_that_say_nothing_are_bounded_and_cut_off(monkeypatch):
    monkeypatch.setattr(server, "MAX_CLIENTS", 3)
    monkeypatch.setattr(server._Handler, "timeout", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = MetricsServer("127.0.0.1", port, Source())
    metrics.start()
    try:
        silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(10)]
        # Three are waited for, seven are sent away at once, and then the three, too.
        assert all(client.recv(1) == b"" for client in silent)
        # A place is given back a moment after its client sees the end.
        deadline = time.monotonic() + 10
        while (status := get(port)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert status == 200
    finally:
        for client in silent:
            client.close()
        metrics.close()
