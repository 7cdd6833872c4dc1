"""Rows of tests/scenarios that say ``kernel = true``, end to end: the same tables, with a gateway and a real kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scenario_kernel import KernelRunner, Stage
from scenarios import Scenario, load

from ipsecq.lab.netns import Lab

pytestmark = pytest.mark.root

SCENARIOS = [
    pytest.param(scenario, id=f"{table.name}-{scenario.rule}".replace("::", ";"))
    for table in load()
    for scenario in table.scenarios
    if scenario.kernel
]
SEEN_OUTSIDE = ("layout", "error", "learned", "pieces")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Lab() as lab:
        yield Stage(lab)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_gateway_does_what_the_table_says(stage: Stage, scenario: Scenario) -> None:
    runner = KernelRunner(stage, scenario)
    for number, step in enumerate(runner.steps, 1):
        outcome = runner.run(step)
        expected = {name: step.expected[name] for name in SEEN_OUTSIDE if name in step.expected}
        assert outcome == {"fate": step.fate, **expected}, f"step {number}: {step.packet}"
