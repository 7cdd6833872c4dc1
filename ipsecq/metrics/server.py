"""HTTP: ``/metrics`` for Prometheus, ``/`` and ``/status.json`` for people; few clients at a time, slow ones cut off.

A client has :data:`CLIENT_SECONDS` for its whole request, and as long to take the answer; when all places are taken, the
one that has been asking longest makes room.  So clients that dribble cannot take the place of those that ask.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from ipsecq.errors import DaemonError
from ipsecq.metrics import live, page
from ipsecq.metrics.exposition import CONTENT_TYPE, render
from ipsecq.metrics.source import Source

MAX_CLIENTS: Final = 8
CLIENT_SECONDS: Final = 5.0
HEADERS: Final = (("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"))
_IP_FREEBIND: Final = 15
"""``IP_FREEBIND`` of <linux/in.h>, which holds for both families."""


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS
    server: _Server

    def parse_request(self) -> bool:
        """Read the headers; then the request is whole, and the place its own."""
        good = super().parse_request()
        self.server.asked(self.connection)
        return good

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: scrapes are no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], family: socket.AddressFamily) -> None:
        self.address_family = family
        self._lock = threading.Lock()
        self._clients: dict[Any, float | None] = {}
        """Socket → since when its request is awaited, None when it is answered; the oldest first."""
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As in WSGIServer, without asking the DNS for our own name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # The daemon starts before the network: the address may come later.
        self.socket.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the client, unless too many are being answered."""
        with self._lock:
            free = len(self._clients) < MAX_CLIENTS or self._cut_off(math.inf, most=1) > 0
            if free:
                self._clients[request] = time.monotonic()
        if free:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def asked(self, request: Any) -> None:
        """The client has said all that it wants."""
        with self._lock:
            if request in self._clients:
                self._clients[request] = None

    def service_actions(self) -> None:
        """Twice a second: who has not finished its request in time goes."""
        with self._lock:
            self._cut_off(time.monotonic() - (_Handler.timeout or CLIENT_SECONDS))

    def _cut_off(self, before: float, most: int = MAX_CLIENTS) -> int:
        """Break off with the oldest who are still asking; how many.  The lock is held.

        Its thread sees the end of the request.  It takes itself out of the table before it closes the socket, so the
        descriptor is still the client's here.
        """
        late = [client for client, since in self._clients.items() if since is not None and since < before][:most]
        for client in late:
            del self._clients[client]
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        return len(late)

    def shutdown_request(self, request: Any) -> None:
        """Give the place back, whatever happened."""
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is its own affair."""


class Application:
    """The WSGI application: what there is to read, and nothing to write."""

    def __init__(self, source: Source) -> None:
        self._pages: dict[str, tuple[str, Callable[[], bytes]]] = {
            "/": ("text/html; charset=utf-8", lambda: page.render(live.data(source.snapshot()))),
            "/metrics": (CONTENT_TYPE, lambda: render(source.snapshot())),
            "/status.json": ("application/json", lambda: json.dumps(live.data(source.snapshot())).encode()),
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        found = self._pages.get(environ["PATH_INFO"] or "/")
        if found is None:
            return _refuse(start_response, "404 Not Found", f"try {', '.join(self._pages)}\n")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(start_response, "405 Method Not Allowed", "GET or HEAD\n", ("Allow", "GET, HEAD"))
        kind, make = found
        body = make()
        headers = [("Content-Type", kind), ("Cache-Control", "no-store"), *HEADERS]
        if kind.startswith("text/html"):
            headers.append(("Content-Security-Policy", page.POLICY))
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            # The lines are alike: the fastest level makes a twentieth of them.
            body = gzip.compress(body, 1)
            headers.append(("Content-Encoding", "gzip"))
        headers.append(("Content-Length", str(len(body))))
        start_response("200 OK", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _refuse(start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
    body = text.encode()
    plain = ("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))
    start_response(status, [*plain, *headers, *HEADERS])
    return [body]


class MetricsServer:
    """Serves ``source`` on (host, port) from threads of this process, in the network namespace it was made in."""

    def __init__(self, host: str, port: int, source: Source) -> None:
        """Bind; DaemonError when the address is taken.  It may be one that this host does not have yet."""
        try:
            family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]  # noqa: S104
            self._server = _Server((host, port), socket.AddressFamily(family))
        except OSError as error:
            raise DaemonError(f"metrics: cannot listen on {host}:{port}: {error.strerror}") from error
        self.port = self._server.server_port
        self._server.set_app(Application(source))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        if self._thread.is_alive():
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which else looks twice a second
            self._server.shutdown()
        self._server.server_close()
