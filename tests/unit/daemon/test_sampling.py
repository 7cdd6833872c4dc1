"""What the daemon shows of itself: directions, successors, limits, and peers whose counters outlive their SAs."""

import threading
from types import SimpleNamespace

import pytest

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.sampling import KERNEL_COUNTERS, History, Sampler
from ipsecq.daemon.table import SharedTable
from ipsecq.numbers import SaState
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SaKey, Slot
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

HERE, PEER = "127.0.0.1", "192.0.2.9"
PEER_KEY = SaKey(bytes((192, 0, 2, 9)), 50, 0x1001)


def add(spi, *, back=False, reqid=0, window=4):
    ends = f"{PEER} {HERE}" if back else f"{HERE} {PEER}"
    return f"add {ends} esp {spi} -m tunnel -u {reqid} -r {window} -E aes-gcm-16 0x{spi:040x};"


class House:
    def __init__(self, root, **limits):
        (root / "state").mkdir()
        self.table = SharedTable.open(root / "table", bytes(range(16)), capacity=1 << 16)
        self.authority = Authority(self.table, LeaseBook.open(root / "state", self.table, b"m" * 32))
        self.sampler = Sampler(
            self.authority, SimpleNamespace(workers=[]),
            SimpleNamespace(mechanism="x", guarded={}, counters=dict), History(),
            bypass=False, **{"sa_limit": 100, "peer_limit": 100, **limits},
        )  # fmt: skip

    def setkey(self, *lines, now=1e9):
        for sa in apply(parse("\n".join(lines), "t"), Sad(), Spd(), now=now).sad.dump():
            self.authority.add_sa(sa)
        self.publish()

    def publish(self):
        while batch := self.authority.take():
            self.authority.done(batch)

    def count(self, key, packets):
        slot = self.authority.sad.get(*key).slot
        self.table.words[slot + Slot.PACKETS] += packets

    def peers(self):
        return {(peer.peer, peer.direction): (peer.packets, peer.sas) for peer in self.sampler.peers()}


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.table.close()


def test_the_end_that_is_ours_gives_the_direction_whichever_was_asked_first(house):
    house.setkey(add(0x1001, back=True), add(0x1002), add(0x1003, back=True))
    assert [sample.direction for sample in house.sampler.snapshot().sas] == ["in", "out", "in"]


def test_what_a_peer_counted_stays_when_its_sas_are_replaced_deleted_or_change_their_window(house):
    house.setkey(add(0x1001))
    house.count(PEER_KEY, 5)
    house.setkey(add(0x1002))
    house.count(PEER_KEY._replace(spi=0x1002), 7)
    assert house.peers() == {(PEER, "out"): (12, 2)}
    house.authority.delete_sa(PEER_KEY)
    assert house.peers()[PEER, "out"][0] == 12  # workers may still count
    house.publish()
    assert house.peers() == {(PEER, "out"): (12, 1)}
    wider = apply(parse(add(0x1002, window=32), "t"), Sad(), Spd(), now=1e9).sad.dump()[0]
    house.authority.update_sa(wider)
    house.publish()
    house.count(PEER_KEY._replace(spi=0x1002), 1)
    assert house.peers() == {(PEER, "out"): (13, 1)}
    house.authority.flush_sas()
    house.publish()
    assert house.peers() == {(PEER, "out"): (13, 0)}


def test_a_successor_is_younger_of_the_same_kind_and_usable(house):
    def successors():
        return {sample.sa.spi: sample.successor for sample in house.sampler.snapshot().sas}

    house.setkey(add(0x1001), now=1e9)
    house.setkey(add(0x1002, reqid=7), add(0x1003, back=True), now=1e9 + 10)
    assert successors() == {0x1001: False, 0x1002: False, 0x1003: False}
    house.setkey(add(0x1004), now=1e9 + 20)
    assert successors() == {0x1001: True, 0x1002: False, 0x1003: False, 0x1004: False}
    house.authority.set_state(house.authority.sad.get(*PEER_KEY._replace(spi=0x1004)), SaState.DYING)
    assert successors()[0x1001] is False


def test_beyond_the_limit_sas_are_counted_but_have_no_series(tmp_path):
    house = House(tmp_path, sa_limit=2)
    house.setkey(*(add(0x1001 + number) for number in range(5)))
    snapshot = house.sampler.snapshot()
    assert (len(snapshot.sas), snapshot.sa_count, snapshot.sa_states) == (2, 5, {("esp", "out", "mature"): 5})
    assert len(house.sampler.snapshot(sa_limit=4).sas) == 4
    house.table.close()


def test_the_kernels_counters_stay_true_when_a_scrape_is_slower_than_one_that_began_later(house):
    name, counter = next(iter(KERNEL_COUNTERS.items()))
    said, first, go_on = iter((5, 9)), threading.Event(), threading.Event()

    def counters():
        packets = next(said)
        if packets == 5:
            first.set()
            go_on.wait(30)
        return {name: (packets, 0)}

    house.sampler._loader.counters = counters
    threads = [threading.Thread(target=house.sampler.kernel) for _ in range(2)]
    threads[0].start()
    first.wait(30)
    threads[1].start()
    threads[1].join(0.1)  # long enough to be through where nothing holds it
    go_on.set()
    for each in threads:
        each.join()
    house.sampler._loader.counters = dict
    assert house.sampler.kernel()[counter] == 9
