"""An explanation is what the engine does: random policies, SAs, knobs and packets, held against process()."""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import replace

import pytest
from engine_peers import address, make_peer
from hypothesis import given, settings
from hypothesis import strategies as st
from scenario_run import Runner, build, databases
from scenarios import DIRECTORY, FAMILIES, Scenario, load

from ipsecq.counters import COUNTERS_WORDS, FIRST_DROP, Counter, Fate
from ipsecq.engine import explain, standalone
from ipsecq.engine.explain import Flow
from ipsecq.numbers import Level, Protocol
from ipsecq.packet.view import PacketView

SAS = tomllib.loads((DIRECTORY / "sas.toml").read_text())
PAIRS = ("esp", "ah", "ipcomp", "esp-hosts-tunnel", "esp-7", "ah-7", "esp-any")
VERDICTS = {Fate.PASS: "clear", Fate.DONE: "protected", Fate.HOLD: "held"}

selectors = st.sampled_from((
    "{A} {B} any", "{hosts} {B} any", "{A} {hosts} udp", "{A} {B}[80] tcp", "{A}[1000] {B} udp", "{A} {C} any",
    "{A} {B}[70-90] any", "{A} {B} {icmp}", "{A} {B} {icmp} 13", "{any} {any} any",
))  # fmt: skip
transforms = st.tuples(
    st.sampled_from(("esp", "ah", "ipcomp")), st.sampled_from(("transport/", "tunnel/{A}-{B}", "any/")),
    st.sampled_from(("use", "require", "default", "unique:7")),
).map("/".join)  # fmt: skip
actions = st.one_of(
    st.sampled_from(("none", "discard")),
    st.lists(transforms, min_size=1, max_size=3).map(lambda rules: "ipsec " + " ".join(rules)),
)
priorities = st.sampled_from(("", "prio high ", "prio low ", "prio def + 1 "))
policy_sets = st.lists(st.tuples(selectors, priorities, actions), max_size=6, unique_by=lambda each: each[0])
knob_sets = st.dictionaries(
    st.sampled_from((
        "esp_trans_deflev", "esp_net_deflev", "ah_trans_deflev", "ah_net_deflev",
    )), st.sampled_from((1, 2)),
)  # fmt: skip
off_sets = st.sets(st.sampled_from(("net.inet.esp.esp_enable", "net.inet.ah.ah_enable", "net.inet.ipcomp.ipcomp_enable")))
packets = st.sampled_from(("udp 1000 2000", "udp 1000 80", "tcp 1000 80", "tcp 1 443", "{icmp} 13,0", "{icmp} 8,0", "gre"))


def fill(text: str, family: int) -> str:
    for name, value in FAMILIES[family].items():
        text = text.replace("{" + name + "}", value)
    return text


def knobs_of(family: int, levels: dict[str, int], off: set[str], default: int) -> dict[str, int]:
    tree = FAMILIES[family]["tree"]
    return {f"{tree}.{name}": value for name, value in levels.items()} | dict.fromkeys(off, 0) | {
        f"{tree}.def_policy": default
    }


def flow_of(packet: bytes) -> Flow:
    view = PacketView()
    assert view.load(packet)
    return Flow(view.src, view.dst, view.protocol, view.sport, view.dport)


