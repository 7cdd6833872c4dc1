"""The answer of ``ipsecq explain`` as text of 80 columns, and as data for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any, Final

from ipsecq.engine.explain import Explanation, Skipped, TransformReport
from ipsecq.numbers import IPPROTO_ANY, Direction
from ipsecq.policy.model import Policy
from ipsecq.setkey import values
from ipsecq.setkey.printer import config_policy

WIDTH: Final = 80
_LABEL: Final = 9
SHOWN: Final = 8
"""Policies before the match that the text names; the nearest ones.  JSON has all that are known."""


def as_text(answer: Explanation, chains: Sequence[str]) -> str:
    """What a person wants to know first comes first."""
    lines: list[str] = []

    def say(label: str, text: str) -> None:
        lines.extend(wrap(
            text, WIDTH, initial_indent=label.ljust(_LABEL), subsequent_indent=" " * _LABEL,
            break_on_hyphens=False, break_long_words=False,
        ))  # fmt: skip

    say("packet", _packet(answer))
    say("fate", answer.fate)
    say("policy", _sentence(answer))
    if answer.policy is not None and answer.policy.label:
        say("", f"from {answer.policy.label}")
    for label, text in _before(answer.skipped):
        say(label, text)
    for number, report in enumerate(answer.transforms):
        say("SAs" if not number else "", _transform(report))
    if answer.layout:
        say("layout", " | ".join(answer.layout))
        say("MTU", f"{answer.mtu}: {answer.path_mtu} of the path, {answer.overhead} for our headers")
    say("kernel", " -> ".join(chains))
    if answer.direction is Direction.IN:
        say("", "(a clear packet; ESP, AH and IPComp to this host go to the worker of their SPI first)")
    for number, knob in enumerate(answer.knobs):
        say("sysctl" if not number else "", f"{knob.name}={knob.value}  {knob.meaning}")
    return "\n".join(lines)


def as_data(answer: Explanation, chains: Sequence[str]) -> dict[str, Any]:
    """The same for programs.  SAs are named by SPI; no key is in it."""
    flow = answer.flow
    policy = answer.policy
    return {
        "direction": answer.direction.name.lower(),
        "src": values.format_address(flow.src),
        "dst": values.format_address(flow.dst),
        "protocol": flow.protocol,
        "sport": flow.sport,
        "dport": flow.dport,
        "verdict": answer.verdict,
        "fate": answer.fate,
        "policy": {"id": policy.id, "label": policy.label, "text": config_policy(policy)} if policy else None,
        "skipped": [
            {"id": each.policy.id, "text": config_policy(each.policy), "reason": each.reason}
            for each in answer.skipped
        ],
        "transforms": [
            {
                "protocol": each.transform.protocol.name.lower(),
                "mode": each.transform.mode.name.lower(),
                "level": each.level.name.lower(),
                "reqid": each.transform.reqid,
                "src": values.format_address(each.src),
                "dst": values.format_address(each.dst),
                "spi": each.sa.spi if each.sa is not None else None,
                "note": each.note,
            }
            for each in answer.transforms
        ],
        "layout": answer.layout,
        "path_mtu": answer.path_mtu or None,
        "mtu": answer.mtu or None,
        "overhead": answer.overhead,
        "kernel": list(chains),
        "sysctl": [{"name": each.name, "value": each.value, "meaning": each.meaning} for each in answer.knobs],
    }


def _packet(answer: Explanation) -> str:
    flow = answer.flow
    src, dst = values.format_address(flow.src), values.format_address(flow.dst)
    way = "arrives" if answer.direction is Direction.IN else "leaves"
    if flow.protocol == IPPROTO_ANY:
        return f"{src} > {dst}, of a protocol that no policy names, {way}"
    name = values.format_upper(flow.protocol)
    if flow.protocol in values.ICMP:
        return f"{src} > {dst} {name} type {flow.sport} code {flow.dport}, {way}"
    return f"{src}[{flow.sport}] > {dst}[{flow.dport}] {name}, {way}"


def _sentence(answer: Explanation) -> str:
    if answer.policy is None:
        return "none matches"
    return _short(answer.policy)


def _short(policy: Policy) -> str:
    """The policy as a setkey(8) sentence that loads again, without the ports that are any."""
    return config_policy(policy).replace("[any]", "")


def _before(skipped: Sequence[Skipped]) -> Iterator[tuple[str, str]]:
    hidden = len(skipped) - SHOWN
    if hidden > 0:
        yield "before", f"{hidden} more, and"
    for number, each in enumerate(skipped[-SHOWN:]):
        yield "before" if not number and hidden <= 0 else "", f"not ({each.reason}): {_short(each.policy)}"


def _transform(report: TransformReport) -> str:
    rule = report.transform
    name = f"{rule.protocol.name.lower()}/{rule.mode.name.lower()}"
    ends = f"{values.format_address(report.src)} > {values.format_address(report.dst)}"
    level = report.level.name.lower() + (f":{rule.reqid}" if rule.reqid else "")
    sa = report.sa
    which = f", SPI {sa.spi:#x} {sa.state.name.lower()}" if sa is not None else ""
    return f"{name} {ends} level {level}{which}: {report.note}"
