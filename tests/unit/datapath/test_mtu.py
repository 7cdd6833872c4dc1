"""Path MTUs come from routes, shrink by what is learned, never grow by it, and are forgotten after ten minutes."""

from __future__ import annotations

import socket

import pytest

from ipsecq.datapath import rtnetlink
from ipsecq.datapath.mtu import LEARNED_SECONDS, PathMtu

HERE4 = socket.inet_aton("127.0.0.1")
HERE6 = socket.inet_pton(socket.AF_INET6, "::1")


def test_the_loopback_route_gives_mtu_and_source():
    path = PathMtu()
    assert path.mtu_of(HERE4) == 65535  # the device's 65536, which no datagram can fill
    assert path.source_for(HERE4) == HERE4


def test_a_learned_mtu_lasts_ten_minutes():
    path = PathMtu()
    assert path.learn(HERE4, 1400, 1000.0)
    assert path.mtu_of(HERE4) == 1400
    path.advance(1000.0 + LEARNED_SECONDS - 1)
    assert path.mtu_of(HERE4) == 1400
    path.advance(1000.0 + LEARNED_SECONDS + 1)
    assert path.mtu_of(HERE4) == 65535


def test_a_learned_mtu_never_raises_and_never_falls_below_the_minimum():
    path = PathMtu()
    assert path.learn(HERE4, 1400, 0.0)
    assert not path.learn(HERE4, 1450, 1.0)
    assert path.mtu_of(HERE4) == 1400
    assert path.learn(HERE4, 500, 2.0)  # min_pmtu has been asked before
    assert path.mtu_of(HERE4) == 500
    assert path.learn(HERE4, 0, 2.0)
    assert path.mtu_of(HERE4) == 68
    assert path.learn(HERE6, 100, 2.0)
    assert path.mtu_of(HERE6) == 1280


def test_a_destination_without_route_gets_a_default_and_no_source():
    path = PathMtu()
    nowhere = socket.inet_pton(socket.AF_INET6, "fe80::1")  # link-local without a scope: no route can say where
    assert path.mtu_of(nowhere) == 1500
    assert path.source_for(nowhere) == bytes(16)


@pytest.mark.parametrize(("floor", "configured", "believed"), [(70000, 68000, 65535), (66000, 65535, 65535)])
def test_a_floor_raises_no_mtu_above_what_a_datagram_can_have(monkeypatch, floor, configured, believed):
    monkeypatch.setattr(rtnetlink, "configured_mtu", lambda dst, mark: configured)
    assert PathMtu(floor=lambda: floor).mtu_of(HERE4) == believed


def test_the_configured_mtu_of_the_loopback_is_its_devices():
    assert rtnetlink.configured_mtu(HERE4, 0) == 65536
