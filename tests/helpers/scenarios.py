"""The scenario table: what ipsec(4) says about packets, read from tests/scenarios/*.toml.

One row is a configuration, a packet and its fate.  The same rows run against the engine (tests/unit/engine) and make
docs/scenarios.md.  ``{A}``, ``{lan_b}`` and their like in a row are replaced by the addresses of a family; a row with
``family = [4, 6]`` is two scenarios, one with ``each = [{…}, …]`` as many as it has substitutions.

Keys of a row:

``rule``      what the row shows, in a sentence
``policy``    spdadd sentences of the machine under test; ``sas`` names of tests/scenarios/sas.toml; ``knobs`` sysctls
``way``       ``out``: the packet leaves; ``in``: it arrives
``packet``    ``SRC > DST PROTOCOL [SPORT DPORT | TYPE,CODE] [size=N fill=OCTET tos=N df fragment=first|later badsum=1
              mtu=N about=…]``
``socket``    policies of the socket that sends the packet, or gets it; ``user = "nobody"``: set without privilege
``mtu``       of the path; 1500 by default
``sealed``    ``in``: policies of the peer that sealed the packet; without them it arrives as it is.  The peer has
              ``peer_sas`` (default: ``sas``) and ``peer_knobs``
``tamper``    what happens to the sealed packet on the way: ``tos=N df src=ADDRESS spi=N flip=OFFSET cut=N replay``
``fate``      ``clear``, ``protected``, ``held``, ``enters``, ``enters in clear``, ``absorbed``, ``dropped: COUNTER``
``layout``    headers of the protected packet, opened again, outermost first
``acquire``   SAs that are asked for; ``error``: the ICMP error that is sent; ``learned``: path MTU that is believed
``pieces``    datagrams that leave; ``outer``, ``inner``: fields of the first header on the wire, of the packet that enters
``kernel``    families for which the row is run end to end, too: a gateway, the real kernel (tests/gateway/test_scenarios.py)
``then``      further steps, in which ``setkey`` and ``knobs`` change things and the other keys replace the row's
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[1] / "scenarios"

FAMILIES = {
    4: {
        "A": "10.0.0.1", "B": "10.0.0.2", "C": "10.0.0.3", "hosts": "10.0.0.0/24",
        "G": "192.0.2.1", "H": "192.0.2.2", "X": "192.0.2.9",
        "a": "10.1.0.7", "b": "10.2.0.7", "lan_a": "10.1.0.0/24", "lan_b": "10.2.0.0/24",
        "tree": "net.inet.ipsec", "V": "IPv4", "any": "0.0.0.0/0", "full": "32", "icmp": "icmp", "ICMP": "ICMP",
        "toobig": "icmp 3,4", "unreachable": "icmp 3,1", "floor": "576",
    },
    6: {
        "A": "fd00::1", "B": "fd00::2", "C": "fd00::3", "hosts": "fd00::/64",
        "G": "2001:db8::1", "H": "2001:db8::2", "X": "2001:db8::9",
        "a": "fd01::7", "b": "fd02::7", "lan_a": "fd01::/64", "lan_b": "fd02::/64",
        "tree": "net.inet6.ipsec6", "V": "IPv6", "any": "::/0", "full": "128", "icmp": "icmp6", "ICMP": "ICMPv6",
        "toobig": "icmp6 2,0", "unreachable": "icmp6 1,0", "floor": "1280",
    },
}  # fmt: skip

STEP_KEYS = {
    "packet", "way", "mtu", "sealed", "tamper", "fate", "layout", "acquire", "error", "learned", "pieces", "outer",
    "inner", "setkey", "knobs", "socket",
}  # fmt: skip
ROW_KEYS = STEP_KEYS - {"setkey"} | {
    "rule", "policy", "sas", "peer_sas", "peer_knobs", "family", "each", "kernel", "user", "then",
}  # fmt: skip
OUTCOME = ("layout", "acquire", "error", "learned", "pieces", "outer", "inner")
"""What belongs to one step only and is not inherited by the next."""


@dataclass
class Step:
    """One packet and its fate, after a change (``setkey``, ``knobs``)."""

    packet: str
    way: str
    fate: str
    mtu: int = 1500
    sealed: str = ""
    tamper: tuple[str, ...] = ()
    setkey: str = ""
    socket: tuple[str, ...] = ()
    knobs: dict[str, int] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scenario:
    """One row with everything filled in."""

    file: str
    rule: str
    policy: str
    sas: dict[str, str]
    """setkey sentences by name."""
    peer_sas: dict[str, str]
    knobs: dict[str, int]
    peer_knobs: dict[str, int]
    steps: list[Step]
    kernel: bool = False
    """It is run end to end, too."""
    user: str = "root"
    """Who set the socket's policies."""


