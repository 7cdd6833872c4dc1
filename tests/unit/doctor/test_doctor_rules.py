"""The doctor's judgements on what cannot be made in a network namespace: kernels, clocks, other people's tables."""

import re

import pytest

from ipsecq.doctor import firewall, interfaces, routes, rules, running
from ipsecq.netfilter.compile import compile_ruleset
from ipsecq.netfilter.inner import InnerTable
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse
from ipsecq.sysctl import Sysctl

KEY = "0x" + "19" * 20
MIRRORED = """
spdadd 10.1.0.0/24[80] 10.2.0.0/24 tcp -P out ipsec esp/tunnel/192.0.2.1-192.0.2.2/require;
spdadd 10.2.0.0/24 10.1.0.0/24[80] tcp -P in ipsec esp/tunnel/192.0.2.2-192.0.2.1/require;
spdadd 10.1.0.0/24 10.2.0.0/24 icmp 8,0 -P out ipsec esp/tunnel/192.0.2.1-192.0.2.2/require;
spdadd 10.2.0.0/24 10.1.0.0/24 icmp 8,0 -P in ipsec esp/tunnel/192.0.2.2-192.0.2.1/require;
"""


def loaded(text):
    return apply(parse(text, "setkey.conf"), Sad(), Spd(), now=0.0)


def bad(found):
    return {(str(each.grade), each.subject) for each in found if each.grade != "ok"}


def judged(text, here=b"\xc0\0\2\1"):
    done = loaded(text)
    return bad(rules.examine(done.sad.dump(), done.spd.dump(), lambda address: address == here))


def test_ports_change_places_in_a_mirror_and_icmp_types_do_not():
    assert judged(MIRRORED) == set()
    assert judged(MIRRORED.replace("10.1.0.0/24[80] tcp -P in", "10.1.0.0/24[81] tcp -P in")) == {("warn", "mirror")}


def test_ends_in_each_others_place_are_told_from_ends_that_are_elsewhere():
    assert judged(MIRRORED, here=b"\xc0\0\2\2") == {("fail", "tunnel ends")}
    assert judged(MIRRORED, here=b"\xc0\0\2\7") == {("fail", "tunnel ends")}


@pytest.mark.parametrize(
    ("algorithms", "shared"), [(f"aes-gcm-16 {KEY}", True), (f"aes-cbc {KEY[:34]} -A hmac-sha2-256 0x{'2a' * 32}", False)]
)
def test_a_key_is_shared_in_peace_only_where_ivs_are_random(algorithms, shared):
    text = f"add 192.0.2.1 192.0.2.2 esp 1001 -E {algorithms}; add 192.0.2.2 192.0.2.1 esp 1002 -E {algorithms};"
    assert (("fail", "shared key") in judged(text)) is shared


def test_a_shared_key_is_not_shown():
    both = (f"add 192.0.2.{spi} 192.0.2.9 esp {spi + 256} -E aes-gcm-16 {KEY};" for spi in (1, 2))
    done = loaded("".join(both))
    assert not any("1919" in each.message + each.mend for each in rules.examine(done.sad.dump(), [], lambda _: True))


def interface_judged(policies="", here=b"\xc0\0\2\1", **state):
    shown = {"name": "ipsec0", "local": "192.0.2.1", "remote": "192.0.2.2", "reqid": 100, "up": True, "problem": ""}
    return bad(interfaces.examine([shown | state], loaded(policies).spd.dump(), lambda address: address == here))


def test_what_keeps_a_route_based_tunnel_from_working_is_named():
    assert interface_judged() == set()
    assert interface_judged(here=b"\xc0\0\2\7") == {("fail", "ipsec0")}
    assert interface_judged(up=False) == interface_judged(problem="no inbound SA") == {("fail", "ipsec0")}


@pytest.mark.parametrize(
    ("ends", "level", "grade"),
    [
        ("192.0.2.1-192.0.2.2", "require", "warn"),
        ("192.0.2.1-192.0.2.2", "unique:100", "fail"),
        ("192.0.2.1-192.0.2.2", "unique:7", None),
        ("192.0.2.1-192.0.2.3", "require", None),
        ("192.0.2.1-192.0.2.3", "unique:100", "fail"),
    ],
)
def test_policies_that_share_a_route_based_tunnels_sas_are_named(ends, level, grade):
    text = f"spdadd 10.1.0.0/24 10.2.0.0/24 any -P out ipsec esp/tunnel/{ends}/{level};"
    assert interface_judged(text) == ({(grade, "ipsec0")} if grade else set())


def test_a_flowtable_goes_around_every_policy():
    entries = [{"flowtable": {"family": "inet", "name": "f", "table": "fast", "dev": ["lan", "wan"]}}]
    assert ("fail", "flowtable") in bad(firewall.examine(entries, NetfilterSettings(), []))


