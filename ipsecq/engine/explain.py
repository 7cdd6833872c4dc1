"""Why a packet is treated as it is: the same look-ups as the packet path, with their reasons kept.

Nothing is changed by an explanation: no sequence number is taken, no ACQUIRE is sent, nothing is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ipsecq.counters import Counter
from ipsecq.engine.bundle import Bundle
from ipsecq.engine.outbound_sa import OutboundStep, make_step
from ipsecq.engine.tables import Pool, Tables
from ipsecq.numbers import IPPROTO_ANY, Action, Direction, Level, Mode, Protocol
from ipsecq.policy.levels import enforced_inbound, resolve_level
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sysctl import FamilyKnobs

MAX_SKIPPED = 1000
"""Policies before the match whose reason is reported; the nearest ones."""


@dataclass(slots=True)
class Flow:
    """The packet in question; addresses packed, ports (ICMP: type and code) in host order."""

    src: bytes
    dst: bytes
    protocol: int = IPPROTO_ANY
    sport: int = 0
    dport: int = 0


@dataclass(slots=True)
class Skipped:
    """A policy that is looked at before the one that decides, and the first thing in which it differs."""

    policy: Policy
    reason: str


@dataclass(slots=True)
class TransformReport:
    """One transform of the deciding policy."""

    transform: Transform
    level: Level
    sa: SecurityAssociation | None
    note: str


@dataclass(slots=True)
class Explanation:
    """The whole answer.  ``fate`` is a sentence; ``layout`` names the headers of the finished datagram, outermost first."""

    flow: Flow
    direction: Direction
    policy: Policy | None
    skipped: list[Skipped]
    transforms: list[TransformReport] = field(default_factory=list)
    fate: str = ""
    layout: list[str] = field(default_factory=list)
    overhead: int = 0
    """Octets that the headers add to a packet of ``mtu`` octets."""
    mtu: int = 0
    """The largest packet of this flow that needs no fragmentation; 0 where nothing is sent."""


def outbound(tables: Tables, flow: Flow, path_mtu: int) -> Explanation:
    """What happens to a packet that leaves.  ``path_mtu`` is the link's towards the outermost destination."""
    policy, skipped = _decide(tables, Direction.OUT, flow)
    answer = Explanation(flow, Direction.OUT, policy, skipped)
    knobs = _knobs(tables, flow.src)
    if policy is None:
        answer.fate = (
            "passes in clear: no policy names it and def_policy is none"
            if knobs.def_policy
            else "dropped: no policy names it and def_policy is discard"
        )
    elif policy.action is Action.DISCARD:
        answer.fate = "dropped: the policy says discard"
    elif policy.action is not Action.IPSEC:
        answer.fate = f"passes in clear: the policy says {policy.action.name.lower()}"
    else:
        _explain_bundle(tables, answer, policy, path_mtu)
    return answer


def inbound(tables: Tables, flow: Flow) -> Explanation:
    """What a packet that arrives must have been through."""
    policy, skipped = _decide(tables, Direction.IN, flow)
    answer = Explanation(flow, Direction.IN, policy, skipped)
    knobs = _knobs(tables, flow.src)
    if policy is None:
        answer.fate = (
            "enters, protected or not: no policy names it and def_policy is none"
            if knobs.def_policy
            else "dropped: no policy names it and def_policy is discard"
        )
        return answer
    if policy.action is Action.DISCARD:
        answer.fate = "dropped: the policy says discard"
        return answer
    if policy.action is not Action.IPSEC:
        answer.fate = f"enters, protected or not: the policy says {policy.action.name.lower()}"
        return answer
    must = []
    near, far = flow.src, flow.dst
    for transform in policy.transforms:
        enforced = enforced_inbound(transform, knobs)
        level = resolve_level(transform, knobs)
        src, dst = transform.src or near, transform.dst or far
        # The SA is the sender's to choose: any of these ends will do.
        sa = tables.sad.outbound(int(transform.protocol), int(transform.mode), src, dst, transform.reqid)
        note = "must have been applied" if enforced else "is not enforced inbound"
        answer.transforms.append(TransformReport(transform, level, sa, note))
        if enforced:
            must.append(f"{transform.protocol.name.lower()}/{transform.mode.name.lower()}")
        if transform.mode is Mode.TUNNEL:
            near, far = src, dst
    how = "in this order, mode and between these ends" if knobs.check_policy_history else "in any order and mode"
    if must:
        answer.fate = f"enters only after {' and '.join(must)} ({how}); in clear it is dropped"
    else:
        answer.fate = "enters, protected or not: no transform is required"
    return answer


