"""A real ``ipsecq run`` daemon on a gateway of the lab: its files, its life, its status and metrics."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ipsecq.daemon.control import ask
from ipsecq.lab.netns import LabError, Namespace, stop, wait_for
from ipsecq.lab.topology import Network, Site

METRICS_PORT: Final = 9500
READY_SECONDS: Final = 60.0
"""Others may start at the same time, on a machine that is busy."""


@dataclass(frozen=True)
class Algorithm:
    """Algorithms of an ESP SA in the words of setkey(8), with fresh keys from :meth:`keys`."""

    encryption: str
    encryption_octets: int
    authentication: str = ""
    authentication_octets: int = 0

    def keys(self) -> str:
        """``-E … -A …`` with random keys (salts included)."""
        text = f"-E {self.encryption} 0x{secrets.token_hex(self.encryption_octets)}" if self.encryption_octets else ""
        if self.authentication:
            text += f" -A {self.authentication} 0x{secrets.token_hex(self.authentication_octets)}"
        return text


AES_GCM: Final = Algorithm("aes-gcm-16", 20)
AES_CBC_SHA256: Final = Algorithm("aes-cbc", 16, "hmac-sha2-256", 32)


@dataclass
class Tunnel:
    """An ESP tunnel between the two gateways of a network: SAs and policies of both ends, for each IP version.

    The SPIs of direction *n* (from site n) are ``spi + 16 * n + version``.
    """

    network: Network
    algorithm: Algorithm = AES_GCM
    versions: Sequence[int] = (4, 6)
    spi: int = 0x1000
    replay_octets: int = 32
    udp: bool = False
    """ESP in UDP."""
    port: int = 4500
    """The port at both ends of ESP in UDP."""
    hidden: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """(site number, IP version) to the address that stands for its LAN inside the tunnel, after source NAT."""
    lines: list[str] = field(default_factory=list)
    """The ``add`` lines, equal at both ends."""

    def __post_init__(self) -> None:
        for version in self.versions:
            for near, far in (self.network.sites, self.network.sites[::-1]):
                protocol = "esp-udp" if self.udp else "esp"
                port = f"[{self.port}]" if self.udp else ""
                self.lines.append(
                    f"add {near.wan(version)}{port} {far.wan(version)}{port} {protocol}"
                    f" 0x{self.spi_from(near, version):x} -m tunnel -r {self.replay_octets} {self.algorithm.keys()};"
                )

    def spi_from(self, near: Site, version: int) -> int:
        """The SPI of what ``near`` sends."""
        return self.spi + 16 * near.number + version

    def setkey(self, near: Site) -> str:
        """The setkey.conf of one end."""
        far = self.network.two if near is self.network.one else self.network.one
        text = ["flush;", "spdflush;", *self.lines]
        for version in self.versions:
            ours, theirs = self._inside(near, version), self._inside(far, version)
            ends = near.wan(version), far.wan(version)
            text += [
                f"spdadd {ours} {theirs} any -P out ipsec esp/tunnel/{ends[0]}-{ends[1]}/require;",
                f"spdadd {theirs} {ours} any -P in ipsec esp/tunnel/{ends[1]}-{ends[0]}/require;",
            ]
        return "\n".join(text) + "\n"

    def _inside(self, site: Site, version: int) -> str:
        return self.hidden.get((site.number, version), site.lan(version))


class Gateway:
    """One daemon.  ``start`` returns when it has said READY=1; its log is shown when it does not.

    ``daemon`` and ``metrics``: more lines of these tables; ``settings``: more tables; ``listen``: where metrics are.
    """

    def __init__(
        self, space: Namespace, setkey: str, *, workers: int = 2, daemon: str = "", settings: str = "",
        listen: str = "127.0.0.1", metrics: str = "",
    ) -> None:  # fmt: skip
        self.space = space
        self.directory: Path = space.lab.directory / f"ipsecq-{space.role}"
        self.directory.mkdir(exist_ok=True)
        self.policy, self.config = self.directory / "setkey.conf", self.directory / "ipsecq.toml"
        self.log = self.directory / "log"
        self.policy.write_text(setkey)
        self.policy.chmod(0o600)
        self.config.write_text(
            f"""[daemon]
