"""What the supervisor hands to workers, and what it believes of their reports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ipsecq.daemon import config
from ipsecq.daemon.messages import WorkerSetup
from ipsecq.daemon.supervisor import Supervisor
from ipsecq.sysctl import Sysctl

PORTS = (4501, 4502)


def supervisor(**more: Any) -> Supervisor:
    """As much of one as its answers need."""
    settings = config.parse(f"[nftables]\nnatt_ports = {list(PORTS)}\n")
    authority = SimpleNamespace(sad=None, spd=None, sysctl=Sysctl(), whole_state=list)
    nothing = SimpleNamespace(sockets=[], operation=lambda: ("interfaces", ()), operations=list)
    fake = SimpleNamespace(
        config=settings, authority=authority, interfaces=nothing, taps=nothing, _journal=False,
        _queues=lambda index: (1,),
        ruleset=SimpleNamespace(loader=SimpleNamespace(settings=settings.netfilter()), udp=nothing, rings=nothing),
        table=SimpleNamespace(words=None), pool=SimpleNamespace(workers=[SimpleNamespace(counters=None)]), **more,
    )  # fmt: skip
    return cast("Supervisor", fake)


def test_the_configured_ports_of_esp_in_udp_are_what_workers_and_explanations_go_by() -> None:
    (_, setup), *_ = Supervisor._first_state(supervisor(), 0)
    assert isinstance(setup, WorkerSetup)
    assert (setup.natt_ports, setup.udp_port) == (frozenset(PORTS), PORTS[0])
    assert Supervisor.tables(supervisor()).natt_ports == frozenset(PORTS)


class Heard:
    """Whoever hears of a path MTU: ``told`` are (destination, MTU)."""

    def __init__(self) -> None:
        self.told: list[tuple[bytes, int]] = []

    def learn(self, dst: bytes, mtu: int, now: float) -> bool:
        self.told.append((dst, mtu))
        return True

    def broadcast(self, operations: list[tuple[Any, ...]], but: int) -> None:
        assert but == 1
        self.told += [(dst, mtu) for _, dst, mtu in operations]


@pytest.mark.parametrize(
    ("dst", "mtu", "believed"),
    [
        ("c0000202", 1300, 1300), ("c0000202", 100, 576), ("c0000202", -5, 576), ("20" * 16, 100, 1280),
        ("c000", 1300, None), ("", 1300, None), ("c0000202", "x", None), ("c0000202", [], None),
        ("c0000202", float("inf"), None),
    ],
)  # fmt: skip
def test_a_path_mtu_that_a_worker_reports_is_held_to_the_floor_and_nonsense_reaches_nobody(
    dst: str, mtu: object, believed: int | None
) -> None:
    workers, own = Heard(), Heard()
    fake = supervisor(_path_mtu=own)
    fake.pool.broadcast = workers.broadcast  # type: ignore[method-assign, assignment]
    Supervisor._report(fake, cast("Any", SimpleNamespace(index=1)), {"kind": "path_mtu", "dst": dst, "mtu": mtu})
    expected = [] if believed is None else [(bytes.fromhex(dst), believed)]
    assert (workers.told, own.told) == (expected, expected)