@given(policies=policy_sets, names=st.sets(st.sampled_from(PAIRS)), levels=knob_sets, off=off_sets,
       default=st.sampled_from((0, 1)), text=packets, family=st.sampled_from((4, 6)),
       parallel=st.booleans())  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_what_is_said_about_a_packet_that_leaves_is_what_happens_to_it(
    policies: list[tuple[str, str, str]], names: set[str], levels: dict[str, int], off: set[str], default: int,
    text: str, family: int, parallel: bool,
) -> None:  # fmt: skip
    rules = "".join(f"spdadd {selector} -P out {priority}{action};" for selector, priority, action in policies)
    sas, spd = databases(fill("".join(SAS[name] for name in sorted(names)), family), fill(rules, family))
    machine = make_peer(sas, spd, knobs_of(family, levels, off, default))
    machine.tables.parallel_sas = parallel
    packet = build(fill("{A} > {B} " + text, family), [])
    before = bytes(machine.tables.words), bytes(machine.tables.counters)
    answer = explain.outbound(machine.tables, flow_of(packet), lambda _: 1500)
    assert (bytes(machine.tables.words), bytes(machine.tables.counters)) == before, "an explanation changes nothing"
    fate, wire = machine.send(packet)
    assert answer.verdict == ("dropped" if fate >= FIRST_DROP else VERDICTS[Fate(fate)])
    if answer.verdict in {"clear", "protected"}:
        assert {event[:5] for event in machine.emit.events} == {
            (each.transform.protocol, each.transform.mode, each.src, each.dst, each.transform.reqid)
            for each in answer.transforms
            if "asked for" in each.note
        }
    if fate == Fate.DONE:
        assert len(wire[0]) > len(packet) or "IPComp" in str(answer.layout)
        assert answer.mtu > 1280
        assert answer.layout[0] == f"IPv{family} {FAMILIES[family]['A']} > {FAMILIES[family]['B']}"


@given(policies=policy_sets, levels=knob_sets, off=off_sets, strict=st.sampled_from((0, 1)),
       default=st.sampled_from((0, 1)), text=packets, family=st.sampled_from((4, 6)))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_what_is_said_about_a_clear_packet_that_arrives_is_what_happens_to_it(
    policies: list[tuple[str, str, str]], levels: dict[str, int], off: set[str], strict: int, default: int, text: str,
    family: int,
) -> None:  # fmt: skip
    rules = "".join(f"spdadd {selector} -P in {priority}{action};" for selector, priority, action in policies)
    knobs = knobs_of(family, levels, off, default) | {"net.inet.ipsec.check_policy_history": strict}
    _, spd = databases("", fill(rules, family))
    machine = make_peer([], spd, knobs)
    packet = build(fill("{A} > {B} " + text, family), [])
    answer = explain.inbound(machine.tables, flow_of(packet))
    fate, _ = machine.receive(packet)
    # Where a protocol that must have been applied is off, a protected packet fares no better.
    closed = any(
        each.note.endswith("dropped on arrival") and each.level >= Level.REQUIRE
        and each.transform.protocol is not Protocol.IPCOMP for each in answer.transforms
    )  # fmt: skip
    assert closed == answer.fate.startswith("dropped: net.inet.")
    expected = {
        Fate.PASS: "anything", Counter.IN_POLVIO: "nothing" if closed else "protected", Counter.IN_DISCARD: "nothing"
    }  # fmt: skip
    assert answer.verdict == expected[fate if fate < FIRST_DROP else Counter(fate)]


OUTBOUND = [
    pytest.param(scenario, id=scenario.rule.replace("::", ";"))
    for table in load()
    for scenario in table.scenarios
    if any(step.way == "out" and "fragment=" not in step.packet and not step.socket for step in scenario.steps)
]


@pytest.mark.parametrize("scenario", OUTBOUND)
def test_layout_and_mtu_are_those_of_the_scenario_table(scenario: Scenario) -> None:
    runner = Runner(scenario)
    for step in scenario.steps:
        runner.change(step)
        unchanged = replace(step, setkey="", knobs={})
        if step.way == "in" or "fragment=" in step.packet:
            runner.run(unchanged)
            continue
        packet = build(step.packet, runner.wire)
        answer = explain.outbound(runner.machine.tables, flow_of(packet), lambda _, mtu=step.mtu: mtu)
        outcome = runner.run(unchanged)
        if "layout" in outcome:
            said = re.sub(r"IPv[46] | > 4500", "", " | ".join(answer.layout[:-1]))
            shown = outcome["layout"].rpartition(" | ")[0]
            # What IPComp cannot make shorter goes without it.
            assert shown in {said, re.sub(r" \| IPComp 0x\w+", "", said)}
        if outcome["fate"] == "dropped: ip_toobig":
            assert "error" not in outcome or f"mtu={answer.mtu}" in outcome["error"]
        else:
            assert outcome["fate"].split(":")[0] == answer.verdict


