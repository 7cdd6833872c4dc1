"""How often an SA is asked for."""

from __future__ import annotations

import pytest
from engine_peers import make_peer, policy, udp

from ipsecq.counters import Fate
from ipsecq.engine.emit import Acquire

PACKET = udp("10.1.0.7", "10.2.0.7", b"hello")
NAMES = ("net.key.blockacq_lifetime", "net.key.blockacq_count")


def asked(peer) -> int:
    fate, wire = peer.send(PACKET)
    assert (fate, wire) == (Fate.HOLD, [])
    return sum(isinstance(event, Acquire) for event in peer.emit.events)


@pytest.mark.parametrize("seconds", [20, 5, 300])
def test_a_pair_is_asked_for_again_after_blockacq_lifetime(seconds: int) -> None:
    peer = make_peer(
        [], [policy("out", "10.1.0.0/24", "10.2.0.0/24", "ipsec esp/transport//require")],
        {"net.key.blockacq_lifetime": seconds, "net.key.blockacq_count": 1_000_000},
    )  # fmt: skip
    assert asked(peer) == 1
    peer.now += seconds - 1
    assert asked(peer) == 0
    peer.now += 1
    assert asked(peer) == 1
    assert asked(peer) == 0
