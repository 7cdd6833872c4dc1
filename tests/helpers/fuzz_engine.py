"""Fuzz targets of the engine: any octets, well-sealed nonsense, and round trips through two gateways."""

from __future__ import annotations

import random

from fuzz_targets import DST4, DST6, NOW, SRC4, SRC6, Cursor, target

from ipsecq.counters import Counter, Fate
from ipsecq.crypto import cipher
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound import Inbound
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.standalone import build
from ipsecq.engine.tables import Tables
from ipsecq.numbers import IPPROTO_IPV4, IPPROTO_IPV6, IPPROTO_UDP
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.fragments import Reassembler
from ipsecq.packet.view import PacketView
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SecurityAssociation, Slot
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import Applied, apply
from ipsecq.setkey.parser import parse
from ipsecq.transforms import natt
from ipsecq.transforms.ah import AhTransform
from ipsecq.transforms.esp import EspTransform

_KEYS = (
    "esp 0x1000 -r 8 -E aes-gcm-16 0x" + "11" * 20,
    "esp 0x1001 -r 8 -E aes-cbc 0x" + "22" * 16 + " -A hmac-sha2-256 0x" + "33" * 32,
    "esp 0x1002 -E null -A hmac-sha1 0x" + "44" * 20,
    "esp 0x1003 -r 8 -E aes-ctr 0x" + "55" * 20 + " -A aes-xcbc-mac 0x" + "66" * 16,
    "esp-udp 0x1004 -r 8 -E chacha20-poly1305 0x" + "77" * 36,
    "esp 0x1005 -r 8 -esn -E aes-ccm-8 0x" + "88" * 19,
    "ah 0x1006 -r 8 -A hmac-sha2-256 0x" + "99" * 32,
    "ah 0x1007 -m tunnel -A aes-gmac 0x" + "aa" * 20,
    "ipcomp 0x1008 -C deflate",
    "ipcomp 0x1009 -m tunnel -C deflate",
    "esp 0x100a -m tunnel -r 8 -E aes-gcm-8 0x" + "bb" * 20,
    "esp 0x100b -m transport -E null -A aes-gmac 0x" + "cc" * 20,
)
_ENDS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
_ADDRESSES = {4: (SRC4, DST4), 6: (SRC6, DST6)}


def _apply(text: str) -> Applied:
    return apply(parse(text), Sad(), Spd(), now=NOW)


def _tables(text: str) -> Tables:
    applied = _apply(text)
    return build(list(applied.sad), applied.spd.dump(), random.Random(1).randbytes)


_INBOUND = _tables(
    "".join(f"add {a} {b} {keys};\n" for a, b in _ENDS.values() for keys in _KEYS)
    + "spdadd 10.0.0.0/8 0.0.0.0/0 any -P in ipsec esp/tunnel/192.0.2.1-192.0.2.2/require;\n"
    + "spdadd 10.9.0.0/16 0.0.0.0/0 udp -P in discard;\n"
)
_BY_SPI: dict[tuple[int, int], SecurityAssociation] = {(sa.family, sa.spi): sa for sa in _INBOUND.sad}


def _inbound() -> Inbound:
    _INBOUND.words[:] = memoryview(bytes(8 * len(_INBOUND.words))).cast("Q")
    return Inbound(_INBOUND, Reassembler(1 << 18, 8, 30.0))


@target
def engine_inbound(data: bytes) -> None:
    """Any octets, as several packets: a fate for each, and no inner packet without an ICV that fits."""
    cursor = Cursor(data)
    inbound, emit = _inbound(), Emissions()
    while cursor.more():
        size = cursor.u16() % 2048
        packet = bytearray(cursor.take(size))
        if size > 40 and packet[0] & 0x80:  # an address of ours, else nearly nothing gets past the SAD
            packet[0] = 0x45 if packet[0] & 1 else 0x60
            at = 16 if packet[0] == 0x45 else 24
            packet[at - len(SRC4 if at == 16 else SRC6) : at] = SRC4 if at == 16 else SRC6
            packet[at : at + (4 if at == 16 else 16)] = DST4 if at == 16 else DST6
            if at == 16:
                packet[2:4] = size.to_bytes(2, "big")
            else:
                packet[4:6] = (size - 40).to_bytes(2, "big")
        fate = inbound.process(bytes(packet), NOW, emit)
        assert isinstance(fate, int)
        assert fate in list(Fate) or Counter(fate)


