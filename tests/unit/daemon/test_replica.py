"""A worker's replica: operations in any sensible order, also for what has gone meanwhile."""

import pytest

from ipsecq.daemon.replica import Replica
from ipsecq.errors import DaemonError
from ipsecq.numbers import Protocol, SaState
from ipsecq.sa.association import SecurityAssociation


def sa(spi, **changes):
    return SecurityAssociation(Protocol.ESP, spi, b"\1\1\1\1", b"\2\2\2\2", **changes)


def test_putting_twice_replaces():
    replica = Replica()
    assert replica.apply([("sa_put", sa(1)), ("sa_put", sa(1, reqid=7))])
    assert [each.reqid for each in replica.sad] == [7]


def test_what_has_gone_may_be_deleted_or_aged_again():
    replica = Replica()
    replica.apply([("sa_delete", b"\2\2\2\2", 50, 1), ("sa_state", b"\2\2\2\2", 50, 1, SaState.DYING)])
    replica.apply([("sa_put", sa(1)), ("sa_state", b"\2\2\2\2", 50, 1, 2)])
    assert replica.sad.dump()[0].state is SaState.DYING


def test_only_changes_that_can_help_a_waiting_packet_say_so():
    replica = Replica()
    assert not replica.apply([("sa_delete", b"\2\2\2\2", 50, 1), ("routes_changed",)])
    assert replica.apply([("sysctl", "net.inet.ipsec.dfbit", 1)])
    assert replica.sysctl.v4.dfbit == 1


def test_hooks_and_stop():
    replica = Replica()
    seen = []
    replica.on_path_mtu = lambda dst, mtu: seen.append((dst, mtu))
    replica.on_routes_changed = lambda: seen.append("routes")
    replica.apply([("path_mtu", b"\2\2\2\2", 1400), ("routes_changed",), ("stop",)])
    assert seen == [(b"\2\2\2\2", 1400), "routes"]
    assert replica.stopping


def test_what_a_new_worker_has_already_is_passed_over_up_to_the_mark():
    replica = Replica()
    replica.apply([("sa_put", sa(1, reqid=9)), ("until_mark", 4)])
    replica.apply([("sa_put", sa(1, reqid=7)), ("mark", 3), ("sa_delete", b"\2\2\2\2", 50, 1), ("mark", 4)])
    replica.apply([("sa_put", sa(2))])
    assert [(each.spi, each.reqid) for each in replica.sad] == [(1, 9), (2, 0)]


def test_another_versions_operation_is_an_error_not_a_guess():
    with pytest.raises(DaemonError, match="unknown operation 'teleport'"):
        Replica().apply([("teleport", 1)])
