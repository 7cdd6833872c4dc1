"""Between PF_KEY messages and :class:`Policy`, both ways."""

from __future__ import annotations

import errno
from typing import Final

from ipsecq.numbers import IPPROTO_ANY, Action, Direction, Level, Mode, Protocol
from ipsecq.pfkey.constants import DIR_FWD, MANUAL_REQID_MAX, Dialect
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import Address, LifetimeExt
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.saconvert import need_addresses
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.rules import MAX_TRANSFORMS
from ipsecq.policy.setpolicy import priority_from_wire, priority_to_wire

_BAD_PROTOCOL: Final = {Dialect.LINUX: errno.EINVAL, Dialect.FREEBSD: errno.EPROTONOSUPPORT}
_TOO_MANY: Final = {Dialect.LINUX: errno.ELOOP, Dialect.FREEBSD: errno.EINVAL}


def need_policy(message: Message) -> PolicyExt:
    """The policy extension, or PfkeyError (EINVAL)."""
    if message.policy is None:
        raise PfkeyError("the policy extension is needed")
    return message.policy


def need_direction(policy: PolicyExt, dialect: Dialect) -> int:
    """IPSEC_DIR_IN, OUT or, of a Linux client, FWD; PfkeyError (EINVAL) for others."""
    if policy.direction in (Direction.IN, Direction.OUT) or (policy.direction == DIR_FWD and dialect is Dialect.LINUX):
        return policy.direction
    raise PfkeyError(f"policy direction {policy.direction}: in (1) and out (2) are here")


def to_selector(message: Message) -> Selector:
    """The selector in the two addresses: prefixes, ports (or ICMP type and code), protocol; 0 is any."""
    src, dst = need_addresses(message)
    # Both carry the protocol; KAME's clients send the same in both, and the kernels go by the destination's.
    protocol = dst.protocol or IPPROTO_ANY
    src_first, src_last = _range(src.address, src.prefix)
    dst_first, dst_last = _range(dst.address, dst.prefix)
    return Selector(src_first, src_last, dst_first, dst_last, protocol, *_ports(src.port), *_ports(dst.port))


def _range(address: bytes, prefix: int) -> tuple[bytes, bytes]:
    width = len(address) * 8
    host = (1 << (width - prefix)) - 1
    first = int.from_bytes(address, "big") & ~host
    return first.to_bytes(len(address), "big"), (first | host).to_bytes(len(address), "big")


def _ports(port: int) -> tuple[int, int]:
    return (port, port) if port else (0, 65535)


def to_policy(message: Message, dialect: Dialect, now: float) -> Policy:
    """The policy that SPDADD or SPDUPDATE describes, direction FWD read as IN; PfkeyError (EINVAL and others)."""
    ext = need_policy(message)
    selector = to_selector(message)
    limits = message.lifetime_hard or LifetimeExt()
    if limits.usetime or limits.octets or limits.allocations:
        raise PfkeyError("a policy's lifetime counts from its creation: when and how much it was used, nobody counts")
    if ext.type > Action.IPSEC:
        raise PfkeyError(f"policy type {ext.type}: discard (0), none (1) and ipsec (2) may be in the SPD")
    direction = Direction.OUT if need_direction(ext, dialect) == Direction.OUT else Direction.IN
    return Policy(
        direction, selector, Action(ext.type),
        transforms_of(ext, dialect) if ext.type == Action.IPSEC else (),
        priority=priority_from_wire(ext.priority), created=now,
        lifetime=limits.addtime,
        label=f"pfkey:{message.pid}",
    )  # fmt: skip


def transforms_of(ext: PolicyExt, dialect: Dialect) -> tuple[Transform, ...]:
    """The requests as transforms, each checked; PfkeyError as the dialect's kernel says."""
    if len(ext.requests) > MAX_TRANSFORMS:
        raise PfkeyError(f"{len(ext.requests)} transforms: at most {MAX_TRANSFORMS}", _TOO_MANY[dialect])
    return tuple(_transform(request, dialect) for request in ext.requests)


def _transform(request: Request, dialect: Dialect) -> Transform:
    try:
        protocol = Protocol(request.protocol)
    except ValueError:
        raise PfkeyError(f"transform of protocol {request.protocol}", _BAD_PROTOCOL[dialect]) from None
    if request.mode not in (1, 2) and not (request.mode == 0 and dialect is Dialect.FREEBSD):
        raise PfkeyError(f"transform of mode {request.mode}: transport (1) and tunnel (2) are here")
    if request.level > Level.UNIQUE:
        raise PfkeyError(f"level {request.level}: default, use, require and unique are 0 to 3")
    if request.mode == Mode.TUNNEL and request.src is None:
        raise PfkeyError("a tunnel needs its two ends")
    # Only unique has a reqid; those above the manual range are the kernel's to give, so the SPD draws a new one.
    reqid = request.reqid if request.level == Level.UNIQUE and request.reqid <= MANUAL_REQID_MAX else 0
    return Transform(protocol, Mode(request.mode), request.src, request.dst, Level(request.level), reqid)


def _address(first: bytes, last: bytes, protocol: int, ports: tuple[int, int]) -> Address:
    """The smallest prefix that holds the range: PF_KEY cannot say more."""
    low, high = int.from_bytes(first, "big"), int.from_bytes(last, "big")
    host_bits = (low ^ high).bit_length()
    network = (low >> host_bits << host_bits).to_bytes(len(first), "big")
    return Address(network, len(first) * 8 - host_bits, protocol, ports[0] if ports[0] == ports[1] else 0)


def from_policy(policy: Policy, *, direction: int | None = None, number: int | None = None) -> Message:
    """The message that describes ``policy`` (type, seq and pid are the caller's).

    ``direction`` and ``number`` stand in for the policy's own, for a FWD policy of Linux.
    """
    selector = policy.selector
    requests = [
        Request(int(each.protocol), int(each.mode), int(each.level), each.reqid, each.src, each.dst)
        for each in policy.transforms
    ]
    return Message(
        0,
        reserved=1,
        src=_address(selector.src_first, selector.src_last, selector.protocol,
                     (selector.sport_first, selector.sport_last)),
        dst=_address(selector.dst_first, selector.dst_last, selector.protocol,
                     (selector.dport_first, selector.dport_last)),
        lifetime_hard=LifetimeExt(addtime=policy.lifetime),
        lifetime_soft=LifetimeExt(),
        lifetime_current=LifetimeExt(addtime=int(policy.created)),
        policy=PolicyExt(
            int(policy.action),
            int(policy.direction) if direction is None else direction,
            policy.id if number is None else number,
            priority_to_wire(policy.priority),
            requests,
        ),
    )  # fmt: skip
