"""Every variable of ipsec(4) and enc(4) has a test that sees packets change: a row of tests/scenarios, or one by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scenario_run import Runner
from scenarios import Scenario, load

from ipsecq.sysctl import VARIABLES

TESTS = Path(__file__).parents[1]

KEYS = "unit/pfkey/test_pfkey_server_sa.py"

BY_NAME = {
    "net.enc.in.ipsec_bpf_mask": "unit/engine/test_engine_tap.py::test_a_mask_of_enc_takes_effect_on_a_flow_that_runs",
    "net.enc.out.ipsec_bpf_mask": "gateway/test_enc.py::test_tcpdump_on_enc0_sees_inner_packets_both_ways_under_the_mask",
    "net.enc.in.ipsec_filter_mask": "gateway/test_inner_rules.py::test_what_no_file_accepts_is_logged_and_dropped",
    "net.inet.ipsec.filtertunnel":
        "gateway/test_inner_rules.py::test_https_from_the_peers_network_is_let_in_and_nothing_else",
    "net.inet6.ipsec6.filtertunnel": "gateway/test_inner_rules.py::test_what_no_file_accepts_is_logged_and_dropped",
    "net.inet.ipsec.debug": "unit/datapath/test_droplog.py::test_a_drop_is_logged_with_its_reason_while_debug_is_set",
    "net.inet6.ipsec6.debug": "unit/datapath/test_droplog.py::test_a_drop_is_logged_with_its_reason_while_debug_is_set",
    "net.key.blockacq_lifetime":
        "unit/engine/test_engine_acquire.py::test_a_pair_is_asked_for_again_after_blockacq_lifetime",
    "net.key.larval_lifetime":
        f"{KEYS}::test_a_larval_sa_lives_as_long_as_larval_lifetime_says",
    "net.key.spi_minval":
        f"{KEYS}::test_getspi_without_a_range_keeps_to_spi_minval_and_spi_maxval",
    "net.key.spi_maxval":
        f"{KEYS}::test_getspi_without_a_range_keeps_to_spi_minval_and_spi_maxval",
}  # fmt: skip
"""Variables that rows have no words for: filters, logs, captures, key management."""

WITHOUT_EFFECT = {"net.enc.out.ipsec_filter_mask"}
"""Outbound inner packets pass the operator's own chains in clear, always (docs/enc.md)."""


def rows() -> dict[str, list[Scenario]]:
    found: dict[str, list[Scenario]] = {}
    for table in load():
        for scenario in table.scenarios:
            names = {*scenario.knobs, *scenario.peer_knobs, *(name for step in scenario.steps for name in step.knobs)}
            for name in names:
                found.setdefault(name, []).append(scenario)
    return found


ROWS = rows()


def outcomes(scenario: Scenario) -> list[Any]:
    runner = Runner(scenario)
    return [runner.run(step) for step in scenario.steps]


def without(scenario: Scenario, name: str) -> Scenario:
    def kept(knobs: dict[str, int]) -> dict[str, int]:
        return {each: value for each, value in knobs.items() if each != name}

    steps = [replace(step, knobs=kept(step.knobs)) for step in scenario.steps]
    return replace(scenario, knobs=kept(scenario.knobs), peer_knobs=kept(scenario.peer_knobs), steps=steps)


def changes(scenario: Scenario, name: str) -> bool:
    """Does something else become of the packets when the variable keeps its default?"""
    try:
        return outcomes(scenario) != outcomes(without(scenario, name))
    except AssertionError:  # what the runner takes for granted of a packet no longer holds
        return True


def test_every_variable_has_a_row_or_a_test() -> None:
    assert set(VARIABLES) == ROWS.keys() | BY_NAME.keys() | WITHOUT_EFFECT


@pytest.mark.parametrize("name", sorted(ROWS))
def test_some_row_sees_packets_change_by_the_variable(name: str) -> None:
    assert any(changes(scenario, name) for scenario in ROWS[name])


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_test_that_sees_its_effect_is_there_and_sets_it(name: str) -> None:
    file, _, function = BY_NAME[name].partition("::")
    text = (TESTS / file).read_text("utf-8")
    assert re.search(rf"^def {function}\(", text, re.MULTILINE)
    tree = re.sub(r"^(net\.(?:inet|inet6|key|enc)).*", r"\1", name)
    assert name in text or (f"{tree}" in text and name.rsplit(".", 1)[1] in text)
