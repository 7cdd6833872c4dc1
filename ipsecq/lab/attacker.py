"""Somebody on the wire: records ESP, sends it again, sends it damaged, sends clear packets in a host's name."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Final

from ipsecq.lab.netns import Namespace
from ipsecq.lab.topology import Network
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.checksum import complete
from ipsecq.packet.fragments import fragment

EVIL: Final = b"ipsecq-lab-nobody-sent-this!"
_ETH_P_ALL: Final = 3
_RECENT: Final = 256
_OLD: Final = 512
_BURST: Final = 4
"""Frames a round; fifty rounds a second."""


class Attacker:
    """On a router's link: records what the router sends there, and puts more of it on the same wire.

    ``port`` is the UDP port that the clear packets aim at.  ``replayed``, ``forged`` and ``clear`` count what it sent.
    """

    def __init__(self, network: Network, router: Namespace, device: str, victim: int, port: int, seed: int) -> None:
        self.replayed = self.forged = self.clear = 0
        self._random = random.Random(seed)  # noqa: S311  # to be repeated, not to be secret
        self._port = port
        near, far = network.sites if victim == 1 else network.sites[::-1]
        self._pairs = [(far.host4, near.host4, 4), (far.host6, near.host6, 6)]
        self._ear = router.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._ear.bind((device, _ETH_P_ALL))
        self._ear.setblocking(False)
        self._mouth = router.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._mouth.bind((device, 0))
        self._recent: list[bytes] = []
        self._old: list[bytes] = []
        self._heard = 0
        self._said: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Attacker:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._ear.close()
        self._mouth.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._listen()
            if self._recent:
                for _ in range(_BURST):
                    self._attack()
            time.sleep(0.02)

    def _listen(self) -> None:
        for _ in range(1000):
            try:
                frame, address = self._ear.recvfrom(2048)
            except BlockingIOError:
                return
            if address[2] != socket.PACKET_OUTGOING or not _is_esp(frame) or hash(frame) in self._said:
                continue
            self._heard += 1
            self._recent.append(frame)
            if len(self._recent) > _RECENT:
                old = self._recent.pop(0)
                # A fair sample of the whole recording.
                if len(self._old) < _OLD:
                    self._old.append(old)
                elif (place := self._random.randrange(self._heard)) < _OLD:
                    self._old[place] = old

    def _attack(self) -> None:
        dice = self._random.random()
        frame = self._random.choice(self._old if self._old and dice < 0.5 else self._recent)
        if dice < 0.8:
            self.replayed += self._say(frame)
        elif dice < 0.95:
            self.forged += self._say(self._damaged(frame))
        else:
            source, destination, version = self._random.choice(self._pairs)
            packet = _clear(source, destination, version, self._port, self._random.choice((40, 3000)))
            ethernet = frame[:12] + (b"\x08\x00" if version == 4 else b"\x86\xdd")
            for piece in fragment(packet, 1400, self._random.getrandbits(16)):
                self.clear += self._say(ethernet + piece)

    def _damaged(self, frame: bytes) -> bytes:
        """A sequence number ahead of the window, a flipped bit, or both."""
        data = bytearray(frame)
        start = 34 if data[12:14] == b"\x08\x00" else 54
        if self._random.random() < 0.7:
            (sequence,) = struct.unpack_from("!I", data, start + 4)
            struct.pack_into("!I", data, start + 4, sequence + self._random.choice((1, 100, 1 << 20)) & 0xFFFFFFFF)
        else:
            data[self._random.randrange(start + 8, len(data))] ^= 1 << self._random.randrange(8)
        self._said.add(hash(bytes(data)))
        if len(self._said) > 100_000:
            self._said.clear()
        return bytes(data)

    def _say(self, frame: bytes) -> int:
        try:
            self._mouth.send(frame)
        except OSError:
            return 0
        return 1


def _is_esp(frame: bytes) -> bool:
    """Whole ESP datagrams without IP options."""
    if frame[12:14] == b"\x08\x00":
        return frame[14] == 0x45 and frame[23] == 50 and not (frame[20] & 0x3F or frame[21])
    return frame[12:14] == b"\x86\xdd" and frame[20] == 50


def _clear(source: str, destination: str, version: int, port: int, size: int) -> bytes:
    kind = socket.AF_INET if version == 4 else socket.AF_INET6
    src, dst = socket.inet_pton(kind, source), socket.inet_pton(kind, destination)
    udp = struct.pack("!HHHH", 40000, port, 8 + size, 0) + EVIL.ljust(size, b"!")
    if version == 4:
        return complete(ipv4.header(src, dst, 17, len(udp)) + udp)
    return complete(ipv6.header(src, dst, 17, len(udp)) + udp)