def test_the_mtu_is_exact_with_every_kind_of_bundle() -> None:
    for rules in ("esp/transport//require", "ah/transport//require", "esp/tunnel/{A}-{B}/require",
                  "esp/transport//require ah/transport//require"):  # fmt: skip
        text = fill("".join(SAS[name] for name in PAIRS), 4)
        sas, spd = databases(text, fill("spdadd {A} {B} any -P out ipsec " + rules + ";", 4))
        machine = make_peer(sas, spd, mtu=1400)
        packet = build(fill("{A} > {B} udp 1 2 size=10 df", 4), [])
        answer = explain.outbound(machine.tables, flow_of(packet), lambda _: 1400)
        fits = build(fill(f"{{A}} > {{B}} udp 1 2 size={answer.mtu - 28} df", 4), [])
        fate, wire = machine.send(fits)
        assert (fate, len(fits)) == (Fate.DONE, answer.mtu)
        assert len(wire[0]) <= 1400
        assert len(wire[0]) == answer.mtu + answer.overhead
        longer = build(fill(f"{{A}} > {{B}} udp 1 2 size={answer.mtu - 27} df", 4), [])
        assert machine.send(longer)[0] == Counter.IP_TOOBIG


def test_each_policy_before_the_match_has_the_reason_why_not() -> None:
    _, spd = databases("", """
        spdadd 10.0.0.9 10.0.0.2 any -P out none;
        spdadd 10.0.0.1 10.0.0.9 any -P out none;
        spdadd 10.0.0.1 10.0.0.2 tcp -P out none;
        spdadd 10.0.0.1[1-2] 10.0.0.2 udp -P out none;
        spdadd 10.0.0.1 10.0.0.2[53] udp -P out none;
        spdadd 10.0.0.0/24 10.0.0.2 any -P out discard;
        spdadd 10.0.0.1 10.0.0.2 udp -P out none;
        spdadd 10.0.0.1 10.0.0.2 any -P in none;
    """)  # fmt: skip
    tables = standalone.build([], spd, random.Random(1).randbytes)
    answer = explain.outbound(tables, Flow(address("10.0.0.1"), address("10.0.0.2"), 17, 1000, 2000), lambda _: 1500)
    assert [skipped.reason for skipped in answer.skipped] == [
        "source address", "destination address", "protocol is 6", "source port (or type) is 1-2",
        "destination port (or code) is 53-53",
    ]  # fmt: skip
    assert answer.verdict == "dropped"
    assert len(tables.counters) == COUNTERS_WORDS


@pytest.mark.parametrize("on", [0, 1])
def test_nothing_enters_where_the_policy_wants_a_protocol_that_is_off(on: int) -> None:
    sas, spd = databases(
        fill(SAS["esp"], 4), fill("spdadd {B} {A} any -P in ipsec esp/transport//require ah/transport//use;", 4)
    )
    machine = make_peer(sas, spd, {"net.inet.esp.esp_enable": on, "net.inet.ah.ah_enable": 0})
    answer = explain.inbound(machine.tables, flow_of(build(fill("{B} > {A} udp 1 2", 4), [])))
    assert answer.verdict == ("protected" if on else "nothing")
    assert answer.fate == (
        "enters only after esp/transport, in any order and mode; in clear it is dropped" if on
        else "dropped: net.inet.esp.esp_enable is 0"
    )  # fmt: skip


def test_knobs_that_decide_are_named() -> None:
    sas, spd = databases(fill(SAS["esp"], 4), fill("spdadd {A} {B} any -P out ipsec esp/transport//default;", 4))
    machine = make_peer(sas, spd, {"net.inet.esp.esp_enable": 0, "net.inet.ipsec.esp_trans_deflev": 2})
    answer = explain.outbound(machine.tables, flow_of(build(fill("{A} > {B} udp 1 2", 4), [])), lambda _: 1500)
    assert answer.verdict == "dropped"
    assert {knob.name: knob.value for knob in answer.knobs} == {
        "net.inet.esp.esp_enable": 0, "net.inet.ipsec.esp_trans_deflev": 2,
    }  # fmt: skip
    assert answer.transforms[0].level is Level.REQUIRE
