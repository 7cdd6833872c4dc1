"""Fuzz target of the fast path: whatever comes, it ends as it does in the engine, to the octet and to the counter."""

from __future__ import annotations

from engine_peers import make_peer, policy
from engine_traffic import INNER, LANS, OUTER, association, normal, peers, tcp, udp
from fast_peer import Fast, alike
from fuzz_targets import Cursor, target

from ipsecq.crypto import cipher
from ipsecq.engine.emit import Emissions
from ipsecq.numbers import IPPROTO_UDP, Protocol
from ipsecq.packet import ipv4, ipv6
from ipsecq.sa.association import NatTraversal
from ipsecq.transforms.esp import EspTransform

_SIZES = (1300, 536, 100, 1)


def _inner(cursor: Cursor) -> bytes:
    """A packet between the LANs, with some octets of its headers as the input says."""
    kind = cursor.u8()
    version = 6 if kind & 1 else 4
    if kind & 2:
        packet = bytearray(tcp(version, cursor.u16() % 3000, flags=cursor.u8(), tos=cursor.u8()))
    else:
        packet = bytearray(udp(*INNER[version], cursor.take(cursor.u8()), df=bool(kind & 4)))
    for _ in range(kind >> 6):
        packet[cursor.u8() % min(len(packet), 80)] = cursor.u8()
    return bytes(packet[: len(packet) - (cursor.u8() if kind & 8 else 0)])


@target
def fast_path(data: bytes) -> None:
    """Packets out, authentic nonsense in, and any octets at all."""
    cursor = Cursor(data)
    choice = cursor.u8()
    outer, natt = 6 if choice & 1 else 4, NatTraversal() if choice & 2 else None
    sa = association("chacha" if choice & 4 else "gcm", outer, natt=natt, esn=bool(choice & 8))
    out = [policy("out", *LANS[version], f"ipsec esp/tunnel/{'-'.join(OUTER[outer])}/require") for version in (4, 6)]
    single, other = make_peer([sa], out), Fast(make_peer([sa], out))
    other.peer.tables.burst_ports = frozenset({4500})
    _, one, two = peers(sa, outer)
    fast = Fast(two)
    built = cipher.build(sa.encryption or "", sa.encryption_key)
    transform = EspTransform(sa.spi, built, esn=sa.esn)
    sequence = 0
    while cursor.more():
        step = cursor.u8()
        if step & 3 == 0:
            packet = _inner(cursor)
            assert other.send(packet) + other.finish() == single.send(packet)[1]
            alike(single, other.peer)
            continue
        if step & 3 == 1:  # authentic, whatever it is
            sequence += cursor.u8() & 3
            payload = _inner(cursor) if step & 4 else cursor.take(cursor.u8())
            sealed = transform.seal(payload, (4, 41, 59, cursor.u8())[step >> 3 & 3], max(sequence, 1))
        else:
            sealed = cursor.take(cursor.u16() % 300)
        src, dst = sa.src, sa.dst
        if natt is not None:
            sealed = b"\x11\x94\x11\x94" + (len(sealed) + 8).to_bytes(2, "big") + bytes(2) + sealed
        protocol = IPPROTO_UDP if natt is not None else int(Protocol.ESP)
        header = ipv4.header if outer == 4 else ipv6.header
        datagram = header(src, dst, protocol, len(sealed)) + sealed
        emit = Emissions()
        one.inbound.process(datagram, one.now, emit)
        assert [normal(packet) for packet in fast.receive([datagram])] == [normal(packet) for packet in emit.inner]
        alike(one, two)
    rest = bytes(data)
    before = two.tables.words.tolist()
    assert fast.path.opener.open(rest, True, 1000.0) == 0
    assert two.tables.words.tolist() == before
    other.path.sealer.seal(rest, True, True, _SIZES[choice & 3], 0, 0, 1000.0)
