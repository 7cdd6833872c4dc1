"""Traffic that proves itself: TCP with digests at both ends, UDP of every size, ping.  Plain sockets in namespaces."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ipsecq.lab.netns import LabError, Namespace

MARKER: Final = b"ipsecq-lab-payload-in-clear!"
"""Stands in every block of the lab's payload: a capture that holds it holds clear text."""

SO_MAX_PACING_RATE: Final = 47


@dataclass
class Transfer:
    """How a TCP transfer went."""

    octets: int
    seconds: float
    longest_pause: float
    """Longest time in which no octet arrived, seconds."""
    digest_matches: bool

    @property
    def gigabits(self) -> float:
        """Gbit/s of payload."""
        return self.octets * 8 / self.seconds / 1e9


def block(size: int) -> bytes:
    """Random octets with a marker every 512."""
    data = bytearray(os.urandom(size))
    for offset in range(0, size - len(MARKER) + 1, 512):
        data[offset : offset + len(MARKER)] = MARKER
    return bytes(data)


def family(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6 of a textual address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def tcp(
    client: Namespace, server: Namespace, address: str, octets: int, *, port: int = 5001, timeout: float = 60.0,
    reverse: bool = False, source: str | None = None, pace: int = 0,
) -> Transfer:  # fmt: skip
    """Send ``octets`` from client to server (``reverse``: the other way) and compare SHA-256 digests at the end.

    ``pace``: octets a second at most.  Raises LabError when nothing arrives for ``timeout`` seconds.
    """
    data = block(1 << 20)
    result: list[tuple[int, bytes, float]] = []
    failure: list[BaseException] = []
    listener = server.socket(family(address), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.settimeout(timeout)
    listener.bind((address, port))
    listener.listen(1)

    def send(connection: socket.socket) -> bytes:
        digest, left = hashlib.sha256(), octets
        while left:
            part = data[: min(left, len(data))]
            connection.sendall(part)
            digest.update(part)
            left -= len(part)
        connection.shutdown(socket.SHUT_WR)
        return digest.digest()

    def receive(connection: socket.socket) -> None:
        try:
            digest, total, pause, last = hashlib.sha256(), 0, 0.0, time.monotonic()
            buffer = bytearray(1 << 20)
            while count := connection.recv_into(buffer):
                now = time.monotonic()
                pause, last = max(pause, now - last), now
                digest.update(memoryview(buffer)[:count])
                total += count
            result.append((total, digest.digest(), pause))
        except BaseException as error:  # handed on below
            failure.append(error)

    connection = client.socket(family(address), socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        if source:
            connection.bind((source, 0))
        started = time.monotonic()
        connection.connect((address, port))
        accepted = listener.accept()[0]
        accepted.settimeout(timeout)
        sender, receiver = (accepted, connection) if reverse else (connection, accepted)
        if pace:
            sender.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, pace)
        thread = threading.Thread(target=receive, args=(receiver,))
        thread.start()
        try:
            digest = send(sender)
        finally:
            thread.join(timeout)
    except OSError as error:
        raise LabError(f"TCP {client.role} -> [{address}]:{port}: {error}") from (failure[0] if failure else error)
    finally:
        connection.close()
        listener.close()
    if failure or not result:
        raise LabError(f"TCP to [{address}]:{port}: receiver failed: {failure}")
    total, seen, pause = result[0]
    accepted.close()
    return Transfer(total, time.monotonic() - started, pause, digest == seen and total == octets)


@dataclass
class UdpEchoes:
    """Which datagram sizes came back unharmed."""

    returned: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)


def udp_echo(
    client: Namespace, server: Namespace, address: str, sizes: Iterable[int], *, port: int = 5002, timeout: float = 2.0
) -> UdpEchoes:
    """Send one datagram of each size (0 to 65507 octets), have it echoed, compare."""
    outcome = UdpEchoes()
    echo = server.socket(family(address), socket.SOCK_DGRAM)
    echo.bind((address, port))
    stop = threading.Event()

    def serve() -> None:
        echo.settimeout(0.1)
        while not stop.is_set():
            try:
                data, peer = echo.recvfrom(65536)
                echo.sendto(data, peer)
            except TimeoutError:
                continue
            except OSError:
                continue  # an ICMP error of a test that wants it

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.socket(family(address), socket.SOCK_DGRAM) as probe:
            probe.settimeout(timeout)
            probe.connect((address, port))
            for size in sizes:
                data = block(size)
                try:
                    probe.send(data)
                    answer = probe.recv(65536)
                    while len(answer) != size:  # a late answer to an earlier probe
                        answer = probe.recv(65536)
                except OSError:
                    outcome.lost.append(size)
                    continue
                (outcome.returned if answer == data else outcome.damaged).append(size)
    finally:
        stop.set()
        thread.join()
        echo.close()
    return outcome


def ping(
    space: Namespace, address: str, *, count: int = 3, size: int = 56, source: str | None = None, df: bool = False,
    wait: float = 1.0,
) -> int:  # fmt: skip
    """Send ``count`` echo requests in quick succession; how many were answered."""
    argv = ["ping", "-n", "-q", "-c", str(count), "-i", "0.05", "-W", str(wait), "-s", str(size)]
    argv += ["-I", source] if source else []
    argv += ["-M", "do"] if df else []
    done = space.run(*argv, address, check=False, timeout=30 + count * wait)
    for line in done.stdout.splitlines():
        if "received" in line:
            return int(line.split(",")[1].split()[0])
    return 0
