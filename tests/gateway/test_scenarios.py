"""Rows of tests/scenarios that say ``kernel = true``, end to end: the same tables, with a gateway and a real kernel."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator

import pytest
from engine_peers import make_peer, udp
from scenario_kernel import KernelRunner, Stage, expected
from scenario_run import databases
from scenarios import DIRECTORY, FAMILIES, Scenario, fill, load

from ipsecq.lab.netns import Lab, wait_for
from ipsecq.packet.fragments import fragment

pytestmark = pytest.mark.root

SCENARIOS = [
    pytest.param(scenario, id=f"{table.name}-{scenario.rule}".replace("::", ";"))
    for table in load()
    for scenario in table.scenarios
    if scenario.kernel
]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Lab() as lab:
        yield Stage(lab)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_gateway_does_what_the_table_says(stage: Stage, scenario: Scenario) -> None:
    runner = KernelRunner(stage, scenario)
    for number, step in enumerate(runner.steps, 1):
        assert runner.run(step) == expected(step), f"step {number}: {step.packet}"


SEALING = "spdadd {b} {a} any -P out ipsec esp/tunnel/{H}-{G}/require;"


def scene(name: str, policy: str, sas: tuple[str, ...] = ()) -> Scenario:
    """A scenario without rows, for packets that the tables have no words for."""
    known = tomllib.loads((DIRECTORY / "sas.toml").read_text("utf-8"))
    texts = {each: fill(known[each], FAMILIES[4]).strip() for each in sas}
    return Scenario("fragments", name, fill(policy, FAMILIES[4]), texts, texts, {}, {}, [])


def grown(stage: Stage, packets: list[bytes], counter: str, count: int = 1) -> int:
    """How much a counter has grown by when the packets have come to rest, which isn't before it has by ``count``."""
    before = stage.counters().get(counter, 0)
    for packet in packets:
        stage.send("wire", packet)
    wait_for(lambda: stage.counters().get(counter, 0) - before >= count, counter)
    time.sleep(0.2)
    return stage.counters().get(counter, 0) - before


def test_a_clear_datagram_in_fragments_is_judged_whole_by_its_ports(stage: Stage) -> None:
    policy = "spdadd {b} {a}[1000] udp -P in ipsec esp/tunnel/{H}-{G}/require;"
    KernelRunner(stage, scene("ports", policy))
    for port, counter in ((1000, "in_clear_dropped"), (1001, "clear")):
        whole = udp("10.2.0.7", "10.1.0.7", bytes(2000), sport=2000, dport=port)
        assert grown(stage, fragment(whole, 1000, 0), counter) == 1


def test_esp_in_fragments_is_put_together_and_opened(stage: Stage) -> None:
    policy = "spdadd {b} {a} any -P in ipsec esp/tunnel/{H}-{G}/require;"
    runner = KernelRunner(stage, scene("outer fragments", policy, ("esp-tunnel",)))
    peer = make_peer(runner.runner.peer_sas, databases("", fill(SEALING, FAMILIES[4]))[1], mtu=3000)
    whole = peer.send(udp("10.2.0.7", "10.1.0.7", bytes(1400)))[1][0]
    pieces = fragment(whole, 600, 0)
    assert len(pieces) == 3
    assert grown(stage, pieces, "enters") == 1


def test_an_inner_datagram_in_fragments_arrives_whole_through_the_tunnel(stage: Stage) -> None:
    policy = "spdadd {b} {a} any -P in ipsec esp/tunnel/{H}-{G}/require;"
    runner = KernelRunner(stage, scene("inner fragments", policy, ("esp-tunnel",)))
    peer = make_peer(runner.runner.peer_sas, databases("", fill(SEALING, FAMILIES[4]))[1])
    whole = udp("10.2.0.7", "10.1.0.7", bytes(range(256)) * 5)
    sealed = [peer.send(piece)[1][0] for piece in fragment(whole, 800, 0)]
    assert len(sealed) == 2
    stage.taken("lan")
    assert grown(stage, sealed, "esp_input", 2) == 2
    arrived: list[bytes] = []

    def payload() -> bytes:
        arrived.extend(stage.taken("lan"))
        return b"".join(packet[20:] for packet in arrived)

    wait_for(lambda: len(payload()) >= len(whole) - 20, "all of it on the LAN")
    assert payload() == whole[20:]
