"""What crossed a wire: tcpdump into a pcap file, a small reader, and the statements that tests make about it."""

from __future__ import annotations

import ipaddress
import mmap
import re
import signal
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final

from ipsecq.lab.netns import LabError, Namespace, stop, wait_for
from ipsecq.packet.address import text as _address

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD
NEIGHBOUR_DISCOVERY: Final = frozenset({*range(130, 138), 143})
"""ICMPv6 types with which links are kept up: neighbours, routers, and who listens to which group (MLD)."""
_TALLY: Final = re.compile(
    r"(\d+) packets? captured,? *\n?(\d+) packets? received by filter,? *\n?(\d+) packets? dropped by kernel"
)
_NAMES: Final = {
    1: "ICMP", 4: "IPIP", 6: "TCP", 17: "UDP", 41: "IPv6", 50: "ESP", 51: "AH", 58: "ICMPv6", 108: "IPComp",
}  # fmt: skip
_EXTENSIONS: Final = {0: 8, 43: 8, 60: 8}  # hop-by-hop, routing, destination options: length in units of 8 octets
_serial = count()


@dataclass(frozen=True)
class Frame:
    """One captured Ethernet frame."""

    time: float
    data: bytes

    @property
    def ethertype(self) -> int:
        """The frame's EtherType."""
        return int.from_bytes(self.data[12:14], "big")

    @property
    def version(self) -> int:
        """4, 6, or 0 when it is not IP."""
        return {ETHERTYPE_IPV4: 4, ETHERTYPE_IPV6: 6}.get(self.ethertype, 0)

    @property
    def ip(self) -> bytes:
        """The IP datagram without Ethernet padding."""
        packet = self.data[14:]
        length = int.from_bytes(packet[2:4], "big") if self.version == 4 else 40 + int.from_bytes(packet[4:6], "big")
        return packet[: length or None]

    @cached_property
    def _upper(self) -> tuple[int, int, int]:
        """Protocol, offset of its header in the frame, fragment offset in octets."""
        data = self.data
        if self.version == 4:
            return data[23], 14 + (data[14] & 15) * 4, (int.from_bytes(data[20:22], "big") & 0x1FFF) * 8
        protocol, offset, fragment = data[20], 54, 0
        while True:
            if protocol == 44:
                fragment = int.from_bytes(data[offset + 2 : offset + 4], "big") & 0xFFF8
                protocol, offset = data[offset], offset + 8
            elif protocol in _EXTENSIONS and fragment == 0:
                protocol, offset = data[offset], offset + (data[offset + 1] + 1) * 8
            else:
                return protocol, offset, fragment

    @property
    def protocol(self) -> int:
        """Upper-layer protocol (also of a fragment), -1 when it is not IP."""
        return self._upper[0] if self.version else -1

    @property
    def fragment_offset(self) -> int:
        """Octets; 0 for a first fragment and for a whole datagram."""
        return self._upper[2] if self.version else 0

    @property
    def payload(self) -> bytes:
        """From the upper-layer header on."""
        return self.data[self._upper[1] :]

    @property
    def src(self) -> str:
        """Source address as text."""
        return _address(self.data[26:30] if self.version == 4 else self.data[22:38])

    @property
    def dst(self) -> str:
        """Destination address as text."""
        return _address(self.data[30:34] if self.version == 4 else self.data[38:54])

    @property
    def esp(self) -> tuple[int, int] | None:
        """(SPI, sequence number) of an ESP packet's first fragment, UDP encapsulation looked through."""
        if self.version == 0 or self.fragment_offset:
            return None
        payload = self.payload
        if self.protocol == 17 and b"\x11\x94" in (payload[:2], payload[2:4]) and payload[8:12] != bytes(4):
            payload = payload[8:]
        elif self.protocol != 50:
            return None
        if len(payload) < 8:
            return None
        spi, sequence = struct.unpack_from("!II", payload)
        return spi, sequence

    @property
    def is_neighbour_discovery(self) -> bool:
        """IPv6's ARP, router discovery and MLD."""
        return self.protocol == 58 and self.payload[:1] != b"" and self.payload[0] in NEIGHBOUR_DISCOVERY

    @property
    def is_keepalive(self) -> bool:
        """A NAT keepalive (RFC 3948 section 2.3): one octet to port 4500."""
        return self.protocol == 17 and self.payload[2:4] == b"\x11\x94" and self.payload[8:] == b"\xff"

    def __str__(self) -> str:
        if not self.version:
            return {0x0806: "ARP"}.get(self.ethertype, f"ethertype 0x{self.ethertype:04x}")
        what = _NAMES.get(self.protocol, f"protocol {self.protocol}")
        if esp := self.esp:
            what = f"ESP(spi=0x{esp[0]:08x},seq=0x{esp[1]:x})"
        if self.fragment_offset:
            what += f" fragment at {self.fragment_offset}"
        return f"IP{'6' if self.version == 6 else ''} {self.src} > {self.dst}: {what}, length {len(self.payload)}"


