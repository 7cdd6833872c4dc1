"""A rekey loses nothing: the deleted SA receives for a while, the one to come keeps what arrives too early."""

import pytest

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.replica import Replica
from ipsecq.daemon.table import SharedTable
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key

A, B = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))


def sa(spi, **more):
    return SecurityAssociation(
        Protocol.ESP, spi, A, B, Mode.TUNNEL, encryption="aes-gcm-16", encryption_key=Key(spi.to_bytes(20, "big")), **more
    )


@pytest.fixture
def pair(tmp_path):
    """The authority with a grace time of 2 s, and ``sync() -> replica``."""
    (tmp_path / "state").mkdir()
    table = SharedTable.open(tmp_path / "table", bytes(16), capacity=1 << 14)
    authority = Authority(table, LeaseBook.open(tmp_path / "state", table, b"m" * 32), rekey_grace=2)
    replica = Replica()

    def sync():
        while batch := authority.take():
            replica.apply(batch.operations)
            authority.done(batch)
        return replica

    return authority, sync


def test_a_replaced_sa_receives_for_the_grace_time_and_sends_no_more(pair):
    authority, sync = pair
    old, new = authority.add_sa(sa(0x1000)), authority.add_sa(sa(0x1001))
    assert sync().sad.outbound(50, 2, A, B).spi == old.spi
    authority.retire_sa(old.key, 100.0)
    replica = sync()
    assert old.key not in authority.sad
    assert replica.sad.outbound(50, 2, A, B).spi == new.spi
    assert replica.sad.inbound(old.key) is not None
    fresh = Replica()
    fresh.apply(authority.whole_state())
    assert fresh.sad.inbound(old.key) is not None
    assert fresh.sad.outbound(50, 2, A, B).spi == new.spi
    authority.part(101.9)
    assert sync().sad.inbound(old.key) is not None
    authority.part(102.0)
    assert sync().sad.inbound(old.key) is None


@pytest.mark.parametrize("more", [{"reqid": 7}, None])
def test_an_sa_without_a_successor_goes_at_once(pair, more):
    authority, sync = pair
    old = authority.add_sa(sa(0x1000, reqid=9))
    if more:
        authority.add_sa(sa(0x1001, **more))
    authority.retire_sa(old.key, 100.0)
    assert sync().sad.inbound(old.key) is None


def test_a_flush_takes_the_leaving_ones_too(pair):
    authority, sync = pair
    old = authority.add_sa(sa(0x1000))
    authority.add_sa(sa(0x1001))
    authority.retire_sa(old.key, 100.0)
    authority.flush_sas()
    assert len(sync().sad) == 0


def test_workers_know_the_spis_of_larval_sas_until_they_mature_or_die(pair):
    authority, sync = pair
    larval = SecurityAssociation(Protocol.ESP, 0x1000, A, B, state=SaState.LARVAL, created=100.0)
    authority.add_sa(larval)
    assert sync().larval == {larval.key}
    assert len(sync().sad) == 0
    authority.update_sa(sa(0x1000), passing=True)
    assert sync().larval == set()
    assert sync().sad.inbound(larval.key) is not None
    authority.add_sa(SecurityAssociation(Protocol.ESP, 0x1001, A, B, state=SaState.LARVAL, created=100.0))
    assert len(sync().larval) == 1
    authority.expire_larval(1000.0)
    assert sync().larval == set()
