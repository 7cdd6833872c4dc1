"""Packets in and out of queues and sockets, for the tests of the I/O around the engine."""

from __future__ import annotations

import contextlib
import select
import socket
import time

from ipsecq.datapath.queue import Queue

DONE, STOLEN = 0x01000000, 0x02000000
QUEUE = 77


def inet(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def divert(space, chain: str, *match: str, table: str = "mangle", number: int = QUEUE) -> None:
    for program in ("iptables-nft", "ip6tables-nft"):
        space.run(program, "-t", table, "-A", chain, *match, "-j", "NFQUEUE", "--queue-num", str(number))


def read_some(queue: Queue, count: int, timeout: float = 5.0) -> list[tuple[int, int, int, int, bytes]]:
    """Packets as copies, whatever batches they come in."""
    packets: list[tuple[int, int, int, int, bytes]] = []
    deadline = time.monotonic() + timeout
    while len(packets) < count and time.monotonic() < deadline:
        if select.select([queue.fd], [], [], 0.1)[0]:
            packets += [(*packet[:4], bytes(packet[4])) for packet in queue.read()]
    return packets


def udp_pair(pair, port: int = 4000):
    near, far = pair
    receiver = far.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("10.9.0.2", port))
    receiver.settimeout(0.3)
    sender = near.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect(("10.9.0.2", port))
    return sender, receiver


def received(receiver: socket.socket, count: int = 0) -> list[bytes]:
    """``count`` packets, however late, and whatever else comes within the receiver's own timeout."""
    data: list[bytes] = []
    quiet = receiver.gettimeout()
    with contextlib.suppress(TimeoutError):
        while True:
            receiver.settimeout(5.0 if len(data) < count else quiet)
            data.append(receiver.recv(65536))
    receiver.settimeout(quiet)
    return data

