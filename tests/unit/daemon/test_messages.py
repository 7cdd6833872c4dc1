"""Supervisor and worker: whole frames down, suspicious lines up."""

import json
import socket
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.daemon.messages import BATCH, MAX_LINE, FrameReader, LineReader, encode, encode_line, frames
from ipsecq.errors import DaemonError
from ipsecq.numbers import Action, Direction, Protocol
from ipsecq.policy.model import Policy, Selector
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key


@pytest.fixture
def pair():
    up, down = socket.socketpair()
    down.setblocking(False)
    yield up, down
    up.close()
    down.close()


def test_frames_arrive_whole_in_order_with_keys(pair):
    up, down = pair
    reader = FrameReader(down)
    octets = encode(3, [("sa_add", Key(b"k" * 16))]) + encode(4, [("sysctl", "a", 1)])
    for index in range(0, len(octets), 7):
        up.send(octets[index : index + 7])
        if index == 7:
            assert list(reader.read()) == []
    assert list(reader.read()) == [(3, [("sa_add", Key(b"k" * 16))]), (4, [("sysctl", "a", 1)])]
    assert not reader.closed


def test_workers_do_not_keep_where_sas_and_policies_came_from(pair):
    up, down = pair
    sa = SecurityAssociation(Protocol.ESP, 0x1000, b"\x0a\0\0\1", b"\x0a\0\0\2", label="setkey.conf:1")
    policy = Policy(Direction.OUT, Selector(*[bytes(4)] * 4), Action.NONE, label="setkey.conf:2")
    up.send(encode(1, [("sa_put", sa), ("spd_put", policy), ("spd_replace", [policy])]))
    (_, ((_, got), (_, put), (_, (whole,)))), = FrameReader(down).read()
    assert (got, put, whole) == (replace(sa, label=""), *[replace(policy, label="")] * 2)
    assert sa.label
    assert policy.label


def test_frames_behind_the_one_that_was_waited_for_are_there_at_the_next_read(pair):
    """A change that follows a new worker's first state in one piece: nothing more would come to wake it up."""
    up, down = pair
    reader = FrameReader(down)
    up.send(encode(3, ["first state"]) + encode(4, ["change"]))
    assert next(reader.read()) == (3, ["first state"])
    assert list(reader.read()) == [(4, ["change"])]


def test_the_supervisors_death_is_seen(pair):
    up, down = pair
    reader = FrameReader(down)
    up.send(encode(1, []))
    up.close()
    assert list(reader.read()) == [(1, [])]
    assert reader.closed


def test_long_changes_are_cut_and_only_the_last_part_is_answered(pair):
    up, down = pair
    reader = FrameReader(down)
    for frame in frames(9, [("op", number) for number in range(2 * BATCH + 1)]):
        up.sendall(frame)
    got = list(reader.read())
    assert [generation for generation, _ in got] == [0, 0, 9]
    arrived = [operation for _, operations in got for operation in operations]
    assert arrived == [("op", number) for number in range(2 * BATCH + 1)]


def test_a_frame_without_end_is_an_error(pair):
    up, down = pair
    up.send(b"\xff\xff\xff\xff")
    with pytest.raises(DaemonError):
        list(FrameReader(down).read())


@given(st.lists(st.binary(max_size=400)))
def test_nonsense_of_a_worker_is_never_believed(chunks):
    reader = LineReader()
    for chunk in chunks:
        for report in reader.feed(chunk):
            assert isinstance(report["kind"], str)
    list(reader.feed(b"\n"))
    [report] = reader.feed(encode_line("ack", generation=7))
    assert report == {"kind": "ack", "generation": 7}


def test_an_endless_line_takes_bounded_memory():
    reader = LineReader()
    for _ in range(1000):
        assert list(reader.feed(b"x" * 1000)) == []
        assert len(reader._buffer) <= MAX_LINE


def test_reports_survive_any_cut():
    octets = encode_line("a", n=1) + encode_line("b", text="ü\n")
    for cut in range(len(octets)):
        reader = LineReader()
        got = [*reader.feed(octets[:cut]), *reader.feed(octets[cut:])]
        assert [report["kind"] for report in got] == ["a", "b"]
    assert json.loads(encode_line("b", text="\n"))["text"] == "\n"
