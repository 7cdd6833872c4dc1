"""Every row of tests/scenarios, with bytes: what ipsec(4) says about a packet is what the engine does with it."""

from __future__ import annotations

import pytest
from scenario_run import Runner
from scenarios import Scenario, load

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


def test_the_table_is_as_large_as_the_manual_needs() -> None:
    assert len(SCENARIOS) >= 150
