"""The data of a security policy: selector, action, transforms with their levels."""

from __future__ import annotations

from dataclasses import dataclass

from ipsecq.numbers import IPPROTO_ANY, Action, Direction, Level, Mode, Protocol


@dataclass(slots=True, frozen=True)
class Selector:
    """Which packets a policy means.  Addresses are packed (4 or 16 octets), ports inclusive ranges in host order.

    ``src_first == src_last`` with a prefix is the common form: a prefix is held as its first and last address, so
    ranges (RFC 4301) and prefixes are one thing.  ``protocol`` 255 is any.  For ICMP and ICMPv6 the source port
    range holds the type and the destination port range the code.
    """

    src_first: bytes
    src_last: bytes
    dst_first: bytes
    dst_last: bytes
    protocol: int = IPPROTO_ANY
    sport_first: int = 0
    sport_last: int = 65535
    dport_first: int = 0
    dport_last: int = 65535

    def __reduce__(self) -> tuple[type[Selector], tuple[object, ...]]:
        """For pickle, which knows no number twice: what is left out is the one default, not a copy in each selector."""
        ends = (self.src_first, self.src_last, self.dst_first, self.dst_last)
        ports = (self.sport_first, self.sport_last, self.dport_first, self.dport_last)
        return Selector, (*ends, self.protocol, *ports) if self.has_ports else (*ends, self.protocol)

    @property
    def family(self) -> int:
        """4 or 6."""
        return 4 if len(self.src_first) == 4 else 6

    @property
    def has_ports(self) -> bool:
        """True when ports (or ICMP type and code) narrow the selector: fragments other than the first can't match."""
        return (self.sport_first, self.sport_last, self.dport_first, self.dport_last) != (0, 65535, 0, 65535)


@dataclass(slots=True, frozen=True)
class Transform:
    """One ``protocol/mode/src-dst/level`` of a policy.  Addresses are None in transport mode without ends."""

    protocol: Protocol
    mode: Mode
    src: bytes | None = None
    dst: bytes | None = None
    level: Level = Level.DEFAULT
    reqid: int = 0


@dataclass(slots=True, frozen=True)
class Policy:
    """One entry of the SPD.  ``transforms`` is in written order: the first one is applied first (innermost)."""

    direction: Direction
    selector: Selector
    action: Action
    transforms: tuple[Transform, ...] = ()
    priority: int = 0
    """Lower wins; among equals the first that was added.  0 is the default: ``prio high`` is below, ``low`` above."""
    id: int = 0
    """Unique for the life of the daemon; the SPD assigns it (``spid`` of spddump)."""
    created: float = 0.0
    lifetime: int = 0
    """Seconds from creation until the policy goes (0: stays)."""
    fail_open: bool = False
    """Let packets pass in clear when ipsecq cannot serve them.  Never the default."""
    label: str = ""
    """``file:line`` or ``pfkey:pid``; for people."""
