"""Every row of tests/scenarios, with bytes: what ipsec(4) says about a packet is what the engine does with it."""

from __future__ import annotations

import re

import pytest
from scenario_docs import TARGET, render
from scenario_run import MARK, Runner, build
from scenarios import Scenario, load

from ipsecq.netfilter.verdicts import verdict_of
from ipsecq.numbers import Direction
from ipsecq.packet.view import PacketView

TABLES = load()
SCENARIOS = [
    pytest.param(scenario, id=f"{table.name}-{scenario.rule}".replace("::", ";"))
    for table in TABLES
    for scenario in table.scenarios
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_fate_is_the_one_that_the_manual_states(scenario: Scenario) -> None:
    runner = Runner(scenario)
    for number, step in enumerate(scenario.steps, 1):
        outcome = runner.run(step)
        assert outcome == {"fate": step.fate, **step.expected}, f"step {number}: {step.packet}"


KERNEL = {
    "enters in clear": r"accept",
    "dropped: in_polvio": r"goto in_clear",
    "dropped: in_discard": r"goto in_discard",
    "dropped: out_discard": r"goto out_discard",
    "clear": r"accept|goto out_use_\w+",
}
TO_A_WORKER = r"goto out_(worker|use)_\w+"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_kernels_verdict_about_clear_packets_is_the_engines(scenario: Scenario) -> None:
    runner = Runner(scenario)
    tables = runner.machine.tables
    view = PacketView()
    for step in scenario.steps:
        outcome = runner.run(step)
        packet = build(step.packet, runner.wire)
        assert view.load(packet)
        if step.sealed or view.is_fragment or outcome["fate"] == "absorbed":
            continue  # not the policy chains' business, or put together by the kernel before they see it
        direction = Direction.OUT if step.way == "out" else Direction.IN
        flow = view.src, view.dst, view.protocol, view.sport, view.dport
        policy = tables.spd.lookup_socket(MARK if step.socket else 0, direction, *flow, fragment=False)
        if policy is None:
            knobs = tables.sysctl.v4 if view.version == 4 else tables.sysctl.v6
            verdict = "accept" if knobs.def_policy else f"goto {step.way}_discard"
        else:
            verdict = verdict_of(policy, tables.sysctl, 1)
        assert re.fullmatch(KERNEL.get(outcome["fate"], TO_A_WORKER), verdict)


def test_the_document_is_made_from_the_table() -> None:
    assert TARGET.read_text("utf-8") == render(TABLES), "run make scenarios"


def test_the_table_is_as_large_as_the_manual_needs() -> None:
    assert len(SCENARIOS) >= 150
