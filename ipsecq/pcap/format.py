"""Capture files, one packet at a time: pcap (micro- and nanoseconds, either byte order) and pcapng.

Sources: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng.  Memory holds one record, whatever the size of the file.
Times are integers, nanoseconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO, Final, NamedTuple

from ipsecq.errors import CaptureError

MAX_RECORD: Final = 1 << 20
"""Longest packet that is believed; the tools that write captures stop at 262144 octets."""
SNAPLEN: Final = 262144

MICROSECONDS: Final = 0xA1B2C3D4
NANOSECONDS: Final = 0xA1B23C4D
_SECTION: Final = 0x0A0D0D0A
_BYTE_ORDER: Final = 0x1A2B3C4D
_INTERFACE: Final = 1
_OLD_PACKET: Final = 2
_SIMPLE_PACKET: Final = 3
_PACKET: Final = 6
_SECTION_MAGIC: Final = _SECTION.to_bytes(4, "big")
_COMPRESSED: Final = {b"\x1f\x8b": "gunzip", b"\x28\xb5": "zstd -d", b"\xfd7": "unxz", b"BZ": "bunzip2"}
_OTHERS: Final = {0xA1B2CD34: "pcap as patched by A. Kuznetsov", 0xA1E2CB12: "NetScout's pcap"}

_OPTION_END: Final = 0
_OPTION_TSRESOL: Final = 9
_OPTION_TSOFFSET: Final = 14
_MAX_INTERFACES: Final = 65536
_NS: Final = 1_000_000_000
_CHUNK: Final = 1 << 16


class Record(NamedTuple):
    """One packet of a capture."""

    time: int
    """Nanoseconds since 1970."""
    link: int
    """Link type: https://www.tcpdump.org/linktypes.html."""
    data: bytes
    wire_length: int
    """Octets that it had on the wire: more than ``data`` when the capture cut it."""


