"""The kernel's own answers about real sockets of this machine."""

import contextlib
import os
import socket

import pytest

from ipsecq.datapath.sockdiag import SockDiag, SocketLookup
from ipsecq.pfkey.somark import get_mark, set_mark

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to set and see marks")]
MASK, MARK, OTHER = 0xFCFF0000, 0x80000000, 0x40000000
LOCAL4, LOCAL6 = socket.inet_aton("127.0.0.1"), socket.inet_pton(socket.AF_INET6, "::1")
STRANGER = socket.inet_aton("192.0.2.77")


def bound(family, kind, mark, address):
    sock = socket.socket(family, kind)
    set_mark(sock, mark)
    sock.bind((address, 0))
    return sock


@pytest.fixture
def lookup():
    made = SocketLookup(MASK, "lo")
    yield made
    made.close()


def test_a_mark_has_all_of_its_bits():
    with socket.socket() as sock:
        set_mark(sock, 0xFFFFFFFE)
        assert get_mark(sock) == 0xFFFFFFFE


@pytest.mark.parametrize(("family", "address", "packed"), [
    (socket.AF_INET, "127.0.0.1", LOCAL4), (socket.AF_INET6, "::1", LOCAL6),
])  # fmt: skip
def test_a_packet_s_socket_is_found_as_the_kernel_finds_it(lookup, family, address, packed):
    with bound(family, socket.SOCK_STREAM, MARK | 5, address) as listener, \
            bound(family, socket.SOCK_DGRAM, OTHER, address) as udp:  # fmt: skip
        listener.listen()
        port, taken = listener.getsockname()[1], udp.getsockname()[1]
        assert lookup(packed, packed, 6, 4000, port) == MARK
        assert lookup(packed, packed, 17, 4000, taken) == OTHER
        assert lookup(packed, packed, 17, 4000, taken ^ 1) == 0
        with socket.create_connection((address, port)) as client:
            set_mark(client, OTHER)
            near = client.getsockname()[1]
            assert lookup(packed, packed, 6, near, port) == MARK
            assert lookup(packed, packed, 6, port, near) == OTHER


def test_a_socket_of_both_families_gets_ipv4_packets_too(lookup):
    with bound(socket.AF_INET6, socket.SOCK_DGRAM, MARK, "::") as udp:
        assert lookup(LOCAL4, LOCAL4, 17, 4000, udp.getsockname()[1]) == MARK


def test_a_listener_on_any_address_does_not_get_what_only_passes_through(lookup):
    with bound(socket.AF_INET, socket.SOCK_DGRAM, MARK, "0.0.0.0") as udp:
        port = udp.getsockname()[1]
        assert lookup(STRANGER, LOCAL4, 17, 4000, port) == MARK
        assert lookup(LOCAL4, STRANGER, 17, 4000, port) == 0


def test_when_the_kernel_does_not_answer_nobody_can_tell():
    assert SocketLookup(MASK, "no such device")(LOCAL4, LOCAL4, 17, 1, 2) == -1


def test_the_marks_in_use_are_those_of_bound_connected_and_closing_sockets():
    diag = SockDiag()
    before = diag.marks(MASK)  # of a minute ago, perhaps
    marks = [mark for mark in range(0x10000, 0x800000, 0x10000) if mark not in before][:4]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bound(socket.AF_INET, socket.SOCK_STREAM, marks[0], "127.0.0.1"))
        listener.listen()
        client = socket.socket()
        set_mark(client, marks[1] | 3)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        stack.enter_context(bound(socket.AF_INET6, socket.SOCK_DGRAM, marks[2], "::1"))
        stack.enter_context(bound(socket.AF_INET6, socket.SOCK_STREAM, marks[3], "::1"))
        assert diag.marks(MASK) - before == set(marks)
        client.close()
        server.close()
        assert marks[1] in diag.marks(MASK)  # TIME_WAIT
    assert not {marks[2], marks[3]} & diag.marks(MASK)
    diag.close()
