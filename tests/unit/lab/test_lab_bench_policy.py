"""The policy benchmark measures what it says: every packet meets its fate, every target is judged."""

from __future__ import annotations

import pytest

from ipsecq.lab import bench_policy
from ipsecq.policy.rules import matches
from ipsecq.policy.spd import Spd


@pytest.mark.parametrize("mixed", [False, True])
def test_selectors_of_the_benchmark_are_disjoint_and_its_packets_are_named(mixed: bool) -> None:
    spd = Spd(bench_policy.tunnel_policies(600, mixed))
    assert len(spd) == 600
    policies = spd.dump()
    for datagram in bench_policy.packets(600, mixed, 600)[:500]:
        ports = int.from_bytes(datagram[20:22], "big"), int.from_bytes(datagram[22:24], "big")
        matching = [
            policy
            for policy in policies
            if matches(policy.selector, datagram[12:16], datagram[16:20], 17, *ports)
        ]
        assert len(matching) == 1


def test_a_run_fills_the_table_and_judges_every_target() -> None:
    cases = bench_policy.run((10, 300), rounds=1)
    assert len(bench_policy.report(cases).splitlines()) == 1 + 4
    judged = bench_policy.verdicts(cases)
    assert len(judged) == 2 * (len(bench_policy.COLUMNS) + 2)
    assert all(good for good, text in judged if "memory" in text)


def test_a_missed_target_is_said() -> None:
    cases = [bench_policy.Case(10, "one", dict.fromkeys(bench_policy.COLUMNS, 1e-6), 100, 100)]
    cases.append(bench_policy.Case(1000, "one", dict.fromkeys(bench_policy.COLUMNS, 2e-6), 100, 5000))
    missed = [text for good, text in bench_policy.verdicts(cases) if not good]
    assert len(missed) == 3 + 1  # three columns of hits, and the SAs' memory
