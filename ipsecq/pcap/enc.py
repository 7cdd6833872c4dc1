"""Link type 109: packets with the header of enc(4), as workers hand them over and as pcapng for those who read captures.

A worker's message holds the packets of (a part of) a batch::

    worker u16, packets u16, dropped u32             dropped: by this worker since the message before
    for each: time u64 (ns since 1970), captured u32, length u32, kind u8, enc header and packet (captured octets)

in host order, as both ends are on one machine.  The enc header is family u32 and flags u32 in host order, SPI u32 in
network order between them.  Sources: enc(4), https://www.tcpdump.org/linktypes.html, draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

from struct import Struct
from typing import BinaryIO, Final, NamedTuple

LINKTYPE_ENC: Final = 109
HEADER_LENGTH: Final = 12

MESSAGE: Final = Struct("=HHI")
RECORD: Final = Struct("=QIIB")

_OUT: Final = 4
_VIEWS: Final = {
    1: "in, before: decrypted, outer header on",
    2: "in, after: outer header off",
    5: "out, before: in clear",
    6: "out, after: encapsulated, not yet encrypted",
}
_SECTION: Final = Struct("<IIIHHqI")
_INTERFACE: Final = Struct("<IIHHI")
_PACKET: Final = Struct("<IIIIIII")
_FLAGS: Final = Struct("<HHIHH")
_STATISTICS: Final = Struct("<IIIII")
_U64_OPTION: Final = Struct("<HHQ")
_BYTE_ORDER: Final = 0x1A2B3C4D


class EncRecord(NamedTuple):
    """One packet as a worker saw it."""

    time: int
    """Nanoseconds since 1970."""
    kind: int
    """A view, 1 before or 2 after, plus 4 when it leaves."""
    length: int
    """Octets with the enc header, before the capture cut them."""
    data: bytes
    """The enc header and the packet."""


def read_message(octets: bytes) -> tuple[int, int, list[EncRecord]]:
    """(worker, packets that it dropped since its last message, packets) of a worker's message."""
    worker, count, dropped = MESSAGE.unpack_from(octets)
    records = []
    at = MESSAGE.size
    for _ in range(count):
        time, captured, length, kind = RECORD.unpack_from(octets, at)
        at += RECORD.size
        records.append(EncRecord(time, kind, length, octets[at : at + captured]))
        at += captured
    return worker, dropped, records


class EncWriter:
    """A pcapng stream of link type 109: an interface for each view, directions, and at the end how much was lost."""

    def __init__(self, stream: BinaryIO, snaplen: int, device: str = "enc0") -> None:
        self._stream = stream
        self._snaplen, self._device = snaplen, device
        self._numbers: dict[int, int] = {}
        self.packets = 0
        # Length of the section unknown: it is written as it comes.
        stream.write(_SECTION.pack(0x0A0D0D0A, 28, _BYTE_ORDER, 1, 0, -1, 28))

    def write(self, record: EncRecord) -> None:
        """Append one packet."""
        number = self._numbers.get(record.kind)
        if number is None:
            number = self._numbers[record.kind] = len(self._numbers)
            self._stream.write(self._interface(_VIEWS[record.kind]))
        size = len(record.data)
        padding = bytes(-size & 3)
        total = 28 + size + len(padding) + 12 + 4
        head = _PACKET.pack(
            6, total, number, record.time >> 32, record.time & 0xFFFFFFFF, size, max(record.length, size)
        )
        direction = _FLAGS.pack(2, 4, 2 if record.kind & _OUT else 1, 0, 0)
        self._stream.write(b"".join((head, record.data, padding, direction, total.to_bytes(4, "little"))))
        self.packets += 1

    def close(self, now: int, dropped: int) -> None:
        """Say how many packets were lost, as of ``now`` (ns since 1970); the stream stays open."""
        for number in self._numbers.values():
            options = b""
            if number == 0:
                options = _U64_OPTION.pack(4, 8, self.packets + dropped) + _U64_OPTION.pack(5, 8, dropped)
            options += bytes(4)
            total = 24 + len(options)
            head = _STATISTICS.pack(5, total, number, now >> 32, now & 0xFFFFFFFF)
            self._stream.write(head + options + total.to_bytes(4, "little"))
        self._stream.flush()

    def _interface(self, description: str) -> bytes:
        options = _option(2, self._device.encode()) + _option(3, description.encode()) + _option(9, b"\x09") + bytes(4)
        total = 20 + len(options)
        return _INTERFACE.pack(1, total, LINKTYPE_ENC, 0, self._snaplen) + options + total.to_bytes(4, "little")


def _option(code: int, value: bytes) -> bytes:
    return code.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value + bytes(-len(value) & 3)

