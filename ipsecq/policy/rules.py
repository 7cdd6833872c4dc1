"""What a selector means, and what makes a policy valid: the rules that every structure of the SPD agrees with."""

from __future__ import annotations

from typing import Final

from ipsecq.errors import SpdError
from ipsecq.numbers import IPPROTO_ANY, Action, Mode
from ipsecq.policy.model import Policy, Selector, Transform

MAX_TRANSFORMS: Final = 4
"""Transforms in one policy, as in FreeBSD."""

_PORTED: Final = frozenset((6, 17, 33, 132, 136))
"""Protocols with ports where selectors without a protocol look for them: TCP, UDP, DCCP, SCTP, UDP-Lite."""


def matches(
    selector: Selector, src: bytes, dst: bytes, protocol: int, sport: int, dport: int, fragment: bool = False
) -> bool:
    """Return whether one selector means a packet; the rule that every look-up structure has to agree with.

    ``protocol`` of a selector that is ``any`` together with ports means TCP, UDP, DCCP, SCTP and UDP-Lite.
    """
    # Octet strings of one length compare as the numbers that they are.
    if len(src) != len(selector.src_first):
        return False
    if not selector.src_first <= src <= selector.src_last or not selector.dst_first <= dst <= selector.dst_last:
        return False
    if selector.protocol not in (IPPROTO_ANY, protocol):
        return False
    if not selector.has_ports:
        return True
    if fragment or (selector.protocol == IPPROTO_ANY and protocol not in _PORTED):
        return False
    return (
        selector.sport_first <= sport <= selector.sport_last and selector.dport_first <= dport <= selector.dport_last
    )


def check(policy: Policy) -> None:
    """Raise SpdError (EINVAL) when a policy makes no sense: families, empty ranges, transforms and action."""
    selector = policy.selector
    lengths = {len(end) for end in (selector.src_first, selector.src_last, selector.dst_first, selector.dst_last)}
    if lengths not in ({4}, {16}):
        raise SpdError("source and destination of a policy must be of one family, IPv4 or IPv6")
    if selector.src_first > selector.src_last or selector.dst_first > selector.dst_last:
        raise SpdError("an address range of a policy is empty: write the lower address first")
    if not 0 <= selector.sport_first <= selector.sport_last <= 65535:
        raise SpdError(f"source ports {selector.sport_first}-{selector.sport_last}: use an ascending range of 0-65535")
    if not 0 <= selector.dport_first <= selector.dport_last <= 65535:
        raise SpdError(f"destination ports {selector.dport_first}-{selector.dport_last}: use an ascending range")
    if not 0 <= selector.protocol <= 255:
        raise SpdError(f"upper-layer protocol {selector.protocol}: use 0 to 255")
    if policy.action is Action.IPSEC and not policy.transforms:
        raise SpdError("an ipsec policy needs a transform, such as esp/tunnel/A-B/require")
    if policy.action is not Action.IPSEC and policy.transforms:
        raise SpdError(f"a policy {policy.action.name.lower()} takes no transforms")
    if policy.action in (Action.ENTRUST, Action.BYPASS):
        raise SpdError(f"{policy.action.name.lower()} is for sockets: an SPD entry is discard, none or ipsec")
    if len(policy.transforms) > MAX_TRANSFORMS:
        raise SpdError(f"{len(policy.transforms)} transforms in one policy: at most {MAX_TRANSFORMS}")
    for transform in policy.transforms:
        _check_transform(transform)


def _check_transform(transform: Transform) -> None:
    if (transform.src is None) != (transform.dst is None):
        raise SpdError("a transform needs both ends or none")
    if transform.src is not None and transform.dst is not None and len(transform.src) != len(transform.dst):
        raise SpdError("the ends of a transform must be of one family")
    if transform.mode is Mode.TUNNEL and transform.src is None:
        raise SpdError("a tunnel needs its ends: esp/tunnel/SRC-DST/require")
    if not 0 <= transform.reqid <= 0xFFFFFFFF:
        raise SpdError(f"reqid {transform.reqid}: use 0 to 4294967295")
