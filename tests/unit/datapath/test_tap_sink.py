"""A worker's end of `ipsecq tap`: what the reader gets, and that neither waits for the other."""

from __future__ import annotations

import socket

import pytest
from engine_peers import make_peer, policy, udp

from ipsecq.counters import COUNTERS_WORDS, Counter, Fate
from ipsecq.datapath.tap import Taps, TapSink
from ipsecq.pcap.enc import HEADER_LENGTH, read_message
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

SA = "add 192.0.2.1 192.0.2.2 esp 0x1001 -m tunnel -E aes-gcm-16 0x" + "11" * 20 + ";"
PACKET = udp("10.1.0.7", "10.2.0.7", b"x" * 1000)
FOREVER = 10**12


class Bench:
    """An engine that one sink watches."""

    def __init__(self, **more):
        sas = apply(parse(SA), Sad(), Spd(), now=1000.0).sad.dump()
        rule = policy("out", "10.1.0.0/24", "10.2.0.0/24", "ipsec esp/tunnel/192.0.2.1-192.0.2.2/require")
        self.peer = make_peer(sas, [rule])
        self.counters = [0] * COUNTERS_WORDS
        ours, self.reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reader.setblocking(False)
        self.ended = False
        self.sink = TapSink(ours.detach(), 3, self.counters, ways=(0, 1), **more)
        self.sink.refill(0, FOREVER)
        self.taps = Taps(self.peer.outbound, self.peer.inbound, self.peer.tables.sysctl)
        self.taps.attach(1, self.sink)

    def send(self, count):
        for _ in range(count):
            assert self.peer.send(PACKET)[0] == Fate.DONE
        self.taps.flush()

    def read(self):
        """(packets, told drops) of all messages that wait."""
        records, dropped = [], 0
        while True:
            try:
                octets = self.reader.recv(1 << 19)
            except BlockingIOError:
                return records, dropped
            if not octets:
                self.ended = True
                return records, dropped
            worker, lost, more = read_message(octets)
            assert worker == 3
            records += more
            dropped += lost


@pytest.fixture
def make():
    benches = []

    def build(**more):
        benches.append(Bench(**more))
        return benches[-1]

    yield build
    for bench in benches:
        bench.taps.close()
        bench.reader.close()


def test_a_batch_is_a_message_of_its_packets_in_order(make):
    bench = make()
    bench.send(5)
    records, dropped = bench.read()
    assert [record.data[HEADER_LENGTH:] for record in records] == [PACKET] * 5
    assert [record.time for record in records] == sorted(record.time for record in records)
    assert {(record.kind, record.length) for record in records} == {(5, HEADER_LENGTH + len(PACKET))}
    assert dropped == 0
    assert bench.counters[Counter.TAP_PACKETS] == 5


def test_a_snapped_packet_keeps_its_length(make):
    bench = make(snaplen=40)
    bench.send(1)
    (record,), _ = bench.read()
    assert record.data[HEADER_LENGTH:] == PACKET[:40]
    assert record.length == HEADER_LENGTH + len(PACKET)


def test_a_reader_that_is_full_is_told_how_many_packets_it_lost(make):
    bench = make(share=100)
    sent = 0
    while not bench.counters[Counter.TAP_DROPPED]:
        bench.send(50)
        bench.sink.refill(0, FOREVER)
        sent += 50
        assert sent < 100_000
    first, told = bench.read()
    assert told == 0
    bench.taps.tick()
    rest, told = bench.read()
    assert len(first) + len(rest) + told == sent
    assert told == bench.counters[Counter.TAP_DROPPED]


def test_beyond_its_share_a_reader_gets_nothing_more_until_time_has_gone_by(make):
    bench = make(share=1)
    bench.sink.refill(-FOREVER, 0)
    bench.send(10)
    assert bench.read() == ([], 0)
    bench.send(10)
    bench.taps.idle = FOREVER
    bench.taps.tick()
    assert bench.read() == ([], 20)
    bench.send(3)
    records, _ = bench.read()
    assert len(records) == 3


def test_what_waits_and_what_was_dropped_is_told_at_the_end(make):
    bench = make(share=1)
    for _ in range(3):
        bench.peer.send(PACKET)
    bench.sink.drop(7)
    bench.taps.detach(1)
    records, told = bench.read()
    assert (len(records), told, bench.ended) == (3, 7, True)


def test_the_end_waits_for_a_reader_who_has_no_room_but_not_forever(make, monkeypatch):
    for patient in (True, False):
        bench = make(share=100)
        while not bench.counters[Counter.TAP_DROPPED]:
            bench.send(50)
            bench.sink.refill(0, FOREVER)
        monkeypatch.setattr("ipsecq.datapath.tap.END_SECONDS", 3600.0 if patient else 0.0)
        bench.taps.detach(1)
        bench.taps.tick()
        _, told = bench.read()
        assert (told, bench.ended) == (0, not patient)
        if patient:
            bench.taps.tick()
            assert bench.read() == ([], bench.counters[Counter.TAP_DROPPED])
            assert bench.ended


def test_a_reader_that_has_gone_is_watched_for_no_longer(make):
    bench = make()
    bench.reader.close()
    bench.send(1)
    assert not bench.taps.sinks
    bench.send(1)
