"""sd_notify(3) in a few lines: readiness, status and the watchdog of systemd."""

from __future__ import annotations

import os
import socket
import time


class Notifier:
    """Talks to the service manager named by ``NOTIFY_SOCKET``; without one every call does nothing."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):  # meant for us, not for the workers
            os.environ.pop(name, None)

    def send(self, **variables: str | int) -> None:
        """``send(READY=1, STATUS="serving")``; a manager that is gone is no reason to stop."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in variables.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendto(text.encode(), self._address)
        except OSError:
            return

    def ready(self, status: str) -> None:
        """The daemon serves."""
        self.send(READY=1, STATUS=status)

    def reloading(self) -> None:
        """A reload begins; :meth:`ready` ends it."""
        self.send(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def stopping(self) -> None:
        """The stop begins."""
        self.send(STOPPING=1)

    def feed(self) -> None:
        """All workers have made progress."""
        self.send(WATCHDOG=1)
