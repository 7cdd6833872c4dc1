"""``debug``: why a packet was dropped, in the log."""

from __future__ import annotations

import logging

import pytest
from engine_peers import make_peer, policy, udp

from ipsecq.datapath import droplog
from ipsecq.datapath.droplog import DropLog

PACKETS = {4: udp("10.1.0.7", "10.2.0.7", b"x"), 6: udp("fd01::7", "fd02::7", b"x")}
NAMES = {4: "net.inet.ipsec.debug", 6: "net.inet6.ipsec6.debug"}


def listening(knobs):
    rules = [policy("out", "10.1.0.0/24", "10.2.0.0/24", "discard"), policy("out", "fd01::/64", "fd02::/64", "discard")]
    peer = make_peer([], rules, knobs)
    peer.outbound.on_drop = peer.inbound.on_drop = DropLog(peer.tables.sysctl)
    return peer


@pytest.mark.parametrize("version", [4, 6])
def test_a_drop_is_logged_with_its_reason_while_debug_is_set(version, caplog):
    caplog.set_level(logging.INFO)
    peer = listening({})
    peer.send(PACKETS[version])
    assert not caplog.records
    peer.tables.sysctl.set(NAMES[version], 1)
    for packet in PACKETS.values():
        peer.send(packet)
    src = "10.1.0.7 > 10.2.0.7" if version == 4 else "fd01::7 > fd02::7"
    assert caplog.messages == [f"out dropped (out_discard): {src} protocol 17 1000 2000, {len(PACKETS[version])} octets"]


def test_what_comes_in_is_named_by_its_spi(caplog):
    caplog.set_level(logging.INFO)
    peer = listening({"net.inet.ipsec.debug": 1})
    esp = bytearray(PACKETS[4])
    esp[9] = 50
    peer.receive(bytes(esp))
    assert caplog.messages == ["in dropped (esp_notdb): 10.1.0.7 > 10.2.0.7 protocol 50 SPI 0x03e807d0"]


def test_a_flood_is_a_few_lines_and_their_number(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    now = 1000.0
    monkeypatch.setattr(droplog.time, "monotonic", lambda: now)
    peer = listening({"net.inet.ipsec.debug": 1})
    for _ in range(1000):
        peer.send(PACKETS[4])
    assert len(caplog.messages) == droplog.LINES
    now += 1
    peer.send(PACKETS[4])
    assert caplog.messages[-1].endswith(f"{1000 - droplog.LINES} more before this one")
