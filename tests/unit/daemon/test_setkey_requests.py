"""``ipsecq setkey`` and ``ipsecq sysctl`` as the daemon carries them out, without workers."""

import asyncio
from types import SimpleNamespace

import pytest

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.requests import Requests
from ipsecq.daemon.table import SharedTable
from ipsecq.errors import SysctlError
from ipsecq.numbers import Protocol, SaState
from ipsecq.sa.association import SecurityAssociation

ENDS = "192.0.2.1 198.51.100.1"
A, B = bytes([192, 0, 2, 1]), bytes([198, 51, 100, 1])


def add(spi, *, window=32, ends=ENDS):
    return f"add {ends} esp {spi} -r {window // 8} -E aes-gcm-16 0x{'11' * 20};"


class House:
    """A supervisor's databases; ``told`` is what key management hears."""

    def __init__(self, root):
        (root / "state").mkdir()
        self.table = SharedTable.open(root / "table", bytes(range(16)), capacity=1 << 14)
        self.book = LeaseBook.open(root / "state", self.table, b"m" * 32)
        self.authority = Authority(self.table, self.book)
        self.told = []
        keys = SimpleNamespace(
            added=lambda sa: self.told.append(("added", sa.spi)), deleted=lambda sa: self.told.append(("deleted", sa.spi))
        )
        self.requests = Requests(
            SimpleNamespace(
                authority=self.authority, book=self.book, keys=keys, publish=self.publish,
                config=SimpleNamespace(daemon=SimpleNamespace(allow_legacy=False)),
            )
        )  # fmt: skip

    async def publish(self):
        """Nobody acknowledges anything, as while a worker is slow."""

    def ask(self, command, **request):
        return asyncio.run(self.requests.handle(command, request))

    def setkey(self, text):
        assert self.ask("setkey", text=text)["errors"] == []

    def spis(self):
        return sorted(sa.spi for sa in self.authority.sad)


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.table.close()


def test_deleteall_takes_an_sa_that_waits_for_its_slot_and_leaves_larval_ones(house):
    house.setkey(add(0x1001) + add(0x1002) + add(0x1009, ends="192.0.2.1 198.51.100.9"))
    # The same SA with another window waits until no worker uses the slot of the old one.
    house.setkey(f"delete {ENDS} esp 0x1001;" + add(0x1001, window=1024))
    assert house.authority.sad.get(B, Protocol.ESP, 0x1001).slot < 0
    house.authority.add_sa(SecurityAssociation(Protocol.ESP, 0x1003, A, B, state=SaState.LARVAL))
    house.told.clear()
    house.setkey(f"deleteall {ENDS} esp;")
    assert house.spis() == [0x1003, 0x1009]
    assert house.told == [("deleted", 0x1002), ("deleted", 0x1001)]


def test_both_ends_of_the_range_of_spis_move_in_one_request_in_either_order(house):
    low, high = "net.key.spi_minval", "net.key.spi_maxval"
    for names in ((low, high), (high, low)):
        for values in ({low: "0x20000000", high: "0x20000007"}, {low: "0x100", high: "0x200"}):
            house.ask("sysctl-set", values={name: values[name] for name in names})
            assert house.authority.sysctl.get(low) == int(values[low], 0)
    before = house.authority.sysctl.all()
    with pytest.raises(SysctlError, match=rf"{low}=513, {high}=512: Invalid argument"):
        house.ask("sysctl-set", values={"net.inet.ipsec.ecn": "1", low: "513"})
    assert house.authority.sysctl.all() == before
