"""Sequence leases over starts, stops and reboots."""

import os
import time

from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.table import SharedTable

BOOT = bytes(range(16))
MACHINE = b"m" * 32
DIGEST = b"f" * 32
LIMIT32 = (1 << 32) - 1


class House:
    """A run and a state directory, and the daemon that is started over them again and again."""

    def __init__(self, root):
        self.run, self.state = root / "run", root / "state"
        self.run.mkdir()
        self.state.mkdir()
        self.boot = BOOT
        self.now = time.time()

    def start(self, machine=MACHINE):
        table = SharedTable.open(self.run / "table", self.boot, capacity=1 << 14)
        return table, LeaseBook.open(self.state, table, machine, clock=lambda: self.now)

    def reboot(self):
        self.boot = os.urandom(16)

    def sa(self, table, book, digest=DIGEST, *, counter_iv=True, passing=False):
        slot = table.allocate(digest, 0)
        return slot, book.enroll(slot, counter_iv=counter_iv, passing=passing)
