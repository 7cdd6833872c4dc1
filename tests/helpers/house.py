"""An authority with what it needs, for the tests of the daemon's rooms."""

import pickle

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.messages import encode
from ipsecq.daemon.replica import Replica
from ipsecq.daemon.table import SharedTable
from ipsecq.daemon.takeover import take_over
from ipsecq.numbers import Protocol
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

ENDS = "192.0.2.1 198.51.100.1", "198.51.100.1 192.0.2.1"

def add(spi, *, key="11", window=32, back=False, more=""):
    return f"add {ENDS[back]} esp {spi} -m tunnel -r {window // 8} {more} -E aes-gcm-16 0x{key * 20};"


def policy(net, direction="out", level="require"):
    ends = ENDS[direction == "in"].replace(" ", "-")
    return f"spdadd 10.1.0.0/16 10.{net}.0.0/16 any -P {direction} ipsec esp/tunnel/{ends}/{level};"


def files(*lines):
    """SAD and SPD of a setkey.conf."""
    applied = apply(parse("\n".join(lines), "setkey.conf"), Sad(), Spd(), now=1e9)
    return applied.sad, applied.spd


class House:
    """An authority over real tables, with one worker's replica that gets its operations as a worker does."""

    def __init__(self, root, capacity=1 << 14):
        (root / "state").mkdir(exist_ok=True)
        self.table = SharedTable.open(root / "table", bytes(range(16)), capacity=capacity)
        self.book = LeaseBook.open(root / "state", self.table, b"m" * 32)
        self.authority = Authority(self.table, self.book)
        self.replica = Replica()
        self.operations = []

    def become(self, *lines, sysctl=None, was=()):
        sad, spd = files(*lines)
        take_over(self.authority, sad, spd, sysctl or {}, was=was)
        return self.publish()

    def publish(self):
        """What a supervisor does with a change; returns the operations of it."""
        sent = []
        while batch := self.authority.take():
            operations = pickle.loads(encode(1, batch.operations)[4:])[1]
            self.replica.apply(operations)
            self.authority.done(batch)
            sent += operations
        return sent

    def sa(self, spi, back=False):
        return self.authority.sad.get(bytes([192, 0, 2, 1] if back else [198, 51, 100, 1]), Protocol.ESP, spi)

    def keys(self):
        return {sa.key for sa in self.authority.sad}
