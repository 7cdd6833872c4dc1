"""The compiled reader of a packet ring, on memory of our own: each frame once, in order, and nothing that is not its own."""

import ctypes
import os
import select
import struct
import time
from types import SimpleNamespace

import pytest
from engine_peers import udp
from engine_traffic import INNER, association, peers
from fast_peer import Fast

from ipsecq.counters import Counter
from ipsecq.datapath.ring import FRAME
from ipsecq.packet import ipv4

FRAMES = 8
START = 80


class Memory:
    """A ring that is always readable, written as the kernel writes it."""

    def __init__(self, path):
        self.room = ctypes.create_string_buffer(FRAME * FRAMES)
        self.cursor = (ctypes.c_uint64 * 1)()
        self.written = 0
        self.fd = os.eventfd(1)
        self.poll = select.epoll()
        self.poll.register(self.fd, select.EPOLLIN)
        self.path = path
        path.register_ring(SimpleNamespace(
            fd=self.fd, memory=ctypes.addressof(self.room), frames=FRAMES, cursor=self.cursor,
        ))  # fmt: skip

    def put(self, datagram, captured=None):
        """A datagram in the next frame, which must be the kernel's."""
        at = self.written % FRAMES * FRAME
        assert struct.unpack_from("=I", self.room, at) == (0,)
        self.room[at + START : at + START + len(datagram)] = datagram
        length = len(datagram) if captured is None else captured
        struct.pack_into("=IIIHH", self.room, at, 5, len(datagram), length, START, START)  # losing packets, too
        self.written += 1

    def waiting(self):
        """Frames that are still the worker's."""
        return sum(struct.unpack_from("=I", self.room, frame * FRAME)[0] & 1 for frame in range(FRAMES))

    def serve(self):
        """One round of the reader, up to what it leaves to others."""
        return self.path.serve(self.poll.fileno(), time.monotonic() + 60.0)

    def close(self):
        self.poll.close()
        os.close(self.fd)


@pytest.fixture(params=[4, 6])
def ring(request):
    sender, _, receiver = peers(association("gcm", request.param), request.param)
    fast = Fast(receiver)
    sent = [sender.send(udp(*INNER[4], bytes([n]) * 100))[1][0] for n in range(60)]
    inner = fast.receive(sent[:4])
    assert fast.path.ready()
    memory = Memory(fast.path)
    yield memory, fast, sent[4:], inner
    memory.close()


def right(datagram):
    """With a right header checksum, which the kernel fills in on the way out."""
    if datagram[0] >> 4 == 6:
        return datagram
    head = bytearray(datagram[:20])
    ipv4.fix_checksum(head)
    return bytes(head) + datagram[20:]


def test_all_frames_are_taken_in_order_and_given_back_around_the_end(ring):
    memory, fast, sent, _ = ring
    opened = []
    for start in range(0, 30, 6):
        for datagram in sent[start : start + 6]:
            memory.put(right(datagram))
        assert memory.serve() == (memory.fd, 0)
        opened += fast.opened()
        assert memory.waiting() == 0
        assert memory.cursor[0] == (start + 6) % FRAMES
    assert [packet[28:] for packet in opened] == [bytes([n + 4]) * 100 for n in range(30)]
    assert fast.peer.count(Counter.FAST_PACKETS) == 30 + 2  # and what the fixture's flow was learned by


def wrong_checksum(datagram):
    return datagram[:10] + bytes([datagram[10] ^ 1]) + datagram[11:]


@pytest.mark.parametrize(
    "harm",
    [
        lambda datagram: (datagram, len(datagram) - 1),  # cut off
        lambda datagram: (datagram, 8),
        lambda datagram: (datagram[:-100] + bytes([datagram[-100] ^ 1]) + datagram[-99:], None),  # unknown only later
        lambda datagram: (wrong_checksum(datagram), None) if datagram[0] == 0x45 else (datagram, 60),
        lambda datagram: (b"\x4f" + datagram[1:], None),
        lambda datagram: (bytes(len(datagram)), None),
    ],
)
def test_what_is_not_the_fast_paths_stays_in_its_frame_and_what_was_before_it_is_out(ring, harm):
    memory, fast, sent, _ = ring
    fast.path.opener.refusing = False  # forgeries are the engine's, too
    memory.put(right(sent[0]))
    datagram, captured = harm(right(sent[1]))
    memory.put(datagram, captured)
    memory.put(right(sent[2]))
    assert memory.serve() == (memory.fd, 0)
    assert [packet[28:] for packet in fast.opened()] == [bytes([4]) * 100]
    assert (memory.cursor[0], memory.waiting()) == (1, 2)
    assert memory.serve() == (memory.fd, 0)  # and nobody else has touched it
    assert (memory.cursor[0], memory.waiting(), fast.opened()) == (1, 2, [])
