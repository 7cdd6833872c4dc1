"""A packet message is read right whatever its layout, and no packet's content passes for an attribute."""

from __future__ import annotations

import sys
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.datapath import nfqueue as nl
from ipsecq.netlink import NLMSG_ERROR, attribute


def packet_message(payload: bytes, *, hook: int = 4, mark: int = 0, info: int = 0, extra: bytes = b"", number: int = 7):
    attributes = attribute(1, pack(">IHB", number, 0x0800, hook))
    attributes += attribute(nl.NFQA_IFINDEX_OUTDEV, nl.be32(3))
    if mark:
        attributes += attribute(nl.NFQA_MARK, nl.be32(mark))
    attributes += extra
    if info:
        attributes += attribute(nl.NFQA_SKB_INFO, nl.be32(info))
    # The payload is not padded: the kernel ends the message with it.
    attributes += pack("=HH", 4 + len(payload), nl.NFQA_PAYLOAD) + payload
    return pack("=IHHIIBBH", 20 + len(attributes), nl.NFQNL_MSG_PACKET, 0, 0, 0, 2, 0, 0) + attributes


def matches(layout: nl.Layout, message: bytes) -> bool:
    padded = memoryview(message + bytes(256))
    return layout.unpack_from(padded)[::2] == layout.expected


def test_walk_finds_every_part():
    hardware = attribute(9, pack(">HH8s", 6, 0, b"\2\0\0\0\0\1\0\0"))
    message = packet_message(b"E" * 33, mark=0x1234, info=3, extra=hardware, hook=0)
    found = nl.walk(memoryview(message), len(message))
    assert (found.hook, found.mark, found.outdev, found.info, found.captured) == (0, 0x1234, 3, 3, 0)
    assert message[found.start : found.end] == b"E" * 33
    assert found.cookie == int.from_bytes(pack(">I", 7), sys.byteorder)


def test_layout_reads_what_walk_reads():
    message = packet_message(b"first", mark=1, info=1)
    layout = nl.Layout(memoryview(message), len(message))
    other = packet_message(b"second, longer", mark=0xABCD, info=2, number=99)
    fields = layout.unpack_from(memoryview(other))
    found = nl.walk(memoryview(other), len(other))
    assert fields[::2] == layout.expected
    assert fields[1] == found.cookie
    assert fields[2] == found.hook
    assert fields[layout.mark].to_bytes(4, sys.byteorder) == nl.be32(0xABCD)
    assert fields[layout.info].to_bytes(4, sys.byteorder) == nl.be32(2)
    assert layout.start == found.start


def test_layouts_of_other_attributes_and_hooks_do_not_match():
    plain = packet_message(b"x" * 64)
    layout = nl.Layout(memoryview(plain), len(plain))
    assert matches(layout, packet_message(b"y" * 99))
    assert not matches(layout, packet_message(b"y" * 99, mark=5))
    assert not matches(layout, packet_message(b"y" * 99, hook=0))
    error = pack("=IHHIIi", 36, NLMSG_ERROR, 0, 0, 0, -2)
    assert not matches(layout, error + plain[20:])


@given(st.binary(min_size=40, max_size=200), st.booleans())
def test_a_payload_that_imitates_attributes_never_matches_a_longer_layout(octets, imitate):
    marked = packet_message(b"z" * 20, mark=0x01000000)
    layout = nl.Layout(memoryview(marked), len(marked))
    # The payload begins where the layout expects NFQA_MARK; its content continues as the layout does.
    payload = marked[layout.start - 8 + 4 :] + octets if imitate else octets
    assert not matches(layout, packet_message(payload))


@given(st.binary(max_size=120))
def test_walk_survives_any_octets(octets):
    found = nl.walk(memoryview(octets), len(octets))
    assert found is None or found.start <= found.end <= len(octets)


def test_layout_refuses_cut_packets_and_messages_without_payload():
    cut = packet_message(b"E" * 20, extra=attribute(nl.NFQA_CAP_LEN, nl.be32(9000)))
    with pytest.raises(ValueError, match="attribute 13"):
        nl.Layout(memoryview(cut), len(cut))
    bare = packet_message(b"")[:-4]
    with pytest.raises(ValueError, match="no payload"):
        nl.Layout(memoryview(bare), len(bare))
