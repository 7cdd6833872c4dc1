"""What is fuzzed: one function for each target, from octets to nothing.

A target raises when a rule is broken: an exception that its subject must not raise, or a property that must hold.  The
functions keep no state from one input to the next, so that every finding can be repeated.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

from ipsecq.crypto import registry
from ipsecq.daemon import config as configuration
from ipsecq.errors import CaptureError, ConfigError, PolicySyntaxError
from ipsecq.packet import checksum, coalesce, extensions, fragments, icmp, ipv4, ipv6, segments
from ipsecq.packet.view import PacketView
from ipsecq.pcap import tool
from ipsecq.pcap.format import Reader, Writer
from ipsecq.pfkey import messages
from ipsecq.pfkey.constants import Dialect
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.memory import MemoryDatabase
from ipsecq.pfkey.server import PfkeyServer
from ipsecq.policy import setpolicy
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey import commands, printer
from ipsecq.setkey.apply import Applied, apply
from ipsecq.setkey.parser import parse
from ipsecq.transforms import ipcomp

NOW = 1_700_000_000.0
SRC4, DST4 = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))
SRC6, DST6 = bytes.fromhex("20010db8000000000000000000000001"), bytes.fromhex("20010db8000000000000000000000002")

TARGETS: dict[str, Callable[[bytes], None]] = {}


def target(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
    TARGETS[function.__name__] = function
    return function


class Cursor:
    """Decisions from the front of an input; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece.ljust(size, b"\0")

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def rest(self) -> bytes:
        rest = self.data[self.at :]
        self.at = len(self.data)
        return rest

    def more(self) -> bool:
        return self.at < len(self.data)


def one_line(error: Exception) -> None:
    if len(str(error).splitlines()) != 1:
        raise AssertionError(f"a message of several lines: {str(error)!r}")


# -- packet ------------------------------------------------------------------------------------------------


@target
def packet(data: bytes) -> None:
    """Views, extension headers, checksums, ICMP errors, segmentation and coalescing of any octets."""
    view = PacketView()
    extensions.iter_ipv4_options(data)
    for part in extensions.iter_ipv6_headers(data) or ():
        assert part.offset + part.length <= len(data)
        extensions.iter_ipv6_options(data, part)
    error = icmp.parse_error(data)
    assert error is None or len(error.inner_src) in (4, 16)
    runs = coalesce.coalesce([data, data])
    assert 1 <= len(runs) <= 2
    assert sum(len(part) for run in runs for part in run.parts) >= len(data)
    if not view.load(data):
        assert not icmp.too_big(data, 1400, SRC4)
        assert not fragments.fragment(data, 1280, 1)
        return
    assert 20 <= view.header_length <= view.offset <= view.length <= len(data)
    assert len(view.src) == len(view.dst) == (4 if view.version == 4 else 16)
    assert data[view.nexthdr_offset] == view.protocol
    assert len(extensions.final_destination(data, view)) == len(view.dst)
    own = SRC4 if view.version == 4 else SRC6
    if made := icmp.too_big(data, 1400, own):
        told = icmp.parse_error(made)
        # A quotation that was cut within its extension headers cannot be read again.
        assert told is not None or view.offset > view.header_length or view.length > 500
    completed = checksum.complete(data)
    if view.protocol in (6, 17) and completed and not view.is_fragment and len(completed) == view.length:
        checksum.verify_transport(completed)
    segments.split(data, 64 + data[-1])


@target
def fragment(data: bytes) -> None:
    """A datagram cut into fragments fits the MTU and is the same when it is put together again."""
    cursor = Cursor(data)
    mtu, datagram = 28 + cursor.u16() % 2000, cursor.rest()
    view = PacketView()
    pieces = fragments.fragment(datagram, mtu, 0x1234)
    assert all(len(piece) <= mtu for piece in pieces)
    if not view.load(datagram) or not pieces or view.fragment_header or view.is_fragment:
        return
    reassembler = fragments.Reassembler(1 << 20, 16, 60.0)
    whole = [reassembler.add(piece, NOW) for piece in pieces]
    assert whole[:-1] == [None] * (len(pieces) - 1)
    assert whole[-1] is not None
    assert whole[-1][view.header_length :] == datagram[view.header_length : view.length]
    assert reassembler.octets == 0
    if view.version == 6:
        assert whole[-1] == datagram[: view.length]


