import errno
import os
import socket

import pytest

from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.socketpolicy import OptionRequest, SocketPolicies
from ipsecq.pfkey.somark import SO_MARK

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to set marks")
DONE, MASK = 0x01000000, 0x03000000
IN, OUT = 1, 2
BYPASS, ENTRUST, IPSEC, DISCARD = 4, 3, 2, 0


@pytest.fixture
def ask(tmp_path):
    """``ask(type, direction) -> (errno, mark)`` on one UDP socket whose own mark is 5, while no daemon runs."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 5)
        policies = SocketPolicies(DONE, MASK, tmp_path / "sockets")

        def ask(kind=None, direction=IN, *, level=0, option=16, privileged=True, value=None):
            if value is None:
                requests = [Request(50, 1, 2)] if kind == IPSEC else []
                value = b"" if kind is None else PolicyExt(kind, direction, requests=requests).to_option()
            number = policies(OptionRequest(sock, level, option, value, privileged))
            return number, sock.getsockopt(socket.SOL_SOCKET, SO_MARK)

        yield ask


def test_bypass_marks_the_socket_once_both_directions_are_asked_for_and_keeps_its_own_mark(ask):
    assert ask(BYPASS, IN) == (0, 5)
    assert ask(BYPASS, OUT) == (0, DONE | 5)


@pytest.mark.parametrize("direction", [IN, OUT])
def test_one_direction_alone_lets_nothing_pass(ask, direction):
    assert ask(BYPASS, direction) == (0, 5)
    assert ask(BYPASS, direction) == (0, 5)


def test_entrust_and_removal_take_the_mark_away(ask):
    for kind in (ENTRUST, None):
        ask(BYPASS, IN)
        assert ask(BYPASS, OUT) == (0, DONE | 5)
        assert ask(kind, OUT) == (0, 5)


def test_without_a_daemon_nothing_protects_and_bypass_stays_what_it_was(ask):
    ask(BYPASS, IN)
    ask(BYPASS, OUT)
    for kind in (IPSEC, DISCARD):
        assert ask(kind, OUT) == (errno.EOPNOTSUPP, DONE | 5)


def test_a_program_without_cap_net_admin_gets_no_bypass(ask):
    assert ask(BYPASS, IN, privileged=False) == (errno.EACCES, 5)
    assert ask(BYPASS, OUT, privileged=False) == (errno.EACCES, 5)


def test_a_bypass_that_was_set_with_privilege_is_taken_off_with_privilege_only(ask):
    ask(BYPASS, IN)
    ask(BYPASS, OUT)
    for kind in (ENTRUST, None):
        assert ask(kind, OUT, privileged=False) == (errno.EACCES, DONE | 5)
    assert ask(ENTRUST, OUT) == (0, 5)


@pytest.mark.parametrize(("value", "option", "number"), [
    (b"short", 16, errno.EINVAL),
    (PolicyExt(BYPASS, 3).to_option(), 16, errno.EINVAL),
    (PolicyExt(5, IN).to_option(), 16, errno.EINVAL),
    (PolicyExt(IPSEC, OUT).to_option(), 16, errno.EINVAL),
    (PolicyExt(IPSEC, OUT, requests=[Request(47, 1, 2)]).to_option(), 16, errno.EINVAL),
    (PolicyExt(IPSEC, OUT, requests=[Request(50, 1, 2)] * 7).to_option(), 16, errno.ELOOP),
    (PolicyExt(BYPASS, IN).to_option(), 34, errno.EOPNOTSUPP),
])  # fmt: skip
def test_wrong_options_get_the_kernel_s_errno(ask, value, option, number):
    assert ask(value=value, option=option) == (number, 5)