def _explain_bundle(tables: Tables, answer: Explanation, policy: Policy, path_mtu: int) -> None:
    steps: list[OutboundStep] = []
    pool = Pool(bytes)  # nothing is sealed here
    src, dst = answer.flow.src, answer.flow.dst
    blocked = ""
    for transform in policy.transforms:
        knobs = _knobs(tables, src)
        near, far = transform.src or src, transform.dst or dst
        level = resolve_level(transform, knobs)
        name = transform.protocol.name.lower()
        sa = tables.sad.outbound(
            int(transform.protocol), int(transform.mode), near, far, transform.reqid,
            oldest=tables.sysctl.key.preferred_oldsa != 0,
        )  # fmt: skip
        note = "applied"
        if not getattr(knobs, f"{name}_enable"):
            note = f"net.inet.{name}.{name}_enable is 0"
            blocked = blocked or f"dropped: {note}"
        elif sa is None:
            note = "no SA: skipped" if level is Level.USE else "no SA: asked for, the packet waits"
            if level is not Level.USE:
                blocked = blocked or "held until key management brings an SA, then dropped"
        answer.transforms.append(TransformReport(transform, level, sa, note))
        if sa is None:
            continue
        tunnel = transform.mode is Mode.TUNNEL
        steps.append(make_step(sa, tables, pool, tunnel))
        if tunnel:
            src, dst = near, far
    if blocked:
        answer.fate = blocked
        return
    if not steps:
        answer.fate = "passes in clear: no SA, and every level is use"
        return
    header = 20 if len(answer.flow.src) == 4 else 40
    bundle = Bundle(tuple(steps), dst)
    answer.mtu = bundle.largest(path_mtu, header)
    answer.overhead = bundle.sealed_length(answer.mtu, header) - answer.mtu
    answer.layout = _layout(answer.flow, steps)
    answer.fate = "protected"


def _layout(flow: Flow, steps: list[OutboundStep]) -> list[str]:
    """Headers of the finished datagram, outermost first."""
    headers = ["IPv4" if len(flow.src) == 4 else "IPv6"]
    behind = ["payload"]
    for step in steps:
        sa = step.sa
        name = {Protocol.ESP: "ESP", Protocol.AH: "AH", Protocol.IPCOMP: "IPComp"}[sa.protocol]
        transform = f"{name} spi=0x{sa.spi:08x}"
        if step.tunnel:
            behind = [transform, *headers, *behind]
            headers = ["IPv4" if len(sa.dst) == 4 else "IPv6"]
        else:
            behind = [transform, *behind]
        if sa.natt is not None:
            behind = [f"UDP {sa.natt.sport}>{sa.natt.dport}", *behind]
    return headers + behind


def _decide(tables: Tables, direction: Direction, flow: Flow) -> tuple[Policy | None, list[Skipped]]:
    """The policy by the same look-up as for packets, and the ones that are looked at before it."""
    found = tables.spd.lookup(direction, flow.src, flow.dst, flow.protocol, flow.sport, flow.dport)
    skipped: list[Skipped] = []
    for policy in tables.spd.dump():
        if policy.direction is not direction or policy.selector.family != (4 if len(flow.src) == 4 else 6):
            continue
        if found is not None and policy.id == found.id:
            break
        skipped.append(Skipped(policy, _differs(policy.selector, flow)))
    return found, skipped[-MAX_SKIPPED:]


def _differs(selector: Selector, flow: Flow) -> str:
    if not selector.src_first <= flow.src <= selector.src_last:
        return "source address"
    if not selector.dst_first <= flow.dst <= selector.dst_last:
        return "destination address"
    if selector.protocol not in {IPPROTO_ANY, flow.protocol}:
        return f"protocol is {selector.protocol}"
    if not selector.sport_first <= flow.sport <= selector.sport_last:
        return f"source port (or type) is {selector.sport_first}-{selector.sport_last}"
    if not selector.dport_first <= flow.dport <= selector.dport_last:
        return f"destination port (or code) is {selector.dport_first}-{selector.dport_last}"
    return "ports of a protocol that has none"


def _knobs(tables: Tables, address: bytes) -> FamilyKnobs:
    return tables.sysctl.v4 if len(address) == 4 else tables.sysctl.v6


def counter_meaning(reason: int) -> str:
    """A drop reason as people read it: ``esp_badauth``."""
    return Counter(reason).name.lower()