@target
def reassembly(data: bytes) -> None:
    """Fragments in any order, overlap and number: what comes out is what each accepted fragment said."""
    cursor = Cursor(data)
    reassembler = fragments.Reassembler(4096, 4, 10.0, limit_per_source=3)
    said: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
    view = PacketView()
    now = NOW
    while cursor.more():
        flags, offset, size = cursor.u8(), cursor.u8() << 3, cursor.u8()
        body = bytes([flags ^ offset & 0xFF]) * size
        identification, more = flags >> 1 & 3, flags & 1
        if flags & 0x40:
            offset <<= 5
        if flags & 8:
            head = ipv6.header(SRC6, DST6, 44, 8 + size, traffic_class=flags >> 6)
            word = offset & 0xFFF8 | more
            piece = head + b"\x11\0" + word.to_bytes(2, "big") + identification.to_bytes(4, "big") + body
        else:
            head = bytearray(ipv4.header(SRC4, DST4, 17, size, tos=flags >> 6, identification=identification))
            head[6:8] = (offset >> 3 & 0x1FFF | more << 13).to_bytes(2, "big")
            piece = bytes(head) + body
        now += flags >> 4 & 3
        assert view.load(piece)
        key = (view.version, identification)
        whole = reassembler.add(piece, now)
        if view.is_fragment:
            said.setdefault(key, []).append((view.fragment_offset, body))
        assert 0 <= reassembler.octets <= 4096
        assert reassembler.datagrams <= 4
        if whole is None:
            continue
        assert view.load(whole)
        assert not view.is_fragment
        payload = whole[view.header_length : view.length]
        if key in said and size and (offset or more):
            # Whatever else was sent, each octet that comes out was said at its place.
            claimed: list[set[int]] = [set() for _ in payload]
            for start, octets in said[key]:
                for at, octet in enumerate(octets[: max(0, len(payload) - start)]):
                    claimed[start + at].add(octet)
            assert all(octet in claims for octet, claims in zip(payload, claimed, strict=True))


@target
def compression(data: bytes) -> None:
    """DEFLATE: bounded output, no exception on hostile octets, and what is sealed opens."""
    cursor = Cursor(data)
    limit, body = cursor.u16() or 1, cursor.rest()
    transform = ipcomp.IpcompTransform(registry.compression("deflate").cpi)
    reason, next_header, payload = transform.open(b"\x11\0\0\2" + body, limit)
    assert reason or (next_header == 17 and 0 < len(payload) <= limit)
    sealed = transform.seal(body, 6)
    assert sealed is None or len(sealed) < len(body)
    if sealed is not None and len(body) <= 65535:
        assert transform.open(sealed, 65535) == (0, 6, body)


# -- what people and programs write ------------------------------------------------------------------------


