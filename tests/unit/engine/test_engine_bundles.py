"""Bundles of up to four transforms: whatever goes through one comes out as it was, and nothing else comes out."""

from __future__ import annotations

import pytest
from engine_bundles import HOSTS, OF, Step, ends, pair
from engine_peers import address, udp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsecq.counters import Counter, Fate
from ipsecq.numbers import Protocol
from ipsecq.packet import checksum, ipv4, ipv6
from ipsecq.packet.fragments import Reassembler
from ipsecq.packet.view import PacketView

ESP, AH, IPCOMP = Protocol.ESP, Protocol.AH, Protocol.IPCOMP
NAMED = {
    "ipcomp+esp+ah transport": [Step(IPCOMP, "deflate"), Step(ESP, "gcm"), Step(AH, "sha256")],
    "ipcomp+esp+ah tunnel": [Step(IPCOMP, "deflate", 4), Step(ESP, "cbc"), Step(AH, "sha1")],
    "esp tunnel in esp tunnel": [Step(ESP, "gcm", 4), Step(ESP, "cbc", 4)],
    "esp tunnel in ah tunnel of the other version": [Step(ESP, "null", 6), Step(AH, "gmac", 4)],
    "four": [Step(IPCOMP, "deflate"), Step(ESP, "gcm8"), Step(ESP, "gcm", 6), Step(AH, "sha256", 4)],
    "ipcomp tunnel in ipcomp tunnel in esp": [Step(IPCOMP, "deflate", 4), Step(IPCOMP, "deflate", 6), Step(ESP, "gcm")],
}


@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("name", NAMED)
def test_a_bundle_opens_in_both_directions(name: str, inner: int) -> None:
    left, right = pair(NAMED[name], inner)
    src, dst = HOSTS[inner]
    for size in (0, 1, 89, 200, 1400, 9000):
        for payload in (bytes(size), bytes(range(256)) * 36):
            there, back = udp(src, dst, payload[:size]), udp(dst, src, payload[:size])
            fate, wire = left.send(there)
            assert (fate, len(wire)) == (Fate.DONE, 1)
            assert right.receive(wire[0]) == (Fate.DONE, [there])
            assert left.receive(right.send(back)[1][0]) == (Fate.DONE, [back])


def test_packets_that_take_more_than_one_sa_are_counted_as_bundled() -> None:
    for steps, bundled in (([Step(ESP, "gcm", 4)], 0), ([Step(ESP, "gcm"), Step(AH, "sha256", 4)], 3)):
        left, _ = pair(steps)
        for _ in range(3):
            left.send(udp(*HOSTS[4], bytes(100)))
        assert left.tables.counters[Counter.OUT_BUNDLESA] == bundled


def test_headers_are_in_the_order_of_the_policy() -> None:
    left, _ = pair([Step(ESP, "gcm"), Step(AH, "sha256"), Step(ESP, "null", 6)])
    _, wire = left.send(udp(*HOSTS[4], bytes(100)))
    assert wire[0][6] == 50  # IPv6, ESP with null encryption: SPI, sequence, then the inner IPv4
    inner = wire[0][48:]
    assert (inner[0] >> 4, inner[9], inner[20]) == (4, 51, 50)
    assert (wire[0][8:24], wire[0][24:40]) == ends(2, 6)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_bundle_of_which_one_transform_was_left_out_does_not_enter(missing: int) -> None:
    steps = [Step(ESP, "gcm", 4), Step(AH, "sha1", 4)]
    left, right = pair(steps)
    _, wire = left.send(udp(*HOSTS[4], b"x"))
    sealed = wire[0]
    if missing:  # what AH vouches for, without AH
        sealed = sealed[20 + 24 :]
    else:  # only AH around the clear packet: sealed by a peer with another policy
        other, _ = pair([Step(AH, "sha1", 4)])
        sealed = other.send(udp(*HOSTS[4], b"x"))[1][0]
    fate, inner = right.receive(sealed)
    assert inner == []
    assert fate in {Counter.IN_POLVIO, Counter.AH_NOTDB}


# -- any packet through any bundle ------------------------------------------------------------------------------------

