import random
from types import SimpleNamespace

import pytest

from ipsecq.pfkey import messages
from ipsecq.pfkey.constants import Dialect, MessageType
from ipsecq.pfkey.extensions import Address, KeyExt, LifetimeExt, Sa
from ipsecq.pfkey.memory import MemoryDatabase
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.server import PfkeyServer
from ipsecq.pfkey.xextensions import Sa2
from ipsecq.secret import Key
from ipsecq.sysctl import Sysctl

A, B = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
A6, B6 = bytes(15) + b"\x01", bytes(15) + b"\x02"


class Bench:
    """A server over real databases, with clients whose datagrams are collected and parsed."""

    def __init__(self):
        self.now = 1_700_000_000.0
        self.database = MemoryDatabase()
        self.sysctl = Sysctl()
        self.server = PfkeyServer(
            self.database, lambda: self.now, random.Random(1).randrange, knobs=self.sysctl.key
        )
        self.dialects, self.inbox = {}, {}

    def open(self, client=1, dialect=Dialect.LINUX, privileged=True):
        self.server.open(client, privileged=privileged, dialect=dialect)
        self.dialects[client], self.inbox[client] = dialect, []
        return client

    def deliver(self, datagrams):
        for client, octets in datagrams:
            self.inbox[client].append(messages.parse(octets, self.dialects[client], reply=True))

    def ask(self, message, client=1):
        """Send; return what this client gets, and keep what others get in the inbox."""
        before = len(self.inbox[client])
        data = message if isinstance(message, bytes) else messages.build(message, self.dialects[client])
        self.deliver(self.server.handle(client, data))
        while rest := self.server.more(client, 7):
            self.deliver([(client, octets) for octets in rest])
        return self.inbox[client][before:]

    def one(self, message, client=1):
        replies = self.ask(message, client)
        assert len(replies) == 1, replies
        return replies[0]


def host(address, **more):
    return Address(address, len(address) * 8, **more)


def add(spi=0x1000, kind=MessageType.ADD, src=A, dst=B, **more):
    return Message(kind, 3, **{
        "seq": 5, "pid": 77, "sa": Sa(spi, 32, 1, 5, 12), "src": host(src), "dst": host(dst),
        "key_auth": KeyExt(Key(bytes(range(32)))), "key_encrypt": KeyExt(Key(bytes(16))),
        "lifetime_hard": LifetimeExt(0, 0, 3600, 0), "lifetime_soft": LifetimeExt(0, 0, 1800, 0),
        "sa2": Sa2(2, 9),
    } | more)  # fmt: skip


def named(kind, spi=0x1000, src=A, dst=B, satype=3, **more):
    return Message(kind, satype, seq=6, pid=77, sa=Sa(spi), src=host(src), dst=host(dst), **more)


def spd(kind=MessageType.X_SPDADD, direction=2, requests=None, action=2, number=0, priority=0, **more):
    if requests is None:
        requests = [Request(50, 2, 2, 0, A, B)] if action == 2 else []
    return Message(kind, **{
        "seq": 8, "pid": 77,
        "src": Address(bytes((10, 1, 0, 0)), 16, 255), "dst": Address(bytes((10, 2, 0, 0)), 16, 255),
        "policy": PolicyExt(action, direction, number, priority, requests),
    } | more)  # fmt: skip


@pytest.fixture
def bench():
    made = Bench()
    made.open()
    return made


@pytest.fixture
def make():
    """The messages that tests are made of."""
    return SimpleNamespace(add=add, named=named, spd=spd, host=host, A=A, B=B, A6=A6, B6=B6)
