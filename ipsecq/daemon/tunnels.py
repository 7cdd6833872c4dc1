"""Which tunnels the policies name, and whether the SAs that they require are there.

A tunnel is a pair of ends: ours and the peer's.  Policies whose ends are left to the packet (transport mode without
addresses) name none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from ipsecq.daemon.authority import Authority
from ipsecq.metrics.source import TunnelSample
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.levels import resolve_level
from ipsecq.policy.model import Policy, Transform
from ipsecq.setkey import values

MAX_NETWORKS: Final = 8
"""Pairs of networks that one tunnel shows."""

Ends = tuple[bytes, bytes]


@dataclass(slots=True)
class _Tunnel:
    missing: list[str] = field(default_factory=list)
    networks: list[tuple[str, str]] = field(default_factory=list)
    fail_open: bool = False


class Tunnels:
    """Answers from memory until an SA, a policy or a knob changes."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._state: tuple[int, ...] = ()
        self._samples: list[TunnelSample] = []

    def samples(self, policies: Iterable[Policy]) -> list[TunnelSample]:
        """One a pair of ends, in the order of the SPD."""
        authority = self._authority
        state = authority.sad.generation, authority.spd.generation, authority.sysctl.generation, len(authority.problems)
        if state != self._state:
            self._samples, self._state = self._look(policies), state
        return self._samples

    def _look(self, policies: Iterable[Policy]) -> list[TunnelSample]:
        found: dict[Ends, _Tunnel] = {}
        for policy in policies:
            for transform, local, peer in _tunnel_ends(policy):
                tunnel = found.setdefault((local, peer), _Tunnel())
                self._note(tunnel, policy, transform)
        return [
            TunnelSample(
                values.format_address(local), values.format_address(peer), not tunnel.missing,
                "; ".join(sorted(tunnel.missing, reverse=True)[:4]), tuple(tunnel.networks), tunnel.fail_open,
            )
            for (local, peer), tunnel in found.items()
        ]  # fmt: skip

    def _note(self, tunnel: _Tunnel, policy: Policy, transform: Transform) -> None:
        tunnel.fail_open = tunnel.fail_open or policy.fail_open
        out = policy.direction is Direction.OUT
        if out and len(tunnel.networks) < MAX_NETWORKS:
            pair = _network(policy, source=True), _network(policy, source=False)
            if pair not in tunnel.networks:
                tunnel.networks.append(pair)
        knobs = self._authority.sysctl.v4 if policy.selector.family == 4 else self._authority.sysctl.v6
        if resolve_level(transform, knobs) is Level.USE or transform.src is None or transform.dst is None:
            return
        sa = self._authority.sad.outbound(
            int(transform.protocol), int(transform.mode), transform.src, transform.dst, transform.reqid
        )
        problem = "no " if sa is None else "not allowed to send: " if out and sa.key in self._authority.problems else ""
        if problem:
            text = f"{problem}{'outbound' if out else 'inbound'} {Protocol(transform.protocol).name} SA"
            if text not in tunnel.missing:
                tunnel.missing.append(text)


def _tunnel_ends(policy: Policy) -> Iterator[tuple[Transform, bytes, bytes]]:
    if policy.action is not Action.IPSEC:
        return
    for transform in policy.transforms:
        if transform.mode is Mode.TUNNEL and transform.src is not None and transform.dst is not None:
            out = policy.direction is Direction.OUT
            yield transform, *((transform.src, transform.dst) if out else (transform.dst, transform.src))


def _network(policy: Policy, *, source: bool) -> str:
    selector = policy.selector
    first, last = (selector.src_first, selector.src_last) if source else (selector.dst_first, selector.dst_last)
    return values.format_range(first, last)