steps = st.sampled_from([ESP, ESP, AH, IPCOMP]).flatmap(
    lambda protocol: st.builds(
        Step, st.just(protocol), st.sampled_from(OF[protocol]), st.sampled_from([0, 0, 4, 6]),
        st.just(()) if protocol is IPCOMP else st.sampled_from([(), (("esn", True),)]),
    )
)  # fmt: skip
bundles = st.lists(steps, min_size=1, max_size=4)
payloads = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda text, n: text * n, st.binary(min_size=1, max_size=9), st.integers(1, 200)),
)
IPV4_OPTIONS = [
    b"", b"\x94\x04\0\0",  # router alert
    b"\x01\x44\x0c\x05" + bytes(12), b"\x07\x07\x04" + bytes(5),  # NOP and time stamp; record route
]  # fmt: skip
PROTOCOLS = [1, 2, 6, 17, 47, 58, 89, 132, 253]


@st.composite
def packets(draw: st.DrawFn) -> tuple[int, bytes]:
    """(version, packet): any protocol and payload, any TOS; IPv4 with options, IPv6 with extension headers."""
    version, protocol, payload = draw(st.sampled_from([4, 6])), draw(st.sampled_from(PROTOCOLS)), draw(payloads)
    src, dst = (address(text) for text in HOSTS[version])
    tos = draw(st.integers(0, 63)) << 2
    if version == 4:
        options = draw(st.sampled_from(IPV4_OPTIONS))
        head = bytearray(ipv4.header(src, dst, protocol, len(options) + len(payload), tos=tos, ttl=draw(st.integers(1, 255)),
                                     identification=draw(st.integers(1, 65535))))  # fmt: skip
        head[0] += len(options) // 4
        head += options
        ipv4.fix_checksum(head)
        return 4, bytes(head) + payload
    chain = draw(st.lists(st.sampled_from([0, 60]), max_size=2, unique=True).map(sorted))
    follows = [*chain[1:], protocol]
    extensions = b"".join(bytes((following, 0, 0x3E, 4, 1, 2, 3, 4)) for following in follows[: len(chain)])
    head6 = ipv6.header(src, dst, chain[0] if chain else protocol, len(extensions) + len(payload), traffic_class=tos,
                        flow_label=draw(st.integers(0, 0xFFFFF)), hop_limit=draw(st.integers(1, 255)))  # fmt: skip
    return 6, head6 + extensions + payload


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bundles, packets())
def test_any_packet_through_any_bundle_opens_to_itself(bundle: list[Step], sample: tuple[int, bytes]) -> None:
    version, packet = sample
    left, right = pair(bundle, version)
    fate, wire = left.send(packet)
    assert fate == Fate.DONE
    if all(step.protocol is IPCOMP and not step.outer for step in bundle) and wire == [packet]:
        return  # not worth compressing: it left as it was
    assert right.receive(wire[0]) == (Fate.DONE, [packet])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bundles, packets(), st.data())
