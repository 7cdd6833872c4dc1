"""Bundles of any shape as data: SAs and policies of both ends, for tests that make them up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine_peers import Peer, address, make_peer

from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key

HOSTS = {4: ("10.1.0.2", "10.2.0.2"), 6: ("fd01::2", "fd02::2")}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "gcm": {"encryption": "aes-gcm-16", "encryption_key": Key(bytes(range(20)))},
    "gcm8": {"encryption": "aes-gcm-8", "encryption_key": Key(bytes(range(40, 60)))},
    "cbc": {
        "encryption": "aes-cbc", "encryption_key": Key(bytes(range(16))),
        "authentication": "hmac-sha2-256", "authentication_key": Key(bytes(range(32))),
    },
    "null": {"encryption": "null", "authentication": "aes-cmac", "authentication_key": Key(bytes(range(16)))},
    "sha1": {"authentication": "hmac-sha1", "authentication_key": Key(bytes(range(20)))},
    "sha256": {"authentication": "hmac-sha2-256", "authentication_key": Key(bytes(range(7, 39)))},
    "gmac": {"authentication": "aes-gmac", "authentication_key": Key(bytes(range(9, 29)))},
    "deflate": {"compression": "deflate"},
}  # fmt: skip
OF = {Protocol.ESP: ("gcm", "gcm8", "cbc", "null"), Protocol.AH: ("sha1", "sha256", "gmac"), Protocol.IPCOMP: ("deflate",)}


@dataclass(frozen=True)
class Step:
    """One transform.  ``outer``: 0 transport mode, 4 or 6 a tunnel of that version; ``more``: fields of its SAs."""

    protocol: Protocol
    algorithm: str
    outer: int = 0
    more: tuple[tuple[str, Any], ...] = ()


def ends(place: int, version: int) -> tuple[bytes, bytes]:
    """The ends of the tunnel at that place of a bundle."""
    pattern = "192.0.2.{}" if version == 4 else "2001:db8::{}"
    return address(pattern.format(10 + 2 * place)), address(pattern.format(11 + 2 * place))


def pair(steps: list[Step], inner: int = 4, *, mtu: int = 65535, knobs: dict[str, int] | None = None) -> tuple[Peer, Peer]:
    """Two ends whose policies require ``steps``, innermost first, between :data:`HOSTS` of version ``inner``."""
    src, dst = (address(text) for text in HOSTS[inner])
    near, far = src, dst
    sas, there, back = [], [], []
    for place, step in enumerate(steps):
        mode = Mode.TUNNEL if step.outer else Mode.TRANSPORT
        if step.outer:
            near, far = ends(place, step.outer)
        fields = {"mode": mode, "reqid": place + 1, **ALGORITHMS[step.algorithm], **dict(step.more)}
        if step.protocol is not Protocol.IPCOMP:
            fields.setdefault("replay_window", 64)
        spi = 0x1000 + 2 * place
        sas += [
            SecurityAssociation(step.protocol, spi, near, far, **fields),
            SecurityAssociation(step.protocol, spi + 1, far, near, **fields),
        ]
        for rules, (one, two) in ((there, (near, far)), (back, (far, near))):
            rules.append(Transform(step.protocol, mode, one, two, Level.UNIQUE, place + 1))

    def policies(mine: bytes, other: bytes, out: list[Transform], into: list[Transform]) -> list[Policy]:
        return [
            Policy(Direction.OUT, Selector(mine, mine, other, other), Action.IPSEC, tuple(out)),
            Policy(Direction.IN, Selector(other, other, mine, mine), Action.IPSEC, tuple(into)),
        ]

    return (
        make_peer(sas, policies(src, dst, there, back), knobs, mtu),
        make_peer([replace(sa) for sa in sas], policies(dst, src, back, there), knobs, mtu),
    )