policy = ["{self.policy}"]
workers = {workers}
state_dir = "{self.directory}/state"
run_dir = "{self.directory}/run"
{daemon}

[metrics]
listen = "{listen}:{METRICS_PORT}"
{metrics}

[log]
level = "info"
{settings}
"""
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._notify: socket.socket | None = None

    def start(self, *, wait: bool = True) -> Gateway:
        """Start the daemon, and unless told otherwise wait for READY=1."""
        self._close_notify()
        path = self.directory / "notify"
        path.unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(path))
        self._notify.setblocking(False)
        self.process = self.space.popen(
            sys.executable, "-m", "ipsecq", "run", "--config", str(self.config),
            log=self.log, env={"NOTIFY_SOCKET": str(path)},
        )  # fmt: skip
        return self.ready() if wait else self

    def ready(self) -> Gateway:
        """Wait for READY=1.  Raises LabError with the log when it doesn't come."""
        try:
            wait_for(self._said_ready, "READY=1", READY_SECONDS)
        except LabError as error:
            raise LabError(f"gateway {self.space.role}: {error}; its log:\n{self.log_tail()}") from None
        finally:
            self._close_notify()
        return self

    def _close_notify(self) -> None:
        if self._notify:
            self._notify.close()
            self._notify = None

    def _said_ready(self) -> bool:
        process, notify = self.process, self._notify
        if process is None or process.poll() is not None:
            raise LabError(f"ended with status {process.returncode if process else '?'} before it was ready")
        with contextlib.suppress(BlockingIOError):
            while notify:
                if b"READY=1" in notify.recv(4096).split(b"\n"):
                    return True
        return False

    def stop(self) -> int:
        """SIGTERM, as systemd does; the daemon's exit status."""
        if self.process is None:
            raise LabError("not started")
        return stop(self.process, patience=15.0)

    def kill(self) -> None:
        """SIGKILL to the supervisor: a crash."""
        if self.process is None:
            raise LabError("not started")
        self.process.kill()
        self.process.wait()

    def reload(self) -> None:
        """SIGHUP."""
        if self.process is None:
            raise LabError("not started")
        self.process.send_signal(signal.SIGHUP)

    def command(self, *argv: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run ``ipsecq ARGV --config …`` next to the daemon."""
        line = (sys.executable, "-m", "ipsecq", *argv, "--config", str(self.config))
        return self.space.run(*line, check=check, stdin=stdin)

    def status(self) -> Any:
        """What ``ipsecq status --json`` prints, asked over the control socket."""
        return ask(self.directory / "run" / "control", "status")

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        if self.process is None:
            raise LabError("not started")
        return self.process.pid

    def workers(self) -> list[int]:
        """Pids of the workers, from status."""
        return [int(worker["pid"]) for worker in self.status()["workers"]]

    def metrics_text(self) -> str:
        """The body of ``/metrics``, fetched from inside the gateway."""

        def fetch() -> str:
            connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=5)
            try:
                connection.request("GET", "/metrics")
                return connection.getresponse().read().decode()
            finally:
                connection.close()

        return self.space.call(fetch)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all series of that name with (at least) these labels; 0 when there is none."""
        total = 0.0
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        for line in self.metrics_text().splitlines():
            if line.startswith((name + "{", name + " ")) and all(part in line for part in wanted):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def log_tail(self, lines: int = 40) -> str:
        """The end of the daemon's log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return "(empty)"


def kill_process(pid: int) -> None:
    """SIGKILL to one process: a worker of ours.  LabError for one that is between two lives."""
    if pid <= 0:
        raise LabError("the worker has no process just now")
    os.kill(pid, signal.SIGKILL)


def start_all(gateways: Iterable[Gateway]) -> None:
    """Start these daemons beside each other: a start is mostly waiting, for the kernel and for the other processor."""
    started = [gateway.start(wait=False) for gateway in gateways]
    for gateway in started:
        gateway.ready()


def both_gateways(network: Network, tunnel: Tunnel | None = None, *, workers: int = 2) -> tuple[Gateway, Gateway]:
    """Daemons at both ends of a tunnel, started and ready."""
    tunnel = tunnel or Tunnel(network)
    one, two = (Gateway(site.gateway, tunnel.setkey(site), workers=workers) for site in network.sites)
    start_all((one, two))
    return one, two