def _ip(version: int, protocol: int, length: int) -> bytes:
    src, dst = _ADDRESSES[version]
    if version == 4:
        return ipv4.header(src, dst, protocol, length, ttl=64)
    return ipv6.header(src, dst, protocol, length)


def _seal(sa: SecurityAssociation, payload: bytes, next_header: int, sequence: int) -> tuple[int, bytes]:
    """What follows the IP header, and its protocol: the payload under one SA, authentic in all of its octets."""
    protocol = int(sa.protocol)
    if sa.compression:
        # Not through the transform, which leaves alone what would not shrink.
        import zlib

        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        body = packer.compress(payload) + packer.flush()
        return protocol, bytes((next_header, 0)) + sa.spi.to_bytes(2, "big") + body
    if sa.encryption is None:
        transform = AhTransform(sa.spi, cipher.icv(sa.authentication or "", sa.authentication_key), esn=sa.esn)
        prefix = _ip(sa.family, protocol, transform.header_length(sa.family) + len(payload))
        sealed = transform.seal(payload, next_header, sequence, prefix)
        assert sealed is not None
        return protocol, sealed[len(prefix) :]
    built = cipher.build(sa.encryption, sa.encryption_key, sa.authentication, sa.authentication_key)
    esp = EspTransform(sa.spi, built, esn=sa.esn)
    sealed = esp.seal(payload, next_header, sequence, bytes(esp.random_length))
    if sa.natt is not None:
        return IPPROTO_UDP, natt.header(sa.natt.sport, sa.natt.dport, 8 + len(sealed)) + sealed
    return protocol, sealed


@target
def engine_sealed(data: bytes) -> None:
    """Authentic nonsense in up to six layers: a fate and no exception; an ESP packet with a flipped bit is never opened."""
    cursor = Cursor(data)
    inbound, emit = _inbound(), Emissions()
    for sequence in range(1, 1 + (cursor.u8() & 3) + 1):
        layers = [cursor.u8() for _ in range(1 + cursor.u8() % 6)]
        flip, next_header = cursor.u16(), cursor.u8()
        payload = cursor.take(cursor.u16() % 512)
        version = inner = 4
        sa = None
        for number, layer in enumerate(layers):
            version = 6 if layer & 0x20 else 4 if number == 0 or layer & 0x40 else version
            if number and layer & 0x10:  # a whole packet inside: tunnel mode
                payload = _ip(inner, next_header, len(payload)) + payload
                next_header = IPPROTO_IPV4 if inner == 4 else IPPROTO_IPV6
            elif number:
                version = inner
            sa = _BY_SPI[version, 0x1000 + layer % len(_KEYS)]
            next_header, payload = _seal(sa, payload, next_header, sequence)
            inner = version
        datagram = bytearray(_ip(version, next_header, len(payload)) + payload)
        start = len(datagram) - len(payload)
        flipped = bool(flip & 0x8000)
        if flipped:
            at = (flip & 0x7FFF) % (len(datagram) * 8)
            datagram[at >> 3] ^= 1 << (at & 7)
        emit.clear()
        fate = inbound.process(bytes(datagram), NOW, emit)
        assert fate in list(Fate) or Counter(fate)
        if flipped and at >> 3 >= start and sa is not None and sa.encryption and sa.natt is None:
            assert fate not in (Fate.DONE, Fate.PASS), f"accepted with bit {at} flipped"
            assert not emit.inner
        for packet in emit.inner:
            view = PacketView()
            assert view.load(packet)
            assert view.length == len(packet)


