"""Netlink's framing: what is written is read again, and what was cut off or is nonsense ends the reading."""

import errno
from struct import pack

from hypothesis import given
from hypothesis import strategies as st

from ipsecq import netlink as nl

VALUES = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=6)


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), VALUES), max_size=4))
def test_messages_and_attributes_are_read_as_they_were_written(told):
    octets = b"".join(
        nl.message(kind, nl.NLM_F_ACK, sequence, b"".join(nl.attribute(*value) for value in values))
        for kind, sequence, values in told
    )
    assert [(kind, sequence, list(nl.attributes(body))) for kind, sequence, body in nl.messages(octets)] == told


@given(st.binary(max_size=100))
def test_reading_any_octets_comes_to_an_end(octets):
    assert sum(16 + len(body) for _, _, body in nl.messages(octets)) <= len(octets)
    assert sum(4 + len(value) for _, value in nl.attributes(octets)) <= len(octets)


def test_a_request_for_a_queue_is_laid_out_as_nfnetlink_wants_it():
    octets = nl.message(0x302, nl.NLM_F_ACK, 7, nl.genmsg(0, 0x1234) + nl.nested(1, nl.string(2, "ab")))
    assert octets == pack("=IHHIIBB2sHHHH4s", 32, 0x302, 5, 7, 0, 0, 0, b"\x12\x34", 12, 0x8001, 7, 2, b"ab\0\0")


def test_an_answer_is_an_errno_or_none():
    assert nl.error_number(pack("=i", -errno.EEXIST) + bytes(16)) == errno.EEXIST
    assert nl.error_number(bytes(20)) == 0
