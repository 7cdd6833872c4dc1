"""TFC padding: lengths are hidden as far as the path MTU has room, and no packet is lost, cut or refused for it."""

from __future__ import annotations

import pytest
from engine_bundles import HOSTS, Step, pair
from engine_peers import Peer, address, make_peer, policy, udp

from ipsecq.counters import Counter, Fate
from ipsecq.engine.tap import BEFORE, Tap
from ipsecq.numbers import Mode, Protocol
from ipsecq.packet import ipv4
from ipsecq.packet.segments import split
from ipsecq.sa.association import NatTraversal, SecurityAssociation
from ipsecq.secret import Key

ESP, AH, IPCOMP = Protocol.ESP, Protocol.AH, Protocol.IPCOMP
WANTED = [600, 1400, 1460, 1500, 65535]


def bundles(wanted: int) -> dict[str, list[Step]]:
    padded = (("tfc_pad", wanted),)
    return {
        "4": [Step(ESP, "gcm", 4, padded)],
        "6": [Step(ESP, "cbc", 6, padded)],
        "udp": [Step(ESP, "gcm", 4, (*padded, ("natt", NatTraversal())))],
        "in ah": [Step(ESP, "cbc", 4, padded), Step(AH, "sha256")],
        "in another tunnel": [Step(ESP, "gcm", 4, padded), Step(ESP, "cbc", 6)],
        "in another that pads": [Step(ESP, "gcm", 6, padded), Step(ESP, "gcm8", 4, padded)],
    }


def told(wire: list[bytes]) -> int:
    """The MTU in the only datagram, an ICMP error."""
    (error,) = wire
    at = (error[0] & 15) * 4 if error[0] >> 4 == 4 else 40
    return int.from_bytes(error[at + 6 : at + 8], "big")


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("bundle", bundles(0))
@pytest.mark.parametrize("inner", [4, 6])
def test_padding_alone_makes_no_packet_too_long(bundle: str, inner: int, wanted: int) -> None:
    left, right = pair(bundles(wanted)[bundle], inner, mtu=1500)
    lengths = set()
    for size in (0, 1, 100, 333):
        for df in (False, True):
            packet = udp(*HOSTS[inner], bytes(size), df=df)
            fate, wire = left.send(packet)
            assert (fate, len(wire)) == (Fate.DONE, 1)
            assert right.receive(wire[0]) == (Fate.DONE, [packet])
            lengths.add(len(wire[0]))
    assert len(lengths) == 1
    (length,) = lengths
    assert length <= 1500
    if wanted >= 1500:
        assert length > 1500 - 32  # as much as whole blocks, of both transforms, can be


@pytest.mark.parametrize("bundle", bundles(0))
def test_padding_follows_the_path_mtu_down_and_up(bundle: str) -> None:
    left, right = pair(bundles(1500)[bundle], 4, mtu=1500)
    packet = udp(*HOSTS[4], b"x", df=True)
    seen = []
    for left.mtu in (1500, 1400, 1299, 600, 1500):
        fate, wire = left.send(packet)
        assert (fate, len(wire)) == (Fate.DONE, 1)
        assert left.mtu - 32 < len(wire[0]) <= left.mtu
        assert right.receive(wire[0]) == (Fate.DONE, [packet])
        seen.append(len(wire[0]))
    assert seen[0] == seen[-1]


@pytest.mark.parametrize("bundle", bundles(0))
@pytest.mark.parametrize("inner", [4, 6])
def test_senders_are_told_what_the_tunnel_carries_and_that_is_not_less_for_padding(bundle: str, inner: int) -> None:
    answers = []
    for wanted in (0, 1500):
        left, _ = pair(bundles(wanted)[bundle], inner, mtu=1500)
        fate, wire = left.send(udp(*HOSTS[inner], bytes(1500), df=True))
        if inner == 4:
            assert fate == Counter.IP_TOOBIG
        answers.append(told(wire[:1]))
    assert answers[0] == answers[1] > 1280
    left, right = pair(bundles(1500)[bundle], inner, mtu=1500)
    largest = udp(*HOSTS[inner], bytes(answers[0] - (28 if inner == 4 else 48)), df=True)
    fate, wire = left.send(largest)
    assert (fate, len(wire)) == (Fate.DONE, 1)
    assert right.receive(wire[0]) == (Fate.DONE, [largest])


