"""Several SAs for one policy (RFC 9611): flows share them evenly, each keeps to one, and nobody notices at the far end."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import replace

import pytest
from engine_peers import Peer, address, make_peer, policy, udp
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.counters import Fate
from ipsecq.engine import explain
from ipsecq.engine.choice import flow_number, share
from ipsecq.engine.explain import Flow
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.packet.fragments import fragment
from ipsecq.packet.view import PacketView
from ipsecq.policy import setpolicy
from ipsecq.policy.interface import Interface
from ipsecq.policy.sockets import SocketPolicy, SocketRule
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key

A, B = "192.0.2.1", "192.0.2.2"
INNER = {4: ("10.1.0.2", "10.2.0.2"), 6: ("fd01::2", "fd02::2")}
LANS = {4: ("10.1.0.0/24", "10.2.0.0/24"), 6: ("fd01::/64", "fd02::/64")}
ENDS = {4: (A, B), 6: ("2001:db8::1", "2001:db8::2")}
REQID = 7
SPIS = (0x1000, 0x1001, 0x1002, 0x1003)


def esp(spi: int, **more: object) -> SecurityAssociation:
    return replace(
        SecurityAssociation(
            Protocol.ESP, spi, address(A), address(B), Mode.TUNNEL, reqid=REQID, encryption="aes-gcm-16",
            encryption_key=Key(spi.to_bytes(4, "big") * 5), replay_window=64,
        ),
        **more,
    )  # fmt: skip


def ah(spi: int) -> SecurityAssociation:
    return SecurityAssociation(
        Protocol.AH, spi, address(A), address(B), Mode.TRANSPORT, reqid=REQID, authentication="hmac-sha2-256",
        authentication_key=Key(bytes(32)), replay_window=64,
    )  # fmt: skip


def pair(
    sas: list[SecurityAssociation], *, family: int = 4, parallel: bool = True, level: str = f"unique:{REQID}",
    transforms: str = "esp/tunnel/{ends}/{level}", knobs: dict[str, int] | None = None, spare: tuple = (),
) -> tuple[Peer, Peer]:  # fmt: skip
    """The sending and the receiving gateway."""
    rules = "ipsec " + transforms.format(ends=f"{A}-{B}", level=level)
    left = make_peer(sas, [policy("out", *LANS[family], rules)], knobs, spare=list(spare))
    right = make_peer([*sas, *spare], [policy("in", *LANS[family], rules)], knobs)
    left.tables.parallel_sas = parallel
    return left, right


def flows(number: int, family: int = 4) -> list[bytes]:
    return [udp(*INNER[family], b"%d" % n, sport=1024 + n % 600, dport=2000 + n // 600) for n in range(number)]


def spi_of(peer: Peer, packet: bytes) -> int:
    """Of the SA that a packet gets."""
    fate, wire = peer.send(packet)
    assert fate == Fate.DONE
    view = PacketView()
    view.load(wire[0])
    return int.from_bytes(wire[0][view.offset : view.offset + 4], "big")


def change(peer: Peer, spi: int, state: SaState) -> None:
    peer.tables.sad.set_state(peer.tables.sad.get(address(B), Protocol.ESP, spi), state)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("spis", [SPIS, (1, 2, 3), tuple(0xC0000000 + n * 65536 for n in range(6)), (0x9A3F1C55, 0x11)])
def test_many_flows_are_shared_evenly(spis: tuple[int, ...], family: int) -> None:
    left, _ = pair([esp(spi) for spi in spis], family=family)
    got = Tally(spi_of(left, packet) for packet in flows(3000, family))
    fair = 3000 / len(spis)
    assert set(got) == set(spis)
    assert all(0.85 * fair < count < 1.15 * fair for count in got.values()), got


def test_every_packet_of_a_flow_goes_through_one_sa_in_order() -> None:
    left, _ = pair([esp(spi) for spi in SPIS])
    for packet in flows(20):
        assert len({spi_of(left, packet) for _ in range(30)}) == 1
        left.tables.sysctl.set("net.inet.ipsec.dfbit", 1)  # and what was remembered of the flow is forgotten
        left.tables.sysctl.set("net.inet.ipsec.dfbit", 0)
        assert len({spi_of(left, packet) for _ in range(3)}) == 1


@pytest.mark.parametrize(("oldest", "spi"), [(1, SPIS[0]), (0, SPIS[-1])])
def test_without_the_option_one_sa_serves_all_flows(oldest: int, spi: int) -> None:
    left, _ = pair([esp(spi) for spi in SPIS], parallel=False, knobs={"net.key.preferred_oldsa": oldest})
    assert {spi_of(left, packet) for packet in flows(100)} == {spi}


def test_only_the_flows_of_an_sa_that_goes_move_and_the_others_share_them() -> None:
    left, _ = pair([esp(spi) for spi in SPIS])
    packets = flows(2000)
    before = [spi_of(left, packet) for packet in packets]
    left.tables.sad.delete(address(B), Protocol.ESP, SPIS[1])
    after = [spi_of(left, packet) for packet in packets]
    moved = Tally(new for old, new in zip(before, after, strict=True) if old == SPIS[1])
    assert all(old == new for old, new in zip(before, after, strict=True) if old != SPIS[1])
    assert set(moved) == {SPIS[0], SPIS[2], SPIS[3]}
    assert min(moved.values()) > 0.8 * max(moved.values())


def test_a_new_sa_takes_its_share_and_moves_no_flow_between_the_others() -> None:
    left, _ = pair([esp(spi) for spi in SPIS[:3]], spare=(esp(SPIS[3]),))
    packets = flows(2000)
    before = [spi_of(left, packet) for packet in packets]
    left.tables.sad.add(left.spare[0])
    after = [spi_of(left, packet) for packet in packets]
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {SPIS[3]}
    assert 0.85 < after.count(SPIS[3]) / (len(packets) / 4) < 1.15


def test_a_dying_sa_is_left_and_serves_again_when_all_are_dying() -> None:
    left, _ = pair([esp(spi) for spi in SPIS])
    packets = flows(200)
    change(left, SPIS[0], SaState.DYING)
    assert {spi_of(left, packet) for packet in packets} == set(SPIS[1:])
    for spi in SPIS[1:]:
        change(left, spi, SaState.DYING)
    assert {spi_of(left, packet) for packet in packets} == set(SPIS)
    change(left, SPIS[2], SaState.DEAD)
    assert {spi_of(left, packet) for packet in packets} == {SPIS[0], SPIS[1], SPIS[3]}


def test_an_sa_that_only_receives_any_more_is_left() -> None:
    left, _ = pair([esp(spi) for spi in SPIS])
    left.tables.sad.withdraw(esp(SPIS[3]).key)
    assert {spi_of(left, packet) for packet in flows(200)} == set(SPIS[:3])


def test_an_sa_of_another_reqid_mode_or_end_takes_no_part() -> None:
    others = [esp(0x2000, reqid=8), esp(0x2001, mode=Mode.TRANSPORT), esp(0x2002, dst=address("192.0.2.9"))]
    left, _ = pair([*others, esp(SPIS[0]), esp(SPIS[1], mode=Mode.ANY)])
    assert {spi_of(left, packet) for packet in flows(200)} == {SPIS[0], SPIS[1]}


def test_without_any_sa_one_is_asked_for_and_the_packet_waits() -> None:
    left, _ = pair([])
    fate, wire = left.send(flows(1)[0])
    assert (fate, wire, len(left.emit.events)) == (Fate.HOLD, [], 1)


def test_the_pieces_of_a_datagram_go_through_one_sa() -> None:
    """Only the first one shows ports."""
    left, _ = pair([esp(spi) for spi in SPIS])
    for n in range(20):
        pieces = fragment(udp(*INNER[4], bytes(3000), sport=1024 + n), 1280, n)
        assert len(pieces) > 2
        assert len({spi_of(left, piece) for piece in pieces}) == 1


@pytest.mark.parametrize("strict", [0, 1], ids=["any history", "check_policy_history"])
@pytest.mark.parametrize("level", ["require", f"unique:{REQID}"])
@pytest.mark.parametrize("family", [4, 6])
def test_the_far_end_takes_all_of_them_for_one_policy(family: int, level: str, strict: int) -> None:
    knobs = {"net.inet.ipsec.check_policy_history": strict}
    left, right = pair([esp(spi) for spi in SPIS], family=family, level=level, knobs=knobs)
    used = set()
    for packet in flows(100, family):
        used.add(spi_of(left, packet))
        assert right.receive(left.emit.wire[0]) == (Fate.DONE, [packet])
    assert used == set(SPIS)
    assert all(right.tables.sad.inbound((address(B), Protocol.ESP, spi)) is not None for spi in SPIS)


def test_the_transforms_of_a_bundle_choose_each_among_their_own() -> None:
    left, right = pair(
        [esp(spi) for spi in SPIS] + [ah(spi) for spi in (0x3000, 0x3001, 0x3002)],
        transforms="esp/tunnel/{ends}/{level} ah/transport//{level}",
    )
    used = set()
    for packet in flows(300):
        fate, (wire,) = left.send(packet)
        assert fate == Fate.DONE
        used.add((int.from_bytes(wire[24:28], "big"), int.from_bytes(wire[48:52], "big")))
        assert right.receive(wire) == (Fate.DONE, [packet])
    assert used == {(outer, inner) for outer in (0x3000, 0x3001, 0x3002) for inner in SPIS}


def between(number: int, family: int) -> list[bytes]:
    """Flows between the ends of the SAs themselves."""
    return [udp(*ENDS[family], b"%d" % n, sport=1024 + n, dport=2000) for n in range(number)]


def host(spi: int, family: int) -> SecurityAssociation:
    src, dst = map(address, ENDS[family])
    return esp(spi, src=src, dst=dst, mode=Mode.TRANSPORT)


@pytest.mark.parametrize("strict", [0, 1], ids=["any history", "check_policy_history"])
@pytest.mark.parametrize("family", [4, 6])
def test_flows_in_transport_mode_share_too_and_the_far_end_takes_all(family: int, strict: int) -> None:
    knobs = {"net.inet.ipsec.check_policy_history": strict}
    sas, rules = [host(spi, family) for spi in SPIS], f"ipsec esp/transport//unique:{REQID}"
    left = make_peer(sas, [policy("out", *ENDS[family], rules)], knobs)
    right = make_peer(sas, [policy("in", *ENDS[family], rules)], knobs)
    left.tables.parallel_sas = True
    offset = 20 if family == 4 else 40
    used = {}
    for packet in between(100, family) * 2:
        fate, (wire,) = left.send(packet)
        assert fate == Fate.DONE
        assert used.setdefault(packet, wire[offset : offset + 4]) == wire[offset : offset + 4]
        assert right.receive(wire) == (Fate.DONE, [packet])
    assert {int.from_bytes(spi, "big") for spi in used.values()} == set(SPIS)


@pytest.mark.parametrize("family", [4, 6])
def test_the_flows_of_sockets_with_a_policy_share_and_others_pass_in_clear(family: int) -> None:
    left = make_peer([host(spi, family) for spi in SPIS], [])
    left.tables.parallel_sas = True
    rule = SocketRule(setpolicy.parse("out ipsec esp/transport//require"), privileged=True)
    left.tables.spd.put_socket(SocketPolicy(1, None, rule))
    offset = 20 if family == 4 else 40
    used = set()
    for packet in between(100, family):
        fate, (wire,) = left.send(packet, mark=1)
        assert fate == Fate.DONE
        used.add(int.from_bytes(wire[offset : offset + 4], "big"))
    assert used == set(SPIS)
    assert left.send(between(1, family)[0]) == (Fate.PASS, [])


def test_a_route_based_tunnel_has_several_too() -> None:
    left, _ = pair([esp(spi) for spi in SPIS])
    left.outbound.through(Interface("ipsec0", address(A), address(B), REQID, 1400))
    assert {spi_of(left, packet) for packet in flows(100)} == set(SPIS)


@given(
    spis=st.sets(st.integers(0x100, 0xFFFFFFFF), max_size=6), parallel=st.booleans(), family=st.sampled_from((4, 6)),
    sport=st.integers(0, 65535), dport=st.integers(0, 65535),
)
def test_explain_names_the_sa_that_the_flow_gets(
    spis: set[int], parallel: bool, family: int, sport: int, dport: int
) -> None:
    left, _ = pair([esp(spi) for spi in sorted(spis)], family=family, parallel=parallel)
    packet = udp(*INNER[family], b"which?", sport=sport, dport=dport)
    src, dst = (address(text) for text in INNER[family])
    report = explain.outbound(left.tables, Flow(src, dst, 17, sport, dport), lambda _: 1500).transforms[0]
    if not spis:
        assert report.sa is None
        assert left.send(packet)[0] == Fate.HOLD
        return
    assert report.sa is not None
    assert report.sa.spi == spi_of(left, packet)
    assert ("share" in report.note) == (parallel and len(spis) > 1)
    assert not parallel or f"one of {len(spis)} SAs" in report.note or len(spis) == 1


def test_the_choice_does_not_depend_on_the_order_in_which_sas_came() -> None:
    sas = [esp(spi) for spi in SPIS]
    for n in range(100):
        number = flow_number(address(A), address(B), 6, n, 80)
        assert share(sas, number) is share(sas[::-1], number)
