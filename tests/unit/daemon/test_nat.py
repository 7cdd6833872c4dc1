"""Peers behind a NAT: a new port is followed when the SA allows it; silent mappings are kept alive."""

from dataclasses import replace

import pytest

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.nat import NatPeers
from ipsecq.daemon.table import SharedTable
from ipsecq.numbers import Mode, Protocol
from ipsecq.packet.checksum import verify_transport
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import NatTraversal, SecurityAssociation, Slot
from ipsecq.secret import Key

US, PEER, OTHER = b"\xc0\0\2\1", b"\xc0\0\2\2", b"\xc0\0\2\3"
US6, PEER6 = bytes(15) + b"\1", bytes(15) + b"\2"


class Sent:
    """A raw socket's place."""

    def __init__(self):
        self.datagrams = []

    def send(self, datagrams):
        self.datagrams += datagrams
        return len(datagrams)


def esp(spi, src, dst, natt):
    return SecurityAssociation(
        Protocol.ESP, spi, src, dst, Mode.TUNNEL, encryption="aes-gcm-16", encryption_key=Key(bytes([spi & 255]) * 20),
        replay_window=64, natt=natt,
    )  # fmt: skip


@pytest.fixture
def authority(tmp_path):
    table = SharedTable.open(tmp_path / "table", bytes(16), capacity=1 << 16)
    return Authority(table, LeaseBook.open(tmp_path, table, bytes(32)))


def pair(authority, *, rebind=True):
    inbound = esp(0x201, PEER, US, NatTraversal(4500, 4500, rebind=rebind))
    outbound = esp(0x202, US, PEER, NatTraversal(4500, 4500, rebind=rebind))
    for sa in (inbound, outbound):
        authority.add_sa(sa)
    return inbound.key, outbound.key


def test_a_peers_new_port_is_used_for_what_we_send_and_its_sequence_numbers_go_on(authority):
    into, out = pair(authority)
    slot = authority.sad.get(*out).slot
    nat = NatPeers(authority, Sent(), lambda address: address == US, 0)
    assert nat.follow(into, PEER, 61000)
    assert authority.sad.get(*out).natt.dport == 61000
    assert authority.sad.get(*into).natt.sport == 61000
    assert authority.sad.get(*out).slot == slot


@pytest.mark.parametrize(("rebind", "src", "port"), [(False, PEER, 61000), (True, OTHER, 61000), (True, PEER, 0)])
def test_a_peer_is_not_followed_without_leave_nor_to_another_address_or_no_port(authority, rebind, src, port):
    into, out = pair(authority, rebind=rebind)
    nat = NatPeers(authority, Sent(), lambda address: address == US, 0)
    assert not nat.follow(into, src, port)
    assert authority.sad.get(*out).natt.dport == 4500


def test_only_silent_outbound_mappings_are_kept_alive(authority):
    pair(authority)
    authority.add_sa(esp(0x203, US6, PEER6, NatTraversal(4500, 4501)))
    authority.add_sa(replace(esp(0x204, US, OTHER, None)))
    busy = esp(0x205, US, OTHER, NatTraversal())
    authority.add_sa(busy)
    authority.usage_words(busy)[Slot.LAST_USE] = 995
    sent = Sent()
    nat = NatPeers(authority, sent, lambda address: address in {US, US6}, 20)
    assert nat.keep_alive(1000.0) == 2
    views = []
    for datagram in sent.datagrams:
        view = PacketView()
        assert view.load(datagram)
        assert datagram[view.offset + 8 : view.length] == b"\xff"
        views.append((view.dst, view.sport, view.dport))
    assert views == [(PEER, 4500, 4500), (PEER6, 4500, 4501)]
    assert verify_transport(sent.datagrams[1])
    assert nat.keep_alive(1001.0) == 0  # not with every tick
    assert NatPeers(authority, sent, lambda _: True, 0).keep_alive(2000.0) == 0
