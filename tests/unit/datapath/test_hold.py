"""Packets that wait for an SA are bounded in number, octets and time, and come back in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ipsecq.datapath.hold import Holder


def test_the_newest_packets_of_a_key_are_kept_in_order():
    holder = Holder(max_packets_per_key=2)
    dropped = [holder.hold("a", bytes([n]), float(n)) for n in range(4)]
    assert dropped == [0, 0, 1, 1]
    assert holder.release("a") == [b"\2", b"\3"]
    assert holder.release("a") == []
    assert (holder.waiting, holder.dropped) == (0, 2)


def test_a_full_holder_drops_the_oldest_key_first():
    holder = Holder(max_packets_per_key=4, max_total=3)
    for n, key in enumerate("abcd"):
        holder.hold(key, key.encode(), float(n))
    assert holder.release("a") == []
    assert holder.release("d") == [b"d"]


def test_octets_are_bounded_too():
    holder = Holder(max_octets=100)
    assert holder.hold("a", bytes(60), 0.0) == 0
    assert holder.hold("b", bytes(60), 1.0) == 1
    assert holder.hold("c", bytes(101), 2.0) == 1
    assert holder.release_all() == [(1.0, bytes(60), 0)]


def test_packets_expire_by_their_own_age():
    holder = Holder(timeout=10.0)
    holder.hold("a", b"1", 0.0)
    holder.hold("a", b"2", 5.0)
    holder.hold("b", b"3", 9.0)
    assert holder.expire(9.9) == 0
    assert holder.expire(10.0) == 1
    assert holder.release_all() == [(5.0, b"2", 0), (9.0, b"3", 0)]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 50), st.booleans()), max_size=80))
def test_the_bounds_hold_whatever_comes(steps):
    holder = Holder(max_packets_per_key=3, max_total=7, max_octets=120, timeout=20.0)
    came = gone = 0
    for now, (key, size, release) in enumerate(steps):
        if release:
            gone += len(holder.release(key))
        else:
            came += 1
            holder.hold(key, bytes(size), float(now))
        holder.expire(float(now))
        assert holder.waiting <= 7
        assert came == holder.waiting + holder.dropped + gone
    rest = holder.release_all()
    assert sum(len(packet) for _, packet, _ in rest) <= 120
    assert came == len(rest) + holder.dropped + gone