class Reader:
    """The packets of a capture file; ``stream`` is read forward only, so a pipe will do.

    Iterating gives :class:`Record` after record.  CaptureError, on one line and with the place in the file: what is no
    capture at all when the object is made, what is truncated or corrupt when the iteration comes to it.  ``pcapng``,
    ``nanoseconds`` and ``link`` (of a pcapng file: -1, each packet has its own) say what the file is; ``position`` counts
    the octets read.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.position = 0
        self.packets = 0
        self.link = -1
        magic = self._read(4, "file header")
        self.pcapng = magic == _SECTION_MAGIC
        self.nanoseconds = self.pcapng
        if not self.pcapng:
            self._order = self._pcap_header(magic)
            return
        self._order = "<"
        self._section()

    def __iter__(self) -> Iterator[Record]:
        return self._blocks() if self.pcapng else self._pcap_records()

    # -- reading ---------------------------------------------------------------------------------------

    def _read(self, size: int, what: str) -> bytes:
        data = self._stream.read(size)
        self.position += len(data)
        if len(data) < size:
            raise self._error(f"the file ends in the middle of a {what}: it is truncated")
        return data

    def _skip(self, size: int, what: str) -> None:
        while size > 0:
            size -= len(self._read(min(size, _CHUNK), what))

    def _more(self) -> bytes:
        """The first four octets of the next record, or b"" at the end of the file."""
        data = self._stream.read(4)
        self.position += len(data)
        if 0 < len(data) < 4:
            raise self._error("the file ends in the middle of a record: it is truncated")
        return data

    def _error(self, message: str) -> CaptureError:
        return CaptureError(f"{self._name}: octet {self.position}, packet {self.packets + 1}: {message}")

    # -- pcap ------------------------------------------------------------------------------------------

    def _pcap_header(self, magic: bytes) -> str:
        for order, name in (("<", "little"), (">", "big")):
            number = int.from_bytes(magic, name)  # type: ignore[arg-type]
            if number in {MICROSECONDS, NANOSECONDS}:
                self.nanoseconds = number == NANOSECONDS
                major, minor, link = Struct(order + "HH12xI").unpack(self._read(20, "file header"))
                if major != 2:
                    raise CaptureError(f"{self._name}: pcap version {major}.{minor} is not known: 2.4 is")
                self.link = link & 0xFFFF  # the upper half is about the frame check sequence
                return order
            if number in _OTHERS:
                raise CaptureError(f"{self._name}: is {_OTHERS[number]}: convert it with 'editcap -F pcapng'")
        command = _COMPRESSED.get(magic[:2])
        if command:
            raise CaptureError(f"{self._name}: is compressed: use '{command}' on it first")
        raise CaptureError(f"{self._name}: is neither pcap nor pcapng: it begins with 0x{magic.hex()}")

    def _pcap_records(self) -> Iterator[Record]:
        header = Struct(self._order + "IIII")
        unit = 1 if self.nanoseconds else 1000
        while first := self._more():
            seconds, fraction, size, wire = header.unpack(first + self._read(12, "packet header"))
            if size > MAX_RECORD:
                raise self._error(f"a packet of {size} octets: the file is corrupt")
            data = self._read(size, "packet")
            yield Record(seconds * _NS + fraction * unit, self.link, data, max(wire, size))
            self.packets += 1

    # -- pcapng ----------------------------------------------------------------------------------------

    def _section(self) -> None:
        """A section header block, whose type has been read."""
        head = self._read(8, "section header")
        self._order = "<" if int.from_bytes(head[4:], "little") == _BYTE_ORDER else ">"
        if int.from_bytes(head[4:], "big" if self._order == ">" else "little") != _BYTE_ORDER:
            raise self._error(f"byte-order magic 0x{head[4:].hex()}: the file is corrupt")
        (length,) = Struct(self._order + "I").unpack(head[:4])
        if length < 28 or length & 3:
            raise self._error(f"a section header of {length} octets: the file is corrupt")
        major, minor = Struct(self._order + "HH").unpack(self._read(4, "section header"))
        if major != 1:
            raise self._error(f"pcapng version {major}.{minor} is not known: 1.0 is")
        self._skip(length - 20, "section header")
        self._trailer(length)
        self._interfaces: list[tuple[int, int, int, int, int]] = []

    def _trailer(self, length: int) -> None:
        again = int.from_bytes(self._read(4, "block"), "big" if self._order == ">" else "little")
        if again != length:
            raise self._error(f"a block of {length} octets says {again} at its end: the file is corrupt")

    def _blocks(self) -> Iterator[Record]:
        while first := self._more():
            if first == _SECTION_MAGIC:
                self._section()
                continue
            kind, length = Struct(self._order + "II").unpack(first + self._read(4, "block"))
            if length < 12 or length & 3:
                raise self._error(f"a block of {length} octets: the file is corrupt")
            size = length - 12
            if kind not in {_INTERFACE, _OLD_PACKET, _SIMPLE_PACKET, _PACKET}:
                self._skip(size, "block")
                self._trailer(length)
                continue
            if size > MAX_RECORD + _CHUNK:
                raise self._error(f"a block of {length} octets for one packet: the file is corrupt")
            body = self._read(size, "block")
            self._trailer(length)
            if kind == _INTERFACE:
                self._interface(body)
            else:
                yield self._packet(kind, body)
                self.packets += 1

    def _interface(self, body: bytes) -> None:
        """An interface description: link type, snap length, and the unit and origin of its times."""
        if len(body) < 8:
            raise self._error("an interface description without link type: the file is corrupt")
        if len(self._interfaces) == _MAX_INTERFACES:
            raise self._error(f"more than {_MAX_INTERFACES} interfaces: the file is corrupt")
        link, snaplen = Struct(self._order + "HxxI").unpack_from(body)
        times, per, offset = 1000, 1, 0
        option = Struct(self._order + "HH")
        at = 8
        while at + 4 <= len(body):
            code, length = option.unpack_from(body, at)
            value = body[at + 4 : at + 4 + length]
            at += 4 + length + (-length & 3)
            if code == _OPTION_END:
                break
            if code == _OPTION_TSRESOL and len(value) == 1:
                power = value[0] & 0x7F
                units = 2**power if value[0] & 0x80 else 10**power
                times, per = _NS, units
            elif code == _OPTION_TSOFFSET and len(value) == 8:
                offset = int.from_bytes(value, "big" if self._order == ">" else "little", signed=True) * _NS
        self._interfaces.append((link, snaplen, times, per, offset))

    def _packet(self, kind: int, body: bytes) -> Record:
        if kind == _SIMPLE_PACKET:
            if len(body) < 4:
                raise self._error("a packet block without a length: the file is corrupt")
            (wire,) = Struct(self._order + "I").unpack_from(body)
            link, snaplen, _, _, _ = self._by_number(0)
            size = min(wire, snaplen or wire)
            if size > len(body) - 4:
                raise self._error(f"a packet of {size} octets in a block of {len(body)}: the file is corrupt")
            return Record(0, link, body[4 : 4 + size], wire)
        layout = Struct(self._order + ("HxxIIII" if kind == _OLD_PACKET else "IIIII"))
        if len(body) < 20:
            raise self._error("a packet block without its header: the file is corrupt")
        number, high, low, size, wire = layout.unpack_from(body)
        link, _, times, per, offset = self._by_number(number)
        if size > len(body) - 20:
            raise self._error(f"a packet of {size} octets in a block of {len(body)}: the file is corrupt")
        time = (high << 32 | low) * times // per + offset
        return Record(time, link, body[20 : 20 + size], max(wire, size))

    def _by_number(self, number: int) -> tuple[int, int, int, int, int]:
        if number >= len(self._interfaces):
            raise self._error(f"interface {number} was not described: the file is corrupt")
        return self._interfaces[number]


class Writer:
    """A capture file in the making.  ``link`` is that of all packets of a pcap file, unused for pcapng."""

    _PCAP: Final = Struct("<IHHiIII")
    _RECORD: Final = Struct("<IIII")
    _ENHANCED: Final = Struct("<IIIIIII")

    def __init__(self, stream: BinaryIO, *, pcapng: bool, nanoseconds: bool = True, link: int = -1) -> None:
        self._stream = stream
        self._pcapng = pcapng
        self._unit = 1 if nanoseconds else 1000
        self._link = link
        self._numbers: dict[int, int] = {}
        self.packets = 0
        if pcapng:
            # Length of the section unknown: it is written as it comes.
            stream.write(Struct("<IIIHHqI").pack(_SECTION, 28, _BYTE_ORDER, 1, 0, -1, 28))
        else:
            magic = NANOSECONDS if nanoseconds else MICROSECONDS
            stream.write(self._PCAP.pack(magic, 2, 4, 0, 0, SNAPLEN, link))

    @classmethod
    def like(cls, stream: BinaryIO, reader: Reader, link: int) -> Writer:
        """A file of the same kind as the one that ``reader`` reads; ``link`` is what its packets will have (pcap)."""
        return cls(stream, pcapng=reader.pcapng, nanoseconds=reader.nanoseconds, link=link)

    def write(self, record: Record) -> None:
        """Append one packet.  ValueError when a pcap file has another link type than the packet."""
        if self._pcapng:
            self._write_block(record)
        else:
            if record.link != self._link:
                raise ValueError(f"a packet of link type {record.link} in a pcap file of type {self._link}")
            seconds, rest = divmod(record.time, _NS)
            head = self._RECORD.pack(
                seconds & 0xFFFFFFFF, rest // self._unit, len(record.data), max(record.wire_length, len(record.data))
            )
            self._stream.write(head + record.data)
        self.packets += 1

    def _write_block(self, record: Record) -> None:
        number = self._numbers.get(record.link)
        if number is None:
            number = self._numbers[record.link] = len(self._numbers)
            # One option: times in units of 10^-9 seconds.
            self._stream.write(
                Struct("<IIHHIHHB3xHHI").pack(_INTERFACE, 32, record.link, 0, SNAPLEN, _OPTION_TSRESOL, 1, 9, 0, 0, 32)
            )
        size = len(record.data)
        padding = -size & 3
        total = 32 + size + padding
        time = record.time & 0xFFFFFFFFFFFFFFFF
        head = self._ENHANCED.pack(
            _PACKET, total, number, time >> 32, time & 0xFFFFFFFF, size, max(record.wire_length, size)
        )
        self._stream.write(b"".join((head, record.data, bytes(padding), total.to_bytes(4, "little"))))
