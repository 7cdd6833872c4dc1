"""Traffic for two engines that have to end alike: packets, what a network does to them, and how runs are taken apart."""

from __future__ import annotations

import random
from dataclasses import replace

from engine_peers import Peer, address, make_peer, policy, udp
from hypothesis import strategies as st

from ipsecq.engine.emit import Emissions
from ipsecq.numbers import Mode, Protocol
from ipsecq.packet import checksum, ipv4, ipv6
from ipsecq.packet.segments import split
from ipsecq.sa.association import Lifetime, SecurityAssociation
from ipsecq.secret import Key

OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
INNER = {4: ("10.1.0.2", "10.2.0.2"), 6: ("fd01::2", "fd02::2")}
LANS = {4: ("10.1.0.0/16", "10.2.0.0/16"), 6: ("fd01::/64", "fd02::/64")}
KINDS = {
    "gcm": {"encryption": "aes-gcm-16", "encryption_key": Key(bytes(range(20)))},
    "chacha": {"encryption": "chacha20-poly1305", "encryption_key": Key(bytes(range(36)))},
    "cbc": {
        "encryption": "aes-cbc", "encryption_key": Key(bytes(range(16))),
        "authentication": "hmac-sha2-256", "authentication_key": Key(bytes(range(32))),
    },
}  # fmt: skip
STEPS = st.one_of(
    st.tuples(st.just("bulk"), st.integers(1, 25), st.sampled_from([1348, 1000, 536, 100, 37]),
              st.sampled_from([2, 3, 4, 9]), st.sampled_from([0x10, 0x18, 0x11, 0x50, 0x02]),
              st.sampled_from([0, 1, 2, 3, 0xB8])),
    st.tuples(st.just("small"), st.integers(1, 12), st.integers(0, 200)),
    st.tuples(st.just("odd"), st.sampled_from([1, 4, 41, 50, 51, 58, 132])),
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(st.sampled_from(["repeat", "swap", "damage", "truncate", "lose", "tos", "lengthen", "port"]),
              st.integers(0, 999), st.integers(0, 999)),
    max_size=6,
)  # fmt: skip


def association(kind: str, outer: int, **more: object) -> SecurityAssociation:
    src, dst = (address(text) for text in OUTER[outer])
    fields = {"mode": Mode.TUNNEL, "replay_window": 64} | KINDS[kind] | more
    return SecurityAssociation(Protocol.ESP, 0x1001, src, dst, **fields)


def peers(sa: SecurityAssociation, outer: int) -> tuple[Peer, Peer, Peer]:
    """A sender and two receivers alike; the sender's SA has no limits, so only the receivers' are met."""
    far = "-".join(OUTER[outer])
    out = [policy("out", *LANS[version], f"ipsec esp/tunnel/{far}/require") for version in (4, 6)]
    into = [policy("in", *LANS[version], f"ipsec esp/tunnel/{far}/require") for version in (4, 6)]
    into.insert(0, policy("in", "10.1.0.9/32", LANS[4][1], "discard"))
    left = make_peer([replace(sa, soft=Lifetime(), hard=Lifetime())], out, mtu=9000)
    return left, make_peer([sa], into), make_peer([sa], into)


def tcp(version: int, size: int, *, seq: int = 1000, flags: int = 0x10, host: int = 2, tos: int = 0, port: int = 80,
        options: bytes = b"") -> bytes:  # fmt: skip
    """A TCP packet, super or not, as a sender's stack hands it to a device."""
    src, dst = (address(text) for text in INNER[version])
    src = src[:-1] + bytes([host])
    data = random.Random(size * 7919 + seq).randbytes(size)
    head = (40000).to_bytes(2) + port.to_bytes(2) + seq.to_bytes(4) + (77).to_bytes(4)
    head += bytes([(20 + len(options)) << 2, flags]) + (500).to_bytes(2) + bytes(4) + options
    segment = head + data
    if version == 4:
        packet = ipv4.header(src, dst, 6, len(segment), tos=tos, df=host != 3, identification=seq & 0xFFFF) + segment
    else:
        packet = ipv6.header(src, dst, 6, len(segment), traffic_class=tos) + segment
    return checksum.complete(packet)


def unfolded(emit: Emissions) -> list[bytes]:
    """The packets, runs cut again."""
    packets, start = [], 0
    for place, run in emit.runs:
        packets += emit.inner[start:place]
        start = place
        whole = b"".join(run.parts)
        pieces = split(whole, run.size)
        assert len(pieces) == run.number
        packets += pieces
    return [normal(packet) for packet in packets + emit.inner[start:]]


def normal(packet: bytes) -> bytes:
    """Without the identification, where it says nothing: DF."""
    if packet[0] >> 4 == 4 and packet[6] & 0x40:
        return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:]
    return packet


def sources(step, version: int, seq: int) -> list[bytes]:
    """The inner packets of a step."""
    kind, number, *rest = step
    if kind == "bulk":
        size, host, flags, tos = rest
        whole = tcp(version, number * size - (number * 7) % size, seq=seq, host=host, flags=flags, tos=tos,
                    options=b"\1\1\x08\n" + bytes(8) if number & 1 else b"")  # fmt: skip
        return split(whole, size)
    if kind == "small":
        return [udp(*INNER[version], random.Random(n).randbytes(rest[0]), df=bool(seq & 1),
                    dport=4500 if rest[0] == 100 else 2000) for n in range(number)]  # fmt: skip
    src, dst = (address(text) for text in INNER[version])
    header = ipv4.header if version == 4 else ipv6.header
    return [header(src, dst, number, 40) + bytes(40)] * 2


def changed(wire: list[bytes], changes) -> list[bytes]:
    """What the network does to datagrams."""
    wire = list(wire)
    for what, where, how in changes:
        if not wire:
            break
        at = where % len(wire)
        datagram = bytearray(wire[at])
        if what == "repeat":
            wire.insert(how % (len(wire) + 1), wire[at])
        elif what == "swap":
            other = how % len(wire)
            wire[at], wire[other] = wire[other], wire[at]
        elif what == "lose":
            del wire[at]
        elif what == "truncate":
            wire[at] = bytes(datagram[: max(how % len(datagram), 22)])
        elif what == "lengthen":
            wire[at] = bytes(datagram) + bytes(how % 9)
        else:
            place = {"damage": how % len(datagram), "tos": 1, "port": 21}[what]
            datagram[place] ^= 1 << how % 8
            wire[at] = bytes(datagram)
    return wire


def united(wire: list[bytes]) -> bytes:
    """Datagrams of one size, the last one maybe shorter, as the UDP super-packet that GRO or a sender makes of them."""
    at = 28 if wire[0][0] >> 4 == 4 else 48
    whole = bytearray(wire[0] + b"".join(datagram[at:] for datagram in wire[1:]))
    whole[at - 4 : at - 2] = (len(whole) - at + 8).to_bytes(2)
    field = slice(2, 4) if at == 28 else slice(4, 6)
    whole[field] = (len(whole) - (0 if at == 28 else 40)).to_bytes(2)
    return bytes(whole)