class Capture:
    """tcpdump on a device, into a file that lives as long as the lab; it records inside ``with``.

    ``bulk``: nothing is lost at the speed of a TCP transfer, but :meth:`settle` takes a second longer.  ``arriving``:
    only frames that come in by the device.
    """

    def __init__(
        self, space: Namespace, device: str, *, expression: str = "", snaplen: int = 0, bulk: bool = False,
        arriving: bool = False,
    ) -> None:  # fmt: skip
        self.space, self.device = space, device
        self.path: Path = space.lab.directory / f"{space.role}-{device}-{next(_serial)}.pcap"
        self._log = self.path.with_suffix(".log")
        self._bulk = bulk
        # What goes the wrong way is received and not captured; on the loopback each packet goes both ways.
        self._tells_all = not arriving and device != "lo"
        # Immediate mode hands over each frame at once, in slots as large as a frame can be: few fit the buffer, so
        # bulk captures go without it and are up to a second late.
        mode = ["-B", "262144"] if bulk else ["-B", "65536", "-U", "--immediate-mode"]
        self._argv = ["tcpdump", "-n", "-i", device, *mode, "-Z", "root", "-s", str(snaplen)]
        self._argv += ["-Q", "in"] if arriving else []
        self._argv += ["-w", str(self.path), *expression.split()]

    def __enter__(self) -> Capture:
        self._process = self.space.popen(*self._argv, log=self._log)
        wait_for(lambda: self._log.exists() and "listening on" in self._log.read_text(), f"tcpdump on {self.device}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self._process)

    def settle(self, quiet: float = 0.2, limit: float = 5.0) -> None:
        """Wait until nothing more comes and tcpdump has written all that came.

        Traffic that never pauses is waited for no longer than ``limit`` seconds, far more than tcpdump is ever late.
        """
        before: tuple[int, int, int] | None = None
        end = time.monotonic() + limit
        while time.monotonic() < end:
            now = captured, received, dropped = self._tally()
            if now == before and (captured + dropped >= received or not self._tells_all):
                break
            before = now
            time.sleep(quiet + 1.0 * self._bulk)
        self._process.send_signal(signal.SIGUSR2)  # flush, and then be done with it
        self._tally()
        self._tally()

    def _tally(self) -> tuple[int, int, int]:
        """Packets captured, received and dropped, in tcpdump's own words: one that is late answers late."""
        known = len(self._tallies())
        self._process.send_signal(signal.SIGUSR1)
        wait_for(lambda: len(self._tallies()) > known, f"tcpdump's word about {self.device}")
        return self._tallies()[-1]

    def _tallies(self) -> list[tuple[int, int, int]]:
        return [(int(one), int(two), int(three)) for one, two, three in _TALLY.findall(self._log.read_text())]

    @property
    def lost(self) -> int:
        """Frames that the kernel could not hand to tcpdump; known after the capture has ended."""
        if self._process.poll() is None or not (tallies := self._tallies()):
            raise LabError(f"tcpdump has not ended properly: {self._log.read_text()}")
        return tallies[-1][2]

    def frames(self) -> list[Frame]:
        """All frames so far."""
        return list(read(self.path))

    def contains(self, needle: bytes) -> bool:
        """Does any captured frame hold these octets?"""
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(needle) >= 0


def read(path: Path) -> Iterator[Frame]:
    """Frames of a pcap file (microseconds or nanoseconds, either byte order), a half-written last one left out."""
    with path.open("rb") as file:
        header = file.read(24)
        if len(header) < 24:
            return
        order = "<" if header[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
        scale = 1e9 if header[:4] in (b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d") else 1e6
        while len(record := file.read(16)) == 16:
            seconds, fraction, size, _ = struct.unpack(order + "IIII", record)
            data = file.read(size)
            if len(data) < size:
                return
            yield Frame(seconds + fraction / scale, data)


def in_clear(frames: Iterable[Frame], *networks: str) -> list[Frame]:
    """Frames that show a protected network's address in their outermost header: each one is a leak."""
    nets = [ipaddress.ip_network(text) for text in networks]

    @cache  # a capture has few addresses and many frames
    def inside(text: str) -> bool:
        return any(ipaddress.ip_address(text) in net for net in nets)

    return [frame for frame in frames if frame.version and (inside(frame.src) or inside(frame.dst))]


def other_than_esp(frames: Iterable[Frame]) -> list[Frame]:
    """Frames that are neither ESP (bare or in UDP, with its keepalives) nor address resolution."""
    return [
        frame for frame in frames
        if frame.version and frame.protocol != 50 and frame.esp is None and not frame.is_neighbour_discovery
        and not frame.is_keepalive
    ]  # fmt: skip


def repeated_sequence_numbers(frames: Iterable[Frame]) -> list[tuple[str, int, int]]:
    """(destination, SPI, sequence) seen more than once with different content: a reused IV."""
    seen: dict[tuple[str, int, int], bytes] = {}
    twice = []
    for frame in frames:
        if esp := frame.esp:
            key = (frame.dst, *esp)
            if seen.setdefault(key, frame.payload) != frame.payload:
                twice.append(key)
    return twice


def inject(space: Namespace, device: str, *frames: bytes) -> None:
    """Put Ethernet frames on the wire as they are."""
    with space.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind((device, 0))
        for frame in frames:
            raw.send(frame)
