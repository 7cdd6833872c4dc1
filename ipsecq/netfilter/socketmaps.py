"""The policies of sockets as maps from mark to verdict, and the commands that turn one state into the next.

Outbound the packet's own mark is the key, inbound nft's ``socket mark``: that of the socket which will get the packet.
Privileged policies stand before those of the SPD, the others (``late``) behind them.  While no socket has a policy the
chains are empty, and no packet pays for a look-up.

A TCP socket that is being opened has no mark yet that ``socket mark`` could see.  So a SYN-ACK that leaves for a policy
that refuses clear packets notes the connection, and clear packets of a noted connection are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.netfilter.verdicts import enforced, verdict_of
from ipsecq.numbers import Action, Direction
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import SocketPolicy
from ipsecq.sysctl import Sysctl

_TURNS: Final = ("", "_late")
_FAMILIES: Final = ((4, "ipv4", "ip", "ipv4_addr"), (6, "ipv6", "ip6", "ipv6_addr"))
_SIDES: Final = ((Direction.IN, "in"), (Direction.OUT, "out"))
HANDSHAKE: Final = "70s"
"""How long a connection may take to open: longer than Linux repeats a SYN-ACK (tcp_synack_retries 5: 63 seconds)."""


def skeleton(settings: NetfilterSettings) -> Iterator[str]:
    """Maps, sets and chains, all empty; ``sockets_in``, ``sockets_in_late`` and so on are to be jumped to."""
    for turn in _TURNS:
        for _, side in _SIDES:
            yield f"chain sockets_{side}{turn} {{ }}"
        yield f"set sockets_strict{turn} {{ type mark; }}"
        for _, family, _, kind in _FAMILIES:
            for _, side in _SIDES:
                yield f"map sockets_{side}{turn}_{family} {{ type mark : verdict; }}"
            yield (
                f"set opening{turn}_{family} {{ type {kind} . inet_service . {kind} . inet_service; size 65535; "
                f"flags dynamic,timeout; timeout {HANDSHAKE}; }}"
            )
    yield "chain sockets_opening { }"


class SocketPlan:
    """What the kernel holds of the sockets' policies."""

    def __init__(self, settings: NetfilterSettings) -> None:
        self._settings = settings
        self._elements: dict[tuple[str, int], str] = {}
        """(map or set, mark) → verdict; "" in a set."""

    def update(self, sockets: Mapping[int, SocketPolicy], sysctl: Sysctl) -> list[str]:
        """Make the plan that of ``sockets``; return the nft commands, empty when nothing changes."""
        wanted = dict(self._wanted(sockets, sysctl))
        before, self._elements = self._elements, wanted
        table = self._settings.table
        commands = [
            f"delete element inet {table} {name} {{ {mark:#010x}{f' : {verdict}' if verdict else ''} }}"
            for (name, mark), verdict in before.items()
            if wanted.get((name, mark)) != verdict
        ]
        commands += [
            f"add element inet {table} {name} {{ {mark:#010x}{f' : {verdict}' if verdict else ''} }}"
            for (name, mark), verdict in wanted.items()
            if before.get((name, mark)) != verdict
        ]
        if commands:
            old, new = _used(before), _used(wanted)
            for turn in _TURNS:
                for _, side in _SIDES:
                    chain = f"sockets_{side}{turn}"
                    if (chain in old) != (chain in new):
                        commands.append(f"flush chain inet {table} {chain}")
                        if chain in new:
                            commands += [f"add rule inet {table} {chain} {rule}" for rule in self._rules(side, turn)]
            if (strict := any(name.startswith("sockets_strict") for name in new)) != any(
                name.startswith("sockets_strict") for name in old
            ):
                commands.append(f"flush chain inet {table} sockets_opening")
                if strict:
                    commands += [f"add rule inet {table} sockets_opening {rule}" for rule in self._notes()]
        return commands

    def _wanted(self, sockets: Mapping[int, SocketPolicy], sysctl: Sysctl) -> Iterator[tuple[tuple[str, int], str]]:
        for mark, pair in sockets.items():
            for direction, side in _SIDES:
                rule = pair.rule(direction)
                if rule is None:
                    continue
                turn = "" if rule.privileged else "_late"
                for number, family, _, _ in _FAMILIES:
                    policy = pair.policy(direction, number)
                    if policy is None:
                        continue
                    verdict = verdict_of(policy, sysctl, self._settings.workers, self._settings.lanes)
                    yield (f"sockets_{side}{turn}_{family}", mark), verdict
                    if direction is Direction.IN and _strict(policy, sysctl):
                        yield (f"sockets_strict{turn}", mark), ""

    def _rules(self, side: str, turn: str) -> Iterator[str]:
        key = self._settings.socket_policy
        for _, family, ip, _ in _FAMILIES:
            target = f"vmap @sockets_{side}{turn}_{family}"
            if side == "out":
                yield f"meta nfproto {family} meta {key} {target}"
                continue
            # A listener on any address would be found for a packet that only passes through.
            yield f"meta nfproto {family} meta l4proto {{ tcp, udp }} fib daddr type local socket {key} {target}"
            yield (
                f"meta nfproto {family} {ip} saddr . tcp sport . {ip} daddr . tcp dport @opening{turn}_{family} "
                "goto in_clear"
            )

    def _notes(self) -> Iterator[str]:
        for turn in _TURNS:
            for _, family, ip, _ in _FAMILIES:
                yield (
                    f"meta nfproto {family} tcp flags & (syn | ack) == syn | ack "
                    f"meta {self._settings.socket_policy} @sockets_strict{turn} "
                    f"update @opening{turn}_{family} {{ {ip} daddr . tcp dport . {ip} saddr . tcp sport }}"
                )


def _strict(policy: Policy, sysctl: Sysctl) -> bool:
    """Clear packets are refused."""
    knobs = sysctl.v4 if policy.selector.family == 4 else sysctl.v6
    return policy.action is Action.DISCARD or (policy.action is Action.IPSEC and enforced(policy, knobs))


def _used(elements: Mapping[tuple[str, int], str]) -> set[str]:
    """Chains that have something to look for, and sets that are not empty."""
    return {name.removesuffix("_ipv4").removesuffix("_ipv6") for name, _ in elements}
