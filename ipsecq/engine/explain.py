"""Why a packet is treated as it is: the same look-ups as the packet path, with their reasons kept.

Nothing is changed by an explanation: no sequence number is taken, no ACQUIRE is sent, nothing is counted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from ipaddress import ip_address

from ipsecq.engine.bundle import Bundle
from ipsecq.engine.choice import flow_number, share, sharers
from ipsecq.engine.history import with_ends
from ipsecq.engine.outbound import MtuOf
from ipsecq.engine.outbound_sa import make_step
from ipsecq.engine.outbound_step import OutboundStep
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
    """One transform of the deciding policy, with the ends that its SA has for this packet."""

    transform: Transform
    level: Level
    src: bytes
    dst: bytes
    sa: SecurityAssociation | None
    note: str


@dataclass(slots=True)
class Knob:
    """A variable that decided something here, and what."""

    name: str
    value: int
    meaning: str


@dataclass(slots=True)
class Explanation:
    """The whole answer."""

    flow: Flow
    direction: Direction
    policy: Policy | None
    skipped: list[Skipped]
    transforms: list[TransformReport] = field(default_factory=list)
    verdict: str = ""
    """Outbound ``clear``, ``protected``, ``held`` or ``dropped``; inbound, what may enter: ``anything``, ``protected`` or
    ``nothing``."""
    fate: str = ""
    """The verdict as a sentence."""
    layout: list[str] = field(default_factory=list)
    """Headers of the finished datagram, outermost first."""
    overhead: int = 0
    """Octets that the headers add to a packet of ``mtu`` octets."""
    mtu: int = 0
    """The largest packet of this flow that needs no fragmentation; 0 where nothing is sealed."""
    path_mtu: int = 0
    """What the path to the outermost destination carries; 0 where nothing is sealed."""
    knobs: list[Knob] = field(default_factory=list)


def outbound(tables: Tables, flow: Flow, mtu_of: MtuOf) -> Explanation:
    """What happens to a whole packet that leaves, by :meth:`ipsecq.engine.outbound.Outbound.process`.

    ``mtu_of`` is asked for the path MTU towards the outermost destination, in octets.
    """
    policy, skipped = _decide(tables, Direction.OUT, flow)
    answer = Explanation(flow, Direction.OUT, policy, skipped)
    if policy is None:
        passes = _default_policy(tables, answer)
        answer.verdict = "clear" if passes else "dropped"
        answer.fate = f"no policy names it: {'passes in clear' if passes else 'dropped'} by def_policy"
    elif policy.action is Action.DISCARD:
        answer.verdict, answer.fate = "dropped", "dropped: the policy says discard"
    elif policy.action is not Action.IPSEC:
        answer.verdict, answer.fate = "clear", f"passes in clear: the policy says {policy.action.name.lower()}"
    else:
        _explain_bundle(tables, answer, policy, mtu_of)
    return answer


def inbound(tables: Tables, flow: Flow) -> Explanation:
    """What a packet that arrives must have been through, by :func:`ipsecq.engine.history.check`."""
    policy, skipped = _decide(tables, Direction.IN, flow)
    answer = Explanation(flow, Direction.IN, policy, skipped)
    knobs = _knobs(tables, flow.src)
    if policy is None:
        passes = _default_policy(tables, answer)
        answer.verdict = "anything" if passes else "nothing"
        answer.fate = f"no policy names it: {'enters, protected or not,' if passes else 'dropped'} by def_policy"
        return answer
    if policy.action is Action.DISCARD:
        answer.verdict, answer.fate = "nothing", "dropped: the policy says discard"
        return answer
    if policy.action is not Action.IPSEC:
        answer.verdict = "anything"
        answer.fate = f"enters, protected or not: the policy says {policy.action.name.lower()}"
        return answer
    must = []
    off = ""
    for transform, src, dst in with_ends(policy, flow.src, flow.dst):
        enforced = enforced_inbound(transform, knobs)
        level = resolve_level(transform, knobs)
        # Which of several SAs is used is the sender's choice: this is one that would do.
        sa = tables.sad.outbound(int(transform.protocol), int(transform.mode), src, dst, transform.reqid)
        note = "must have been applied" if enforced else "is not enforced inbound"
        if sa is None:
            note += "; no SA here could open it"
        _note_knobs(answer, transform, knobs)
        if not _enabled(transform, knobs):
            note = f"{_enable_name(transform)} is 0: dropped on arrival"
            if enforced and not off:
                off = f"dropped: {_enable_name(transform)} is 0"
        answer.transforms.append(TransformReport(transform, level, src, dst, sa, note))
        if enforced:
            must.append(f"{transform.protocol.name.lower()}/{transform.mode.name.lower()}")
    strict = knobs.check_policy_history
    how = "in this order, in this mode, between these ends" if strict else "in any order and mode"
    if must:
        answer.knobs.append(Knob("net.inet.ipsec.check_policy_history", strict, how))
        answer.verdict = "nothing" if off else "protected"
        answer.fate = off or f"enters only after {' and '.join(must)}, {how}; in clear it is dropped"
    else:
        answer.verdict, answer.fate = "anything", "enters, protected or not: no transform is required"
    return answer


def _explain_bundle(tables: Tables, answer: Explanation, policy: Policy, mtu_of: MtuOf) -> None:
    steps: list[OutboundStep] = []
    pool = Pool(bytes)  # nothing is sealed here
    flow = answer.flow
    knobs = _knobs(tables, flow.src)
    outermost = flow.dst
    number = flow_number(flow.src, flow.dst, flow.protocol, flow.sport, flow.dport)
    blocked = ("", "")
    for transform, near, far in with_ends(policy, flow.src, flow.dst):
        level = resolve_level(transform, knobs)
        sas = sharers(tables, transform, near, far)
        sa = share(sas, number)
        note = f"applied, one of {len(sas)} SAs that share the flows" if len(sas) > 1 else "applied"
        _note_knobs(answer, transform, knobs)
        if not _enabled(transform, knobs):
            note = f"{_enable_name(transform)} is 0"
            blocked = blocked if blocked[0] else ("dropped", f"dropped: {note}")
        elif sa is None:
            note = "no SA: asked for, and left out" if level is Level.USE else "no SA: asked for, the packet waits"
            if level is not Level.USE and not blocked[0]:
                blocked = ("held", "waits until key management brings the SA that is missing, then is dropped")
        answer.transforms.append(TransformReport(transform, level, near, far, sa, note))
        if sa is None:
            continue
        tunnel = transform.mode is Mode.TUNNEL
        steps.append(make_step(sa, tables, pool, tunnel))
        if tunnel:
            outermost = far
    if blocked[0]:
        answer.verdict, answer.fate = blocked
        return
    if not steps:
        answer.verdict, answer.fate = "clear", "passes in clear: no SA, and every level is use"
        return
    header = 20 if len(flow.src) == 4 else 40
    bundle = Bundle(tuple(steps), outermost, tables.counters)
    answer.path_mtu = mtu_of(outermost)
    answer.mtu = bundle.largest(answer.path_mtu, header)
    answer.overhead = bundle.sealed_length(answer.mtu, header) - answer.mtu
    answer.layout = _layout(flow, steps)
    answer.verdict, answer.fate = "protected", "protected"
    _note_headers(tables, answer, steps)


def _layout(flow: Flow, steps: list[OutboundStep]) -> list[str]:
    """Headers of the finished datagram, outermost first; IPComp is there unless the packet is better without it."""
    front = _ip(flow.src, flow.dst)
    behind = ["payload"]
    for step in steps:
        sa = step.sa
        name = {Protocol.ESP: "ESP", Protocol.AH: "AH", Protocol.IPCOMP: "IPComp"}[sa.protocol]
        if step.tunnel:
            behind = [front, *behind]
            front = _ip(sa.src, sa.dst)
        behind = [f"{name} {sa.spi:#x}", *behind]
        if sa.natt is not None:
            behind = [f"UDP {sa.natt.sport} > {sa.natt.dport}", *behind]
    return [front, *behind]


def _ip(src: bytes, dst: bytes) -> str:
    return f"IPv{4 if len(src) == 4 else 6} {ip_address(src)} > {ip_address(dst)}"


# -- which variables matter ----------------------------------------------------------------------------


def _tree(version: int) -> str:
    return "net.inet.ipsec" if version == 4 else "net.inet6.ipsec6"


def _default_policy(tables: Tables, answer: Explanation) -> bool:
    """True when ``def_policy`` lets it pass."""
    value = _knobs(tables, answer.flow.src).def_policy
    tree = _tree(4 if len(answer.flow.src) == 4 else 6)
    answer.knobs.append(Knob(f"{tree}.def_policy", value, "none" if value else "discard"))
    return value != 0


def _enable_name(transform: Transform) -> str:
    name = transform.protocol.name.lower()
    return f"net.inet.{name}.{name}_enable"


def _enabled(transform: Transform, knobs: FamilyKnobs) -> bool:
    return bool(getattr(knobs, f"{transform.protocol.name.lower()}_enable"))


def _note_knobs(answer: Explanation, transform: Transform, knobs: FamilyKnobs) -> None:
    """The variables that say whether a transform is on, and what its level ``default`` means."""
    if not _enabled(transform, knobs):
        answer.knobs.append(Knob(_enable_name(transform), 0, f"{transform.protocol.name} is off, both ways"))
    if transform.level is Level.DEFAULT and transform.protocol is not Protocol.IPCOMP:
        mode = "net" if transform.mode is Mode.TUNNEL else "trans"
        attribute = f"{transform.protocol.name.lower()}_{mode}_deflev"
        tree = _tree(4 if len(answer.flow.src) == 4 else 6)
        value = getattr(knobs, attribute)
        meaning = f"level default is {resolve_level(transform, knobs).name.lower()}"
        answer.knobs.append(Knob(f"{tree}.{attribute}", value, meaning))


def _note_headers(tables: Tables, answer: Explanation, steps: list[OutboundStep]) -> None:
    """The variables that shape what leaves."""
    for step in steps:
        version = 4 if len(step.sa.dst) == 4 else 6
        knobs = tables.sysctl.v4 if version == 4 else tables.sysctl.v6
        if step.tunnel:
            ecn = {0: "outer ECN cleared", 1: "ECN copied to the outer header"}.get(knobs.ecn, "ECN left alone")
            answer.knobs.append(Knob(f"{_tree(version)}.ecn", knobs.ecn, ecn))
        if step.tunnel and version == 4:
            df = {0: "outer DF clear", 1: "outer DF set"}.get(knobs.dfbit, "outer DF copied from the inner header")
            answer.knobs.append(Knob("net.inet.ipsec.dfbit", knobs.dfbit, df))
        if step.sa.protocol is Protocol.AH and version == 4:
            covered = "TOS not covered" if knobs.ah_cleartos else "TOS covered by AH"
            answer.knobs.append(Knob("net.inet.ipsec.ah_cleartos", knobs.ah_cleartos, covered))
            mask = f"flags and offset covered under mask {knobs.ah_offsetmask:#06x}"
            answer.knobs.append(Knob("net.inet.ipsec.ah_offsetmask", knobs.ah_offsetmask, mask))


# -- which policies were looked at ---------------------------------------------------------------------


def _decide(tables: Tables, direction: Direction, flow: Flow) -> tuple[Policy | None, list[Skipped]]:
    """The policy by the same look-up as for packets, and the ones that are looked at before it."""
    found = tables.spd.lookup(direction, flow.src, flow.dst, flow.protocol, flow.sport, flow.dport)
    skipped: deque[Skipped] = deque(maxlen=MAX_SKIPPED)
    for policy in tables.spd.dump():
        if policy.direction is not direction or policy.selector.family != (4 if len(flow.src) == 4 else 6):
            continue
        if found is not None and policy.id == found.id:
            break
        skipped.append(Skipped(policy, _differs(policy.selector, flow)))
    return found, list(skipped)


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
