"""What the kernel does by itself with clear packets, by action and level; and which worker serves what."""

from __future__ import annotations

from collections import Counter

import pytest

from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.netfilter.steering import buckets, inbound_queue, queue_of, worker_of
from ipsecq.netfilter.verdicts import verdict_of
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sysctl import Sysctl

ANY = Selector(bytes(4), b"\xff" * 4, bytes(4), b"\xff" * 4)
A, B, C = b"\xc0\0\2\1", b"\xc0\0\2\2", b"\xc0\0\2\3"


def inbound(*transforms: Transform, sysctl: Sysctl | None = None) -> str:
    return verdict_of(Policy(Direction.IN, ANY, Action.IPSEC, transforms), sysctl or Sysctl(), 2)


@pytest.mark.parametrize("level", [Level.REQUIRE, Level.UNIQUE])
def test_clear_packets_are_dropped_where_esp_or_ah_is_required(level: Level) -> None:
    assert inbound(Transform(Protocol.ESP, Mode.TUNNEL, A, B, level)) == "goto in_clear"
    assert inbound(Transform(Protocol.AH, Mode.TRANSPORT, level=level)) == "goto in_clear"


def test_use_and_ipcomp_are_never_enforced_inbound() -> None:
    assert inbound(Transform(Protocol.ESP, Mode.TUNNEL, A, B, Level.USE)) == "accept"
    assert inbound(Transform(Protocol.IPCOMP, Mode.TRANSPORT, level=Level.REQUIRE)) == "accept"


@pytest.mark.parametrize(
    ("protocol", "mode", "knob"),
    [
        (Protocol.ESP, Mode.TRANSPORT, "esp_trans_deflev"), (Protocol.ESP, Mode.TUNNEL, "esp_net_deflev"),
        (Protocol.AH, Mode.TRANSPORT, "ah_trans_deflev"), (Protocol.AH, Mode.TUNNEL, "ah_net_deflev"),
    ],
)  # fmt: skip
def test_level_default_is_what_its_own_knob_says(protocol: Protocol, mode: Mode, knob: str) -> None:
    transform = Transform(protocol, mode, A, B)
    assert inbound(transform) == "accept"
    assert inbound(transform, sysctl=Sysctl({f"net.inet.ipsec.{knob}": 2})) == "goto in_clear"
    assert inbound(transform, sysctl=Sysctl({f"net.inet6.ipsec6.{knob}": 2})) == "accept"


def test_outbound_ipsec_goes_to_the_worker_of_the_outermost_tunnel() -> None:
    inner = Transform(Protocol.ESP, Mode.TUNNEL, A, B, Level.REQUIRE)
    outer = Transform(Protocol.AH, Mode.TUNNEL, A, C, Level.REQUIRE)
    both = Policy(Direction.OUT, ANY, Action.IPSEC, (inner, outer))
    alone = Policy(Direction.OUT, ANY, Action.IPSEC, (outer,))
    other = Policy(Direction.OUT, ANY, Action.IPSEC, (inner,))
    assert worker_of(both, 64) == worker_of(alone, 64) != worker_of(other, 64)
    assert verdict_of(both, Sysctl(), 64) == f"goto out_worker_{worker_of(alone, 64)}"


def test_transport_policies_are_spread_over_all_workers() -> None:
    policy = Policy(Direction.OUT, ANY, Action.IPSEC, (Transform(Protocol.ESP, Mode.TRANSPORT, level=Level.REQUIRE),))
    assert worker_of(policy, 4) is None
    assert verdict_of(policy, Sysctl(), 4) == "goto out_worker_spread"


def test_outbound_use_has_chains_of_its_own_as_it_may_leave_in_clear() -> None:
    transform = Transform(Protocol.ESP, Mode.TRANSPORT)
    policy = Policy(Direction.OUT, ANY, Action.IPSEC, (transform,))
    assert verdict_of(policy, Sysctl(), 4) == "goto out_use_spread"
    assert verdict_of(policy, Sysctl({"net.inet.ipsec.esp_trans_deflev": 2}), 4) == "goto out_worker_spread"


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 16, 33])
def test_every_worker_gets_its_share_of_spis(workers: int) -> None:
    share = Counter(inbound_queue(spi, workers) for spi in range(0x1000, 0x1000 + 4 * buckets(workers)))
    assert set(share) == set(range(workers))
    assert max(share.values()) <= 1.5 * min(share.values())


def test_marks_must_be_two_bits_of_the_mask() -> None:
    with pytest.raises(ValueError, match="mark_mask"):
        NetfilterSettings(mark_mask=0x1000000)


def test_a_policys_queue_is_a_lane_of_its_worker_and_policies_that_share_an_sa_share_it() -> None:
    def policy(level: Level, reqid: int, dst: bytes = B) -> Policy:
        return Policy(Direction.OUT, ANY, Action.IPSEC, (Transform(Protocol.ESP, Mode.TUNNEL, A, dst, level, reqid),))

    assert queue_of(policy(Level.REQUIRE, 0), 3, 4) == queue_of(policy(Level.USE, 7), 3, 4)
    queues = [queue_of(policy(Level.UNIQUE, reqid), 3, 4) for reqid in range(1, 200)]
    assert {queue % 3 for queue in queues if queue is not None} == {worker_of(policy(Level.UNIQUE, 1), 3)}
    assert min(Counter(queues).values()) > 199 / 4 / 2
    peers = Counter(queue_of(policy(Level.REQUIRE, 0, bytes([192, 0, 2, n])), 3, 4) for n in range(240))
    assert len(peers) == 12
    assert max(peers.values()) < 3 * 20


def test_without_a_tunnel_there_is_no_queue_of_its_own() -> None:
    policy = Policy(Direction.OUT, ANY, Action.IPSEC, (Transform(Protocol.ESP, Mode.TRANSPORT, level=Level.REQUIRE),))
    assert queue_of(policy, 2, 4) is None
