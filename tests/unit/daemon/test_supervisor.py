"""What the supervisor hands to workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from ipsecq.daemon import config
from ipsecq.daemon.messages import WorkerSetup
from ipsecq.daemon.supervisor import Supervisor
from ipsecq.sysctl import Sysctl

PORTS = (4501, 4502)


def supervisor() -> Supervisor:
    """As much of one as its answers need."""
    settings = config.parse(f"[nftables]\nnatt_ports = {list(PORTS)}\n")
    authority = SimpleNamespace(sad=None, spd=None, sysctl=Sysctl(), whole_state=list)
    nothing = SimpleNamespace(sockets=[], operation=lambda: ("interfaces", ()), operations=list)
    fake = SimpleNamespace(
        config=settings, authority=authority, interfaces=nothing, taps=nothing, _journal=False,
        _queues=lambda index: (1,),
        ruleset=SimpleNamespace(loader=SimpleNamespace(settings=settings.netfilter()), udp=nothing, rings=nothing),
        table=SimpleNamespace(words=None), pool=SimpleNamespace(workers=[SimpleNamespace(counters=None)]),
    )  # fmt: skip
    return cast("Supervisor", fake)


def test_the_configured_ports_of_esp_in_udp_are_what_workers_and_explanations_go_by() -> None:
    (_, setup), *_ = Supervisor._first_state(supervisor(), 0)
    assert isinstance(setup, WorkerSetup)
    assert (setup.natt_ports, setup.udp_port) == (frozenset(PORTS), PORTS[0])
    assert Supervisor.tables(supervisor()).natt_ports == frozenset(PORTS)
