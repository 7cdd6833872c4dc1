"""Traffic that proves itself: TCP with digests at both ends, UDP of every size, ping.  Plain sockets in namespaces."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ipsecq.datapath.output import IP_MTU_DISCOVER
from ipsecq.lab.netns import LabError, Namespace
from ipsecq.packet.checksum import ones_complement

MARKER: Final = b"ipsecq-lab-payload-in-clear!"
"""Stands in every block of the lab's payload: a capture that holds it holds clear text."""

SO_MAX_PACING_RATE: Final = 47
IPV6_MTU_DISCOVER: Final = 23
PMTUDISC_DO: Final = 2


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
    reverse: bool = False, source: str | None = None, pace: int = 0, window: int = 0,
) -> Transfer:  # fmt: skip
    """Send ``octets`` from client to server (``reverse``: the other way) and compare SHA-256 digests at the end.

    ``pace``: octets a second at most.  ``window``: octets under way at most, as SO_RCVBUF counts them.  Raises LabError
    when nothing arrives for ``timeout`` seconds.
    """
    data = block(1 << 20)
    result: list[tuple[int, bytes, float]] = []
    failure: list[BaseException] = []
    listener = server.socket(family(address), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.settimeout(timeout)
    connection = client.socket(family(address), socket.SOCK_STREAM)
    if window:
        for each in (listener, connection):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
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
    client: Namespace, server: Namespace, address: str, sizes: Iterable[int], *, port: int = 5002, timeout: float = 5.0
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
            earlier: set[bytes] = set()
            for size in sizes:
                data = block(size)
                try:
                    probe.send(data)
                    answer = probe.recv(65536)
                    while answer != data and answer in earlier:  # late
                        answer = probe.recv(65536)
                except OSError:
                    outcome.lost.append(size)
                    earlier.add(data)
                    continue
                (outcome.returned if answer == data else outcome.damaged).append(size)
    finally:
        stop.set()
        thread.join()
        echo.close()
    return outcome


ECHO_INTERVAL: Final = 0.05
"""Seconds between the echo requests of ``ping``."""
_ECHO: Final = struct.Struct("!BBHHH")


def ping(
    space: Namespace, address: str, *, count: int = 3, size: int = 56, source: str | None = None, df: bool = False,
    wait: float = 5.0, enough: int = 0,
) -> int:  # fmt: skip
    """Send ``count`` echo requests of ``size`` octets in quick succession; how many were answered, each in ``wait`` seconds.

    ping(8) is no witness of loss: once it has an answer, it waits for the last ones only for two round trips.
    ``df``: never in fragments, and what is longer than the path MTU isn't sent.  ``enough``: be done with so many answers.
    """
    version6 = family(address) == socket.AF_INET6
    protocol = socket.IPPROTO_ICMPV6 if version6 else socket.IPPROTO_ICMP
    request, reply = (128, 129) if version6 else (8, 0)
    identifier, data = int.from_bytes(os.urandom(2), "big"), block(size)
    missing = set(range(count))
    allowed = count - enough if enough else 0
    with space.socket(family(address), socket.SOCK_RAW, protocol) as probe:
        if df and version6:
            probe.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
        elif df:
            probe.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        if source:
            probe.bind((source, 0))

        def answers(until: float) -> None:
            while len(missing) > allowed and (left := until - time.monotonic()) > 0:
                probe.settimeout(left)
                try:
                    packet = probe.recv(65536)
                except OSError:  # nothing in time, or an ICMP error
                    continue
                message = packet if version6 else packet[(packet[0] & 15) * 4 :]
                kind, code, _, peer_identifier, number = _ECHO.unpack_from(message)
                if (kind, code, peer_identifier) == (reply, 0, identifier) and message[_ECHO.size :] == data:
                    missing.discard(number)

        try:
            probe.connect((address, 0))
        except OSError:  # no route
            return 0
        for number in range(count):
            if len(missing) <= allowed:
                break
            message = _ECHO.pack(request, 0, 0, identifier, number) + data
            # The kernel fills in the sum of ICMPv6 alone.
            checksum = 0 if version6 else 0xFFFF - ones_complement(message)
            with contextlib.suppress(OSError):  # too long, refused by a rule, or an earlier one's ICMP error
                probe.send(_ECHO.pack(request, 0, checksum, identifier, number) + data)
            answers(time.monotonic() + (ECHO_INTERVAL if number < count - 1 else wait))
    return count - len(missing)