@pytest.mark.parametrize("wanted", [0, 1500])
def test_no_sender_is_asked_for_less_than_its_protocol_guarantees(wanted: int) -> None:
    for inner, least in ((4, 68), (6, 1280)):
        left, _ = pair(bundles(wanted)["in another tunnel"], inner, mtu=130)
        _, wire = left.send(udp(*HOSTS[inner], bytes(1400), df=True))
        assert told(wire[:1]) == least


@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("dfbit", [0, 1])
def test_what_has_to_be_cut_is_cut_as_it_would_be_without_padding(inner: int, dfbit: int) -> None:
    counts = []
    for wanted in (0, 1500):
        left, _ = pair(bundles(wanted)["4"], inner, mtu=1500, knobs={"net.inet.ipsec.dfbit": dfbit})
        fate, wire = left.send(udp(*HOSTS[inner], bytes(4000)))
        sent = [each for each in wire if each[0] >> 4 == 4 and each[9] == 50]
        assert all(len(each) <= 1500 for each in sent)
        counts.append((fate, len(sent)))
    assert counts[0] == counts[1]


def test_the_segments_of_a_super_packet_are_padded_and_fit() -> None:
    left, right = pair(bundles(65535)["4"], 4, mtu=1500)
    src, dst = (address(text) for text in HOSTS[4])
    segment = bytes.fromhex("9c4013890000ff00000000005018040000000000") + bytes(5000)
    packet = ipv4.header(src, dst, 6, len(segment)) + segment
    pieces = split(packet, 1200)
    left.send(pieces[0])
    left.emit.clear()
    assert left.outbound.process_super(packet, 1200, left.now, left.emit) == Fate.DONE
    assert len({len(each) for each in left.emit.wire}) == 1
    assert len(left.emit.wire[0]) <= 1500
    assert [right.receive(each) for each in left.emit.wire] == [(Fate.DONE, [piece]) for piece in pieces]


def two_policies() -> Peer:
    """One padding SA: alone towards one host, in AH towards another."""
    near, far = address("192.0.2.1"), address("192.0.2.2")
    esp = SecurityAssociation(
        ESP, 0x1001, near, far, Mode.TUNNEL, encryption="aes-gcm-16", encryption_key=Key(bytes(20)), tfc_pad=1500,
    )  # fmt: skip
    ah = SecurityAssociation(
        AH, 0x1002, near, far, Mode.TRANSPORT, authentication="hmac-sha2-256", authentication_key=Key(bytes(32))
    )
    tunnel = "esp/tunnel/192.0.2.1-192.0.2.2/require"
    return make_peer([esp, ah], [
        policy("out", "10.1.0.0/24", "10.2.0.2/32", f"ipsec {tunnel}"),
        policy("out", "10.1.0.0/24", "10.2.0.3/32", f"ipsec {tunnel} ah/transport//require"),
    ])  # fmt: skip


def test_an_sa_in_two_bundles_fills_each_as_far_as_that_one_has_room() -> None:
    left = two_policies()
    for _ in range(3):
        for dst, protocol in (("10.2.0.2", 50), ("10.2.0.3", 51)):
            fate, wire = left.send(udp("10.1.0.2", dst, b"x", df=True))
            assert (fate, len(wire), wire[0][9]) == (Fate.DONE, 1, protocol)
            assert 1500 - 4 < len(wire[0]) <= 1500


class _Watcher:
    ways = (0, BEFORE)
    spis: frozenset[int] = frozenset()
    seen = 0

    def take(self) -> bool:
        return True

    def drop(self, count: int) -> None: ...

    def record(self, kind: int, enc: bytes, front: bytes, body: object) -> None:
        self.seen += 1


def test_an_sa_that_is_watched_pads_as_much() -> None:
    left, _ = pair(bundles(1500)["4"], 4, mtu=1500)
    alone = left.send(udp(*HOSTS[4], b"x"))[1]
    watcher = _Watcher()
    left.outbound.watch(Tap([watcher], left.tables.sysctl))
    watched = left.send(udp(*HOSTS[4], b"x"))[1]
    assert watcher.seen == 1
    assert len(alone[0]) == len(watched[0]) > 1400