_POLICIES = (
    ("esp/tunnel/{a4}-{b4}/require", (0,)),
    ("esp/tunnel/{a6}-{b6}/require", (1,)),
    ("esp/transport//require", (3,)),
    ("ah/transport//require", (6,)),
    ("ipcomp/transport//use esp/transport//require ah/transport//require", (8, 0, 6)),
    ("ipcomp/tunnel/{a6}-{b6}/use esp/tunnel/{a4}-{b4}/require", (9, 10)),
    ("esp/tunnel/{a4}-{b4}/require ah/tunnel/{a6}-{b6}/require", (5, 7)),
    ("esp/transport//require", (4,)),
    ("esp/transport//require", (11,)),
)


def _gateway(policy: str, keys: tuple[int, ...]) -> Tables:
    names = {"a4": _ENDS[4][0], "b4": _ENDS[4][1], "a6": _ENDS[6][0], "b6": _ENDS[6][1]}
    text = "".join(f"add {a} {b} {_KEYS[number]};\n" for a, b in _ENDS.values() for number in keys)
    for anything in ("0.0.0.0/0", "::/0"):
        text += f"spdadd {anything} {anything} any -P out ipsec {policy.format(**names)};\n"
    return _tables(text)


_GATEWAYS = [_gateway(*each) for each in _POLICIES]
_MAY_VANISH = frozenset((4, 17, 41, 50, 51, 59, 108))
"""Inner protocols that mean something to the receiver itself."""


@target
def engine_round_trip(data: bytes) -> None:
    """Whatever leaves one gateway arrives behind the other as it was, or neither lets it through."""
    cursor = Cursor(data)
    number, mtu = cursor.u8() % len(_POLICIES), (65600, 1500, 1280, 576)[cursor.u8() & 3]
    packet = bytearray(cursor.rest())
    if len(packet) >= 40:
        if packet[0] >> 4 == 4:
            packet[12:20] = SRC4 + DST4
        elif packet[0] >> 4 == 6:
            packet[8:40] = SRC6 + DST6
    tables = _GATEWAYS[number]
    words = tables.words
    words[:] = memoryview(bytes(8 * len(words))).cast("Q")
    for sa in tables.sad:
        words[sa.slot + Slot.LEASED] = 1
    emit = Emissions()
    outbound = Outbound(tables, lambda _: mtu, lambda _: b"")
    fate = outbound.process(bytes(packet), NOW, emit)
    assert fate in list(Fate) or Counter(fate)
    if fate != Fate.DONE:
        assert fate != Fate.HOLD or len(packet) < 40
        return
    view = PacketView()
    assert view.load(packet)
    wire = list(emit.wire)
    # The receiver has its own window; the words are shared, and the sender's numbers in them would be seen as old.
    words[:] = memoryview(bytes(8 * len(words))).cast("Q")
    inbound = Inbound(tables, Reassembler(1 << 20, 64, 30.0))
    emit.clear()
    fates = []
    for datagram in wire:
        outer = PacketView()
        assert outer.load(datagram)
        assert outer.length == len(datagram) <= mtu
        fates.append(inbound.process(datagram, NOW, emit))
    tunnel = "tunnel" in _POLICIES[number][0]
    if not emit.inner:
        passed = fates == [Fate.PASS] and number in (4, 5)  # IPComp left it alone
        assert passed or view.protocol in _MAY_VANISH or view.is_fragment, [int(each) for each in fates]
        return
    if len(emit.inner) > 1:
        return
    (arrived,) = emit.inner
    if view.protocol in (IPPROTO_IPV4, IPPROTO_IPV6) and (not tunnel or number == 5):
        # An SA of mode any takes an IP packet inside for a tunnel, as in BSD; and IP in IP between the ends of an IPComp
        # tunnel is what the tunnel did not compress.
        return
    if tunnel:
        assert arrived == bytes(packet[: view.length])
    else:
        assert arrived[view.header_length :] == bytes(packet[view.header_length : view.length]) or (
            number == 7 and view.protocol in (6, 17)  # checksums behind a NAT are the policy's affair
        )