@dataclass
class Table:
    """One file: a paragraph of the manual and its rows."""

    name: str
    title: str
    manual: str
    scenarios: list[Scenario]


def load(directory: Path = DIRECTORY) -> list[Table]:
    """All tables in the order of their file names.  A misspelt key is an error, not a check that is left out."""
    known = tomllib.loads((directory / "sas.toml").read_text("utf-8"))
    tables = []
    for path in sorted(directory.glob("[0-9]*.toml")):
        document = tomllib.loads(path.read_text("utf-8"))
        rows = document.pop("row")
        scenarios = [scenario for row in rows for scenario in _expand(row, path.stem, known)]
        tables.append(Table(path.stem, document["title"], document["manual"].strip(), scenarios))
    names = [scenario.rule for table in tables for scenario in table.scenarios]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"rules that two rows have: {sorted(twice)}")
    return tables


def _expand(row: dict[str, Any], file: str, known: dict[str, str]) -> list[Scenario]:
    unknown = row.keys() - ROW_KEYS
    for step in row.get("then", []):
        unknown |= step.keys() - STEP_KEYS
    if unknown:
        raise ValueError(f"{file}: {row.get('rule')}: unknown keys {sorted(unknown)}")
    found = []
    for family in row.get("family", [4]):
        for each in row.get("each", [{}]):
            words = FAMILIES[family] | each
            words |= {key: fill(value, words) for key, value in each.items()}
            found.append(_scenario(fill(row, words), file, words, known))
    return found


def _scenario(row: dict[str, Any], file: str, words: dict[str, str], known: dict[str, str]) -> Scenario:
    names = row.get("sas", [])
    peer_names = row.get("peer_sas", names)
    first = {key: value for key, value in row.items() if key in STEP_KEYS and key != "knobs"}
    steps = []
    current: dict[str, Any] = {}
    for change in [first, *row.get("then", [])]:
        current = {key: value for key, value in current.items() if key not in {*OUTCOME, "setkey", "knobs"}} | change
        steps.append(Step(
            current["packet"], current["way"], current["fate"], current.get("mtu", 1500), current.get("sealed", ""),
            tuple(current.get("tamper", ())), current.get("setkey", ""), tuple(current.get("socket", ())),
            current.get("knobs", {}),
            {key: current[key] for key in OUTCOME if key in current},
        ))  # fmt: skip
    return Scenario(
        file, row["rule"], row.get("policy", ""),
        {name: fill(known[name], words).strip() for name in names},
        {name: fill(known[name], words).strip() for name in peer_names},
        row.get("knobs", {}), row.get("peer_knobs", {}), steps,
        words["V"] in [FAMILIES[family]["V"] for family in row.get("kernel", [])], row.get("user", "root"),
    )  # fmt: skip


def fill(value: Any, words: dict[str, str]) -> Any:
    """``value`` with its ``{names}`` replaced, all the way down; what is then a number becomes one."""
    if isinstance(value, str):
        for name, text in words.items():
            value = value.replace("{" + name + "}", str(text))
        return int(value) if value.lstrip("-").isdigit() else value
    if isinstance(value, list):
        return [fill(each, words) for each in value]
    if isinstance(value, dict):
        return {fill(key, words): fill(each, words) for key, each in value.items() if key not in {"each", "family"}}
    return value
