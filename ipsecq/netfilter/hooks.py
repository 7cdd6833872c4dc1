"""What the base chains of both our tables do with a packet before they look for its policy, and how they look for it.

Every packet that a gateway forwards meets both tables on the way in and on the way out, so few rules and early
decisions count: the interpreter takes some 40 ns for each.  Devices and protocols are told apart by maps, a packet that
no policy names meets nothing else, and what is exempt from inbound policies is asked when one would refuse the packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ipsecq.netfilter import socketmaps
from ipsecq.netfilter.settings import NetfilterSettings

BY_PROTOCOL: Final = (
    "meta l4proto vmap { esp : jump in_ipsec, ah : jump in_ipsec, comp : jump in_ipsec, udp : jump in_udp, "
    "icmp : jump in_icmp, icmpv6 : jump in_icmp }"
)
"""The rule for what is no ordinary packet; the chains that it names are each table's own."""


def policy_chains(settings: NetfilterSettings, *, clear_open: str) -> Iterator[str]:
    """The chains that policies, their verdicts and the base chains name.  Those of outbound workers are each table's own.

    ``clear_open``: what a packet in clear gets where its policy is fail-open.
    """
    yield "chain in_clear { jump exempt_in; counter name in_clear_dropped drop; }"
    yield f"chain in_clear_open {{ {clear_open}; }}"
    yield "chain in_discard { jump exempt_in; counter name in_discard_dropped drop; }"
    yield "chain out_discard { counter name out_discard_dropped drop; }"
    for chain in ("default_in", "default_out"):
        yield f"chain {chain} {{ }}"
    for side in ("in", "out"):
        yield f"chain policy_{side}_ipv4 {{ }}"
        yield f"chain policy_{side}_ipv6 {{ }}"
    yield from socketmaps.skeleton(settings)


def interface_maps(settings: NetfilterSettings) -> Iterator[str]:
    """What packets of certain devices get, whatever the SPD says: see :func:`_entrances` and :func:`_exits`."""
    for name, elements in (("entrances", _entrances(settings)), ("exits", _exits(settings))):
        held = f" elements = {{ {', '.join(elements)} }};" if elements else ""
        yield f"map {name} {{ type ifname : verdict;{held} }}"


def compile_interfaces(settings: NetfilterSettings) -> str:
    """One transaction that gives the maps their elements."""
    lines: list[str] = []
    for name, elements in (("entrances", _entrances(settings)), ("exits", _exits(settings))):
        lines.append(f"flush map inet {settings.table} {name}")
        if elements:
            lines.append(f"add element inet {settings.table} {name} {{ {', '.join(elements)} }}")
    return "\n".join(lines) + "\n"


def _entrances(settings: NetfilterSettings) -> list[str]:
    """What was decapsulated (``inner.py``), what comes out of route-based tunnels, loopback where that is not asked for."""
    names = [settings.enc_device, *settings.interfaces, *([] if settings.loopback else ["lo"])]
    return [f'"{name}" : accept' for name in names]


def _exits(settings: NetfilterSettings) -> list[str]:
    """What is routed into a tunnel's device has that tunnel's policy."""
    return [
        *(f'"{name}" : goto interface_out' for name in settings.interfaces),
        *([] if settings.loopback else ['"lo" : accept']),
    ]


def interface_out() -> Iterator[str]:
    """The chain for packets into a tunnel's device: policies of sockets hold before."""
    yield "chain interface_out {"
    yield "  jump sockets_opening"
    yield "  jump sockets_out"
    yield "  jump sockets_out_late"
    yield "  accept"
    yield "}"


def neighbours(settings: NetfilterSettings) -> Iterator[str]:
    """The chain ``neighbours``, for ICMPv6: leaves alone what no link works without."""
    yield "chain neighbours {"
    if settings.neighbour_discovery:
        yield "  icmpv6 type { 133, 134, 135, 136, 137 } ip6 hoplimit 255 accept"
        # Switches that snoop MLD forward solicitations only to where a report came from.
        yield "  icmpv6 type { 130, 131, 132, 143 } ip6 hoplimit 1 accept"
    yield "}"


def ours(settings: NetfilterSettings) -> Iterator[str]:
    """The rule that exempts packets to sockets that bypass the policies."""
    if settings.socket_match:
        done = f"{settings.mark_mask:#010x} == {settings.mark_done:#010x}"
        # A listener on any address would be found for a packet that only passes through.
        yield f"  meta l4proto {{ tcp, udp }} fib daddr type local socket mark & {done} accept"


def policies(side: str) -> Iterator[str]:
    """The end of a base chain: policies of sockets, of the SPD by family, of sockets without privilege, the default."""
    if side == "out":
        yield "  jump sockets_opening"
    yield f"  jump sockets_{side}"
    yield f"  meta nfproto vmap {{ ipv4 : jump policy_{side}_ipv4, ipv6 : jump policy_{side}_ipv6 }}"
    yield f"  jump sockets_{side}_late"
    yield f"  jump default_{side}"