def test_our_own_tables_are_not_chains_of_others():
    settings = NetfilterSettings(table="gate")
    text = compile_ruleset([], settings, Sysctl()) + InnerTable(settings).whole([], Sysctl(), [])
    tables = [*re.findall(r"^table inet (\w+) {", text, re.MULTILINE), "gate_sentinel"]
    assert len(set(tables)) == 3
    ours = [
        {"chain": {"family": "inet", "table": table, "name": "c", "hook": "prerouting", "prio": -175}} for table in tables
    ]
    other = {"chain": {"family": "inet", "table": "theirs", "name": "c", "hook": "input", "prio": 0}}
    (found,) = firewall.examine([*ours, other], settings, [])
    assert found.message == "1 chains of others hook here, none goes around the policies"


def test_masquerading_behind_an_exemption_is_no_fault():
    policies = loaded(MIRRORED).spd.dump()
    chain = {"family": "ip", "table": "n", "name": "p", "type": "nat", "hook": "postrouting", "prio": 100}
    exempt = {"expr": [{"match": {"left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "10.2.0.0/24"}},
                       {"accept": None}]}  # fmt: skip
    masquerade = {"expr": [{"masquerade": None}]}
    for order, expected in (([exempt, masquerade], set()), ([masquerade, exempt], {("warn", "source NAT")})):
        entries = [{"chain": chain}]
        entries += [{"rule": {"family": "ip", "table": "n", "chain": "p", "handle": 1, **rule}} for rule in order]
        assert bad(firewall.examine(entries, NetfilterSettings(), policies)) == expected


def test_a_clock_that_nobody_sets_is_reported():
    assert bad(routes.clock(routes.STA_UNSYNC)) == {("warn", "clock")}
    assert bad(routes.clock(0)) == set()
    assert bad(routes.clock(None)) == set()


def test_a_full_connection_table_is_reported(tmp_path):
    (tmp_path / "nf_conntrack_max").write_text("1000\n")
    for count, expected in ((100, set()), (950, {("fail", "conntrack")})):
        (tmp_path / "nf_conntrack_count").write_text(f"{count}\n")
        assert bad(routes.conntrack(tmp_path)) == expected
    assert bad(routes.conntrack(tmp_path / "none")) == set()


def test_an_sa_that_refuses_to_send_names_the_way_out():
    sa = {
        "protocol": "esp", "spi": "0x00001001", "src": "192.0.2.1", "dst": "192.0.2.2", "direction": "out", "mode": "tunnel",
        "reqid": 0, "state": "mature", "packets": 0, "icv_failures": 0, "replays": 0, "drops": 0, "replay_window": 0,
        "natt": None, "problem": "the state directory was restored from a copy",
    }  # fmt: skip
    status = {"sas": [sa], "sa_count": 1, "policy_count": 0, "workers": [], "counters": {}, "fail_open": [],
              "state": [], "reload": {"success": True}}  # fmt: skip
    found = [each for each in running.examine(status, [], {}) if each.grade == "fail"]
    assert "ipsecq state reset 0x00001001" in found[0].mend


@pytest.mark.parametrize(
    ("counter", "says"),
    [("esp_natt", "protocol esp-udp at both ends, or esp at both"), ("in_pmtu_refused", "live SAs of ours have not sent")],
)
def test_advice_is_in_the_words_of_this_programs_syntax_and_names_what_was_refused(counter, says):
    status = {"sas": [], "sa_count": 0, "policy_count": 0, "workers": [], "counters": {counter: 3}, "fail_open": [],
              "state": [], "reload": {"success": True}}  # fmt: skip
    (found,) = running.examine(status, [], {})
    assert says in found.message + found.mend
    assert "3 " in found.message


def test_silence_on_the_nat_t_port_is_looked_for_on_the_port_of_the_sa():
    sa = {
        "protocol": "esp", "spi": "0x00001001", "src": "192.0.2.1", "dst": "192.0.2.2", "direction": "out", "mode": "tunnel",
        "reqid": 0, "state": "mature", "packets": 9, "icv_failures": 0, "replays": 0, "drops": 0, "replay_window": 0,
        "natt": [4501, 4501], "problem": "",
    }  # fmt: skip
    back = {**sa, "src": "192.0.2.2", "dst": "192.0.2.1", "direction": "in", "packets": 0}
    status = {"sas": [sa, back], "sa_count": 2, "policy_count": 0, "workers": [], "counters": {}, "fail_open": [],
              "state": [], "reload": {"success": True}}  # fmt: skip
    assert "udp port 4501" in next(each.mend for each in running.examine(status, [], {}) if each.subject == "one way")
