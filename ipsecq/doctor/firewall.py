"""Other people's rules: what meets packets before the policies, goes around them, or throws away what they opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

from ipsecq.doctor.finding import Finding, Grade
from ipsecq.errors import NetfilterError
from ipsecq.netfilter.load import run_nft
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.numbers import Action, Direction
from ipsecq.policy.model import Policy

Entry = dict[str, Any]

INBOUND_PRIORITY: Final = -250
OUTBOUND_PRIORITY: Final = 150
_FILTERS: Final = ("input", "forward")
_SOURCE_NAT: Final = frozenset({"masquerade", "snat"})


def listing() -> list[Entry]:
    """The ruleset of this network namespace as ``nft -j`` lists it; NetfilterError when it cannot."""
    try:
        entries: list[Entry] = json.loads(run_nft("", "-j", "list", "ruleset"))["nftables"]
    except (ValueError, KeyError) as error:
        raise NetfilterError(f"nft -j list ruleset: {error}") from error
    return entries


def examine(entries: Sequence[Entry], settings: NetfilterSettings, policies: Sequence[Policy]) -> Iterator[Finding]:
    """Look at a listing; rules of our own tables are left out."""
    ours = {settings.table, f"{settings.table}_sentinel", f"{settings.table}_inner"}
    chains = [
        entry["chain"] for entry in entries if "hook" in entry.get("chain", {}) and entry["chain"]["table"] not in ours
    ]
    rules = [entry["rule"] for entry in entries if "rule" in entry and entry["rule"]["table"] not in ours]
    found = [
        *_early(chains, rules),
        *_late(chains),
        *_flowtables(entries),
        *_source_nat(chains, rules, policies),
        *_entrance(chains, rules, settings),
        *_messages(chains, rules),
    ]
    yield from found
    if not any(finding.grade is Grade.FAIL for finding in found):
        yield Finding(Grade.OK, "ruleset", f"{len(chains)} chains of others hook here, none goes around the policies")
    if any('"ct"' in json.dumps(rule.get("expr", ())) for rule in rules):
        yield Finding(Grade.OK, "conntrack", "connection tracking is in use; inner flows will be confirmed")


def _name(chain: Entry) -> str:
    return f"{chain['family']} {chain['table']} {chain['name']}"


def _rules_of(chain: Entry, rules: Sequence[Entry]) -> list[Entry]:
    """The rules of a chain, those of the chains that it jumps to included."""
    wanted, seen = [chain["name"]], set[str]()
    result = []
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        for rule in rules:
            if (rule["family"], rule["table"], rule["chain"]) == (chain["family"], chain["table"], name):
                result.append(rule)
                for part in rule.get("expr", ()):
                    target = part.get("jump") or part.get("goto")
                    if target:
                        wanted.append(target["target"])
    return result


def _early(chains: Sequence[Entry], rules: Sequence[Entry]) -> Iterator[Finding]:
    for chain in chains:
        hook, priority = chain["hook"], chain["prio"]
        if hook != "ingress" and not (hook == "prerouting" and priority < INBOUND_PRIORITY):
            continue
        found = _rules_of(chain, rules)
        takes = [kind for kind in ("drop", "queue", "fwd", "tproxy") if any(kind in part for rule in found
                 for part in rule.get("expr", ()))]  # fmt: skip
        if chain.get("policy") == "drop":
            takes.append("policy drop")
        yield Finding(
            Grade.WARN, "hooks", f"chain {_name(chain)} ({hook} {priority}) meets packets before the inbound policies do"
            + (f", and takes some of them ({', '.join(takes)})" if takes else ""),
            "give it a priority above -250 unless it is meant so; ESP that comes by packet rings it never sees "
            "([offload] ring)",
        )  # fmt: skip


def _late(chains: Sequence[Entry]) -> Iterator[Finding]:
    for chain in chains:
        if chain["hook"] == "postrouting" and chain["prio"] > OUTBOUND_PRIORITY:
            yield Finding(
                Grade.WARN, "hooks", f"chain {_name(chain)} (postrouting {chain['prio']}) runs after the outbound "
                "policies: source NAT there escapes them", "give it a priority below 150",
            )  # fmt: skip


def _flowtables(entries: Sequence[Entry]) -> Iterator[Finding]:
    for entry in entries:
        table = entry.get("flowtable")
        if table:
            yield Finding(
                Grade.FAIL, "flowtable", f"flowtable {table['name']} of table {table['table']}: its flows go around "
                "every policy, protected ones in clear", "delete it, or keep protected networks out of it",
            )  # fmt: skip


def _source_nat(chains: Sequence[Entry], rules: Sequence[Entry], policies: Sequence[Policy]) -> Iterator[Finding]:
    """Masquerading that does not look at the destination gives protected packets a source that no policy names."""
    protects = [p for p in policies if p.direction is Direction.OUT and p.action is Action.IPSEC and p.transforms]
    if not protects:
        return
    for chain in chains:
        if chain["hook"] != "postrouting" or chain.get("type") != "nat":
            continue
        for rule in _rules_of(chain, rules):
            expressions = rule.get("expr", ())
            verdicts = [kind for part in expressions for kind in part]
            if {"accept", "return"} & set(verdicts) and "daddr" in json.dumps(expressions):
                break  # an exemption by destination stands before what follows
            if _SOURCE_NAT & set(verdicts) and not _narrow(expressions):
                yield Finding(
                    Grade.WARN, "source NAT", f"a rule of chain {_name(chain)} (handle {rule['handle']}) gives packets for "
                    "protected networks another source before the policies see them: they may match none",
                    "let it spare the remote networks: ip daddr != REMOTE-NETWORK … masquerade",
                )  # fmt: skip
                break


def _narrow(expressions: Sequence[Entry]) -> bool:
    text = json.dumps(expressions)
    return '"daddr"' in text or '"dport"' in text or '"mark"' in text or '"ipsec"' in text


def _entrance(chains: Sequence[Entry], rules: Sequence[Entry], settings: NetfilterSettings) -> Iterator[Finding]:
    """Filters that drop by default and never speak of the device from which opened packets come."""
    device = settings.enc_device
    for chain in chains:
        if chain["hook"] != "forward" or chain.get("policy") != "drop":
            continue
        texts = [json.dumps(rule.get("expr", ())) for rule in _rules_of(chain, rules)]
        if not any(f'"{device}"' in text for text in texts) and not any(_open(text) for text in texts):
            yield Finding(
                Grade.WARN, "filter", f"chain {_name(chain)} drops by default and no rule of it names {device}: opened "
                "packets of new flows are dropped", f'nft insert rule {_name(chain)} iifname "{device}" accept',
            )  # fmt: skip


def _open(text: str) -> bool:
    """A rule that accepts without looking at the incoming device or the state of the connection."""
    return '"accept"' in text and not any(word in text for word in ('"iif', '"ct"', '"meta"'))


def _messages(chains: Sequence[Entry], rules: Sequence[Entry]) -> Iterator[Finding]:
    """Filters that drop ICMP errors make a black hole of every smaller MTU on the way."""
    for chain in chains:
        if chain["hook"] not in _FILTERS:
            continue
        found = _rules_of(chain, rules)
        texts = [json.dumps(rule.get("expr", ())) for rule in found]
        icmp = ('"icmp"', '"icmpv6"', '"ipv6-icmp"')
        drops = [text for text in texts if '"drop"' in text and any(word in text for word in icmp) and "echo" not in text]
        lets = any('"accept"' in text and ('"related"' in text or any(word in text for word in icmp)) for text in texts)
        if drops or (chain.get("policy") == "drop" and not lets):
            yield Finding(
                Grade.WARN, "icmp", f"chain {_name(chain)} drops ICMP errors: where the MTU is smaller on the way, large "
                "packets vanish without a word", f"nft insert rule {_name(chain)} ct state related accept",
            )  # fmt: skip
