"""``ipsecq import ip-xfrm`` of this machine's own kernel: what it decides, the imported SPD decides."""

import errno
import itertools
import socket

import pytest

from ipsecq.lab.netns import Lab, LabError
from ipsecq.numbers import Action, Direction
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse
from ipsecq.setkey.xfrm import convert

pytestmark = pytest.mark.root

HERE = "10.1.0.1"
POLICIES = [
    # Overlapping, with prefixes on both sides of the kernel's thresholds between its hash and its trees.
    ("src 0.0.0.0/0 dst 10.1.0.0/24", "block"), ("src 0.0.0.0/0 dst 10.1.0.0/28", "allow"),
    ("src 10.1.0.1/32 dst 10.1.0.2/32", "block"), ("src 10.1.0.0/24 dst 10.1.0.0/24 proto udp", "allow"),
]  # fmt: skip
TARGETS = ["10.1.0.2", "10.1.0.3", "10.1.0.99"]


@pytest.fixture(scope="module")
def host():
    with Lab() as lab:
        made, other = lab.namespace("one"), lab.namespace("two")
        lab.link(made, "wire", other, "wire")
        made.run("ip", "link", "set", "wire", "up")
        made.run("ip", "address", "add", f"{HERE}/24", "dev", "wire")
        try:
            made.run("ip", "xfrm", "policy", "flush")
        except LabError:
            pytest.skip("this kernel has no xfrm policies")
        yield made


def kernel_passes(host, target):
    """Does the kernel's SPD let a UDP packet out?  connect() asks it, and sends nothing."""

    def ask():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            return asking.connect_ex((target, 9))

    number = host.call(ask)
    assert number in (0, errno.EPERM)
    return number == 0


def ipsecq_passes(spd, target):
    found = spd.lookup(Direction.OUT, *map(socket.inet_aton, (HERE, target)), 17, 40000, 9)
    return found is None or found.action is not Action.DISCARD


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(POLICIES)))))
def test_of_one_priority_the_policy_wins_here_that_wins_in_the_kernel(host, order):
    host.run("ip", "xfrm", "policy", "flush")
    for number in order:
        selector, action = POLICIES[number]
        host.run("ip", "xfrm", "policy", "add", *selector.split(), "dir", "out", "action", action)
    sentences, refused = convert(host.run("ip", "xfrm", "policy").stdout)
    assert refused == 0
    spd = apply(parse("\n".join(sentences)), Sad(), Spd(), now=1.0).spd
    for target in TARGETS:
        assert ipsecq_passes(spd, target) == kernel_passes(host, target), target


def test_a_listing_of_the_kernel_s_that_has_no_counterpart_is_refused_whole(host):
    host.run("ip", "xfrm", "policy", "flush")
    for words in (
        "src ::/0 dst ::/0 proto gre key 5 dir out action allow", "src ::/0 dst ::/0 dev lo dir out action allow",
        "src 10.0.0.0/8 dst 10.0.0.0/8 dir out mark 5 mask 0xff action allow",
        "src 10.0.0.0/8 dst 10.0.0.0/8 dir in if_id 42 action allow", "src 10.0.0.0/8 dst 10.0.0.0/8 dir fwd action block",
    ):  # fmt: skip
        host.run("ip", "xfrm", "policy", "add", *words.split())
    for statistics in ([], ["-s"]):
        sentences, refused = convert(host.run("ip", *statistics, "xfrm", "policy").stdout)
        assert (refused, [line for line in sentences if not line.startswith("#")]) == (5, [])
    host.run("ip", "xfrm", "policy", "flush")
    words = "src ::/0 dst ::/0 proto ipv6-icmp type 135 dir in action allow"
    host.run("ip", "xfrm", "policy", "add", *words.split())
    (command,) = parse("\n".join(convert(host.run("ip", "xfrm", "policy").stdout)[0]))
    assert (command.policy.selector.sport_first, command.policy.selector.sport_last) == (135, 135)
