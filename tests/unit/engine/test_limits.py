"""What packets can make the engine keep, and where it stops; and fragments in clear are held against policy whole."""

from __future__ import annotations

import os

import pytest
from engine_peers import make_peer, policy, udp

from ipsecq.counters import Counter, Fate
from ipsecq.crypto import cipher
from ipsecq.engine import inbound as inbound_module
from ipsecq.engine import outbound as outbound_module
from ipsecq.engine import oversize
from ipsecq.engine.emit import Acquire
from ipsecq.engine.inbound import Inbound
from ipsecq.numbers import Mode, Protocol
from ipsecq.packet import ipv4
from ipsecq.packet.fragments import Reassembler, fragment
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key
from ipsecq.transforms.esp import EspTransform

TUNNEL = "ipsec esp/tunnel/192.0.2.1-192.0.2.2/require"


def test_the_flow_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound_module, "MAX_FLOWS", 50)
    peer = make_peer([], [policy("out", "10.9.0.0/16", "0.0.0.0/0", "none")])
    for port in range(1, 400):
        assert peer.send(udp("10.9.0.1", "10.2.0.2", b"x", sport=port))[0] == Fate.PASS
        assert len(peer.outbound._flows) <= 50


def test_the_cache_of_inbound_verdicts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound_module, "MAX_FLOWS", 50)
    peer = make_peer([], [])
    for port in range(1, 400):
        assert peer.receive(udp("10.9.0.1", "10.2.0.2", b"x", sport=port))[0] == Fate.PASS
        assert len(peer.inbound._verdicts) <= 50


def test_acquires_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport policy for a wide network asks for a pair of SAs for each address that somebody scans."""
    monkeypatch.setattr(outbound_module, "MAX_ACQUIRES", 50)
    peer = make_peer([], [policy("out", "0.0.0.0/0", "0.0.0.0/0", "ipsec esp/transport//require")])
    asked = 0
    for number in range(400):
        peer.send(udp("10.9.0.1", f"10.2.{number >> 8}.{number & 255}", b"x"))
        asked += sum(isinstance(event, Acquire) for event in peer.emit.events)
        assert len(peer.outbound._acquired) <= 50
    assert asked == 400


def test_what_is_told_about_packets_too_big_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oversize, "MAX_TOLD", 50)
    sas = [SecurityAssociation(
        Protocol.ESP, 0x1000, bytes([32, 1, 13, 184, *bytes(11), 1]), bytes([32, 1, 13, 184, *bytes(11), 2]), Mode.TUNNEL,
        encryption="aes-gcm-16", encryption_key=Key(bytes(20)),
    )]  # fmt: skip
    peer = make_peer(sas, [policy("out", "fd00:1::/64", "::/0", "ipsec esp/tunnel/2001:db8::1-2001:db8::2/require")])
    for number in range(200):
        peer.send(udp("fd00:1::2", f"fd00:2::{number:x}", bytes(1450)))
        assert len(peer.outbound._oversize._told) <= 50
    assert peer.count(Counter.OUT_TOOBIG_SENT) == 200


def test_a_packet_of_endless_tunnels_is_dropped_at_a_depth() -> None:
    key = Key(os.urandom(20))
    here, there = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
    sa = SecurityAssociation(
        Protocol.ESP, 0x1000, here, there, Mode.TUNNEL, encryption="aes-gcm-16", encryption_key=key, replay_window=64
    )
    peer = make_peer([sa], [])
    seal = EspTransform(0x1000, cipher.build("aes-gcm-16", key, None, None)).seal
    packet = udp("10.9.0.1", "10.2.0.2", b"x")
    for sequence in range(1, 30):
        body = seal(packet, 4, sequence)
        packet = ipv4.header(here, there, 50, len(body)) + body
    assert peer.receive(packet) == (Counter.IN_TOODEEP, [])
    assert peer.count(Counter.IN_TOODEEP) == 1


@pytest.mark.parametrize("reassembling", [False, True])
@pytest.mark.parametrize("protected", [False, True])
def test_fragments_in_clear_do_not_get_past_a_policy_that_wants_the_datagram_protected(
    reassembling: bool, protected: bool
) -> None:
    peer = make_peer([], [policy("in", "10.9.0.0/16", "10.2.0.0/16", TUNNEL, 17)])
    peer.inbound = Inbound(peer.tables, Reassembler(1 << 20, 8, 30.0) if reassembling else None)
    source = "10.9.0.1" if protected else "10.8.0.1"
    pieces = fragment(udp(source, "10.2.0.2", bytes(3000)), 1000, 7)
    assert len(pieces) > 2
    fates = [peer.receive(piece)[0] for piece in pieces]
    if not reassembling:
        assert fates == [Counter.IP_FRAGMENT] * len(pieces)
        return
    last = Counter.IN_POLVIO if protected else Fate.PASS
    assert fates == [Fate.ABSORBED] * (len(pieces) - 1) + [last]
    assert peer.emit.inner == []