def test_no_flipped_bit_behind_the_outer_header_is_accepted(
    bundle: list[Step], sample: tuple[int, bytes], data: st.DataObject
) -> None:
    version, packet = sample
    outermost = data.draw(st.sampled_from([Step(ESP, "gcm"), Step(AH, "sha256"), Step(ESP, "cbc", 4), Step(AH, "gmac", 6)]))
    left, right = pair([*bundle[:3], outermost], version)
    _, wire = left.send(packet)
    view = PacketView()
    assert view.load(wire[0])
    for _ in range(8):
        bit = data.draw(st.integers(view.offset * 8, len(wire[0]) * 8 - 1))
        forged = bytearray(wire[0])
        forged[bit // 8] ^= 1 << bit % 8
        fate, inner = right.receive(bytes(forged))
        assert inner == []
        assert fate != Fate.DONE
    assert right.receive(wire[0]) == (Fate.DONE, [packet])  # and no window has moved


# -- headers in transport mode ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step(ESP, "gcm"), Step(AH, "sha256")], ids=["esp", "ah"])
def test_ipv4_options_stay_in_front_and_what_routers_write_there_is_no_matter(step: Step) -> None:
    left, right = pair([step])
    src, dst = (address(text) for text in HOSTS[4])
    options = b"\x94\x04\0\0" + b"\x07\x07\x04\0\0\0\0\0"  # router alert, record route with an empty slot
    packet = bytearray(ipv4.header(src, dst, 253, len(options) + 5, identification=9))
    packet[0] += len(options) // 4
    packet += options
    ipv4.fix_checksum(packet)
    _, wire = left.send(bytes(packet) + b"hello")
    assert wire[0][20:32] == options
    recorded = bytearray(wire[0])
    recorded[26], recorded[27:31], recorded[8] = 8, b"\xc0\0\2\x63", 60  # a router records itself, TTL goes down
    head = recorded[:32]
    ipv4.fix_checksum(head)
    fate, inner = right.receive(bytes(head) + bytes(recorded[32:]))
    assert fate == Fate.DONE
    assert inner[0][20:32] == bytes(head[20:])
    assert inner[0][32:] == b"hello"


def test_a_router_that_changes_an_immutable_option_is_found_out_by_ah() -> None:
    left, right = pair([Step(AH, "sha256")])
    src, dst = (address(text) for text in HOSTS[4])
    packet = bytearray(ipv4.header(src, dst, 253, 9, identification=9))
    packet[0] += 1
    packet += b"\x94\x04\0\0"
    ipv4.fix_checksum(packet)
    _, wire = left.send(bytes(packet) + b"hello")
    altered = bytearray(wire[0])
    altered[23] = 1
    assert right.receive(bytes(altered)) == (Counter.AH_BADAUTH, [])


@pytest.mark.parametrize("protocol", [ESP, AH])
def test_ipsec_goes_behind_hop_by_hop_and_routing_headers_and_before_destination_options(protocol: Protocol) -> None:
    left, right = pair([Step(protocol, OF[protocol][0])], 6)
    src, dst = (address(text) for text in HOSTS[6])
    hops, routing = bytes((43, 0, 1, 4, 0, 0, 0, 0)), bytes((60, 0, 253, 0, 0, 0, 0, 0))
    options = bytes((17, 0, 1, 4, 0, 0, 0, 0))
    chain = hops + routing + options
    packet = ipv6.header(src, dst, 0, len(chain) + 12) + chain + bytes(12)
    _, wire = left.send(packet)
    assert (wire[0][6], wire[0][40], wire[0][48]) == (0, 43, int(protocol))
    assert right.receive(wire[0]) == (Fate.DONE, [packet])


# -- AH and what happens to its header behind us ----------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step(AH, "sha256"), Step(AH, "sha256", 4)], ids=["transport", "tunnel"])
def test_ah_is_never_sent_with_identification_0_which_a_raw_socket_would_replace(step: Step) -> None:
    left, right = pair([step])
    packet = bytearray(udp(*HOSTS[4], b"x", df=True))
    packet[4:6] = b"\0\0"
    head = packet[:20]
    ipv4.fix_checksum(head)
    for sa in left.tables.sad:
        left.tables.words[sa.slot + 1] = 0xFFFE  # the next sequence number; some outer identification comes to 0
    seen = set()
    for _ in range(3):
        fate, wire = left.send(bytes(head) + bytes(packet[20:]))
        assert fate == Fate.DONE
        assert checksum.ones_complement(wire[0][:20]) == 0xFFFF
        seen.add(wire[0][4:6])
        assert right.receive(wire[0])[0] == Fate.DONE
    assert b"\0\0" not in seen


@pytest.mark.parametrize("step", [Step(AH, "sha256"), Step(AH, "sha256", 4), Step(ESP, "gcm", 4)])
def test_fragments_of_the_finished_datagram_come_together_as_what_was_sealed(step: Step) -> None:
    left, right = pair([step], mtu=600)
    packet = udp(*HOSTS[4], bytes(range(256)) * 9)
    fate, wire = left.send(packet)
    assert fate == Fate.DONE
    assert len(wire) > 3
    pieces = Reassembler(1 << 20, 8, 30.0)
    whole = [pieces.add(piece, 0.0) for piece in wire][-1]
    assert whole is not None
    assert right.receive(whole) == (Fate.DONE, [packet])


@pytest.mark.parametrize(("align", "octets"), [(0, 28), (4, 28), (8, 32)])
def test_ah_over_ipv4_is_as_long_as_the_sa_says_and_both_lengths_are_accepted(align: int, octets: int) -> None:
    left, _ = pair([Step(AH, "sha256", 0, (("ah_align", align),))])
    _, right = pair([Step(AH, "sha256")])
    packet = udp(*HOSTS[4], b"x")
    _, wire = left.send(packet)
    assert len(wire[0]) == len(packet) + octets
    assert (wire[0][21] + 2) * 4 == octets
    assert right.receive(wire[0]) == (Fate.DONE, [packet])