@target
def setkey(data: bytes) -> None:
    """Any text: commands or a ConfigError on one line; SAs and policies survive being printed and read again."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        parsed = parse(text, "file")
        applied = apply(parsed, Sad(), Spd(), now=NOW, file="file", allow_legacy=True)
    except ConfigError as error:
        one_line(error)
        if not error.line:
            raise
        return
    again = "".join(printer.config_sa(sa) + "\n" for sa in applied.sad)
    again += "".join(printer.config_policy(policy) + "\n" for policy in applied.spd.dump())
    second = apply(parse(again), Sad(), Spd(), now=NOW, allow_legacy=True)
    assert len(list(second.sad)) == len(list(applied.sad)), again
    assert len(second.spd.dump()) == len(applied.spd.dump()), again
    for command in parsed:
        assert isinstance(command, commands.Command)


@target
def policy_string(data: bytes) -> None:
    """ipsec_set_policy(3): a policy or a PolicySyntaxError; what is printed means the same."""
    text = data.decode("utf-8", "replace")
    try:
        spec = setpolicy.parse(text)
    except PolicySyntaxError:
        return
    assert setpolicy.parse(setpolicy.format(spec)) == spec, text


@target
def config(data: bytes) -> None:
    """The configuration file: accepted or a ConfigError on one line."""
    try:
        configuration.parse(data.decode("utf-8", "replace"), Path("/etc/ipsecq/ipsecq.toml"))
    except ConfigError as error:
        one_line(error)


@target
def pfkey(data: bytes) -> None:
    """PF_KEY messages: PfkeyError or a message, and what is built of that is parsed to the same."""
    for dialect in Dialect:
        for reply in (False, True):
            try:
                message = messages.parse(data, dialect, reply=reply)
            except PfkeyError:
                continue
            try:
                built = messages.build(message, dialect)
            except PfkeyError:
                continue
            assert messages.parse(built, dialect, reply=reply) == message


@target
def pfkey_server(data: bytes) -> None:
    """Datagrams of a client, one after the other: the server answers all of them and raises nothing."""
    cursor = Cursor(data)
    dialect = list(Dialect)[cursor.u8() & 1]
    server = PfkeyServer(MemoryDatabase(), lambda: NOW, random.Random(1).randrange)
    server.open(1, privileged=True, dialect=dialect)
    server.open(2, privileged=False, dialect=dialect)
    while cursor.more():
        choice, words = cursor.u8(), cursor.u8()
        body = cursor.take(min(words * 8, 2040))
        if choice & 1 and len(body) >= 16:  # lengths and version that fit, so that more is reached
            body = b"\2" + body[1:4] + words.to_bytes(2, "little") + b"\0\0" + body[8:]
        for client, reply in server.handle(1 + (choice >> 7), body):
            assert client in (1, 2)
            messages.parse(reply, dialect, reply=True)
        while rest := server.more(1, 8):
            for reply in rest:
                messages.parse(reply, dialect, reply=True)
    server.tick()


@target
def pcap(data: bytes) -> None:
    """Capture files: CaptureError or packets, which pass through the tool and are read back from what it writes."""
    cursor = Cursor(data)
    choice = cursor.u8()
    stream = cursor.rest()
    try:
        reader = Reader(io.BytesIO(stream), "file")
    except CaptureError as error:
        one_line(error)
        return
    sink = io.BytesIO()
    writer = Writer.like(sink, reader, tool.links.written_as(reader.link))
    worker: tool.Worker
    if choice & 1:
        worker = tool.Decryptor(_content().sad, random.Random(1).randbytes, replay=bool(choice & 2))
    else:
        worker = tool.Encryptor(_content().sad, _content().spd.dump(), random.Random(1).randbytes, mtu=(choice & 0xFC) * 8)
    lines: list[str] = []
    report = tool.run(reader, writer, worker, keep_others=bool(choice & 2), say=lines.append)
    assert len(lines) == report.packets
    assert all("\n" not in line for line in [*lines, *report.lines()])
    sink.seek(0)
    assert len(list(Reader(sink, "written"))) == report.written


_CONTENT = """
add 192.0.2.1 192.0.2.2 esp 0x1001 -m tunnel -r 4 -E aes-gcm-16 0x1111111111111111111111111111111111111111;
add 192.0.2.1 192.0.2.2 ipcomp 0x1002 -m transport -C deflate;
spdadd 10.0.0.0/8 0.0.0.0/0 any -P out ipsec esp/tunnel/192.0.2.1-192.0.2.2/require;
spdadd 192.0.2.1 192.0.2.2 any -P out ipsec ipcomp/transport//use;
spdadd ::/0 ::/0 tcp -P out discard;
"""


def _content() -> Applied:
    return apply(parse(_CONTENT), Sad(), Spd(), now=NOW)
