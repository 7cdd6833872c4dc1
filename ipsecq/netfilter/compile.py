"""The SPD compiled to nft text: our ``inet`` table, its ``netdev`` companion for egress, and updates of both.

A packet's way through the table::

    direct      -450  ESP that the workers have from packet rings → drop
    prerouting  -250  enc0 (see ``inner.py``), devices of route-based tunnels → accept · ESP, AH, IPComp and ESP in UDP
                      to a local address → worker of the SPI · ICMP "too big" about them → worker 0 · neighbour
                      discovery → accept · sockets' policies · inbound policies (clear packets only) · default
                      policy; what would be refused and is for a bypass socket → accept
    output      -250  ESP in UDP from our own sockets gets the NAT-T port
    postrouting  150  ours → accept · devices of route-based tunnels · neighbour discovery → accept · sockets' policies ·
                      outbound policies → guard → worker · default policy
    egress            (netdev, each guarded device) what was replaced → drop

Every text here is one transaction: the kernel shows the old rules to a packet, or the new ones, never none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from ipsecq.netfilter import hooks, socketmaps
from ipsecq.netfilter.plan import Plan
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.netfilter.steering import buckets
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import SocketPolicy
from ipsecq.sysctl import FamilyKnobs, Sysctl

COUNTERS: Final = (
    "in_clear_dropped",
    "in_discard_dropped",
    "in_default_dropped",
    "out_discard_dropped",
    "out_default_dropped",
    "out_unguarded_dropped",
    "blocked_dropped",
    "natt_keepalives",
)
"""Named counters of the table: drops (and keepalives) that the kernel does without a worker."""

DIRECT_OCTETS: Final = 1968
"""The longest ESP datagram that comes by a ring."""
NO_SOCKETS: Final[Mapping[int, SocketPolicy]] = {}
BLOCK: Final = "counter name blocked_dropped drop"


def worker_chains(settings: NetfilterSettings) -> dict[str, tuple[int, int, bool]]:
    """Chains that hold a queue statement: name → (first queue, last queue, bypass)."""
    first, last = settings.queue_base, settings.queue_base + settings.queues - 1
    chains: dict[str, tuple[int, int, bool]] = {}
    for prefix, bypass in (("worker", settings.queue_bypass), ("open", True)):
        for queue in range(settings.queues):
            chains[f"{prefix}_{queue}"] = first + queue, first + queue, bypass
        chains[f"{prefix}_spread"] = first, last, bypass
    # Clear packets that a fail-open policy wants protected: a worker drops them, and without one they pass.
    chains["clear_open"] = first, last, True
    return chains


def worker_suffixes(settings: NetfilterSettings) -> list[str]:
    """What the names of chains of one queue, and of all, end in."""
    return [*map(str, range(settings.queues)), "spread"]


def guard_set(guarded: Mapping[int, str]) -> Iterator[str]:
    """The set of devices that have our egress chain.

    By index and name: a device that goes and comes back under its old name is not trusted before it has an egress chain
    of its own, and neither is a renamed one (from kernel 6.16 on an egress chain is bound to a name).
    """
    devices = ", ".join(guard_element(index, device) for index, device in guarded.items())
    elements = f" elements = {{ {devices} }};" if guarded else ""
    yield f"set guarded {{ type iface_index . ifname;{elements} }}"


def compile_ruleset(
    policies: Iterable[Policy],
    settings: NetfilterSettings,
    sysctl: Sysctl,
    guarded: Mapping[int, str] | None = None,
    plan: Plan | None = None,
    sockets: Mapping[int, SocketPolicy] = NO_SOCKETS,
) -> str:
    """The whole ruleset as nft text that replaces ours, or makes it, in one transaction.

    ``guarded`` maps interface indexes to names: devices that get an egress chain; outbound protected traffic to any
    other device is dropped.  The chains ``worker_*`` come blocked (drop); :class:`~ipsecq.netfilter.load.Loader`
    puts the queue statements in.  ``plan`` must be new; :meth:`Plan.update` continues from it.
    ``sockets`` are the policies of sockets by mark.
    """
    plan = plan if plan is not None else Plan(settings.table, settings.workers, settings.lanes)
    plan.sockets = socketmaps.SocketPlan(settings)
    table = settings.table
    lines = [f"add table inet {table}", f"delete table inet {table}", f"table inet {table} {{"]
    lines += ["  " + line for line in _skeleton(settings, sysctl, guarded or {})]
    lines += ["}", *plan.update(policies, sysctl), *plan.sockets.update(sockets, sysctl), *defaults(settings, sysctl)]
    return "\n".join(lines) + "\n" + compile_egress(guarded or {}, settings)


def compile_commands(commands: Iterable[str], settings: NetfilterSettings, sysctl: Sysctl) -> str:
    """One transaction from what a plan describes to other policies and knobs; worker chains stay as they are.

    ``commands`` are those of :meth:`Plan.update`: for what changed only.  With none it rewrites the two default chains.
    """
    return "\n".join([*commands, *defaults(settings, sysctl)]) + "\n"


def compile_block(settings: NetfilterSettings) -> str:
    """Block protected traffic: every worker chain drops, ``fail_open`` policies pass.  The table must be there."""
    lines: list[str] = []
    for chain, (_, _, bypass) in worker_chains(settings).items():
        lines.append(f"flush chain inet {settings.table} {chain}")
        lines.append(f"add rule inet {settings.table} {chain} {'accept' if bypass else BLOCK}")
    return "\n".join(lines) + "\n"


def compile_egress(guarded: Mapping[int, str], settings: NetfilterSettings) -> str:
    """The netdev table, replaced: for each device a chain that drops what was replaced (mark STOLEN)."""
    table = settings.table
    lines = [f"add table netdev {table}", f"delete table netdev {table}", f"table netdev {table} {{"]
    lines.append("  counter stolen { }")
    for index, device in guarded.items():
        lines.append(f"  chain {egress_chain(index)} {{")
        lines.append(f'    type filter hook egress device "{device}" priority 0; policy accept;')
        lines.append(f"    {settings.stolen} counter name stolen drop")
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def compile_guard(guarded: Mapping[int, str], settings: NetfilterSettings) -> str:
    """Add devices: egress chain and set element in one transaction, so no device is trusted before it has its chain."""
    lines: list[str] = []
    for index, device in guarded.items():
        lines.append(
            f"add chain netdev {settings.table} {egress_chain(index)} "
            f'{{ type filter hook egress device "{device}" priority 0; policy accept; }}'
        )
        lines.append(f"flush chain netdev {settings.table} {egress_chain(index)}")
        lines.append(
            f"add rule netdev {settings.table} {egress_chain(index)} {settings.stolen} counter name stolen drop"
        )
        lines.append(f"add element inet {settings.table} guarded {{ {guard_element(index, device)} }}")
    return "\n".join(lines) + "\n"


def compile_unguard(guarded: Mapping[int, str], settings: NetfilterSettings) -> str:
    """Take devices away again: the set elements and the egress chains, which must exist."""
    lines: list[str] = []
    for index, device in guarded.items():
        lines.append(f"delete element inet {settings.table} guarded {{ {guard_element(index, device)} }}")
        lines.append(f"flush chain netdev {settings.table} {egress_chain(index)}")
        lines.append(f"delete chain netdev {settings.table} {egress_chain(index)}")
    return "\n".join(lines) + "\n"


def guard_element(index: int, device: str) -> str:
    """A device as an element of the set ``guarded``."""
    return f'{index} . "{device}"'


def egress_chain(index: int) -> str:
    """Name of a device's egress chain; by index, as device names change and hold any character."""
    return f"egress_{index}"


def compile_remove(settings: NetfilterSettings) -> str:
    """Take our tables away, whether they are there or not."""
    tables = (f"inet {settings.table}", f"netdev {settings.table}", f"inet {settings.table}_inner")
    lines = (f"{verb} table {table}" for table in tables for verb in ("add", "delete"))
    return "\n".join(lines) + "\n"


def _skeleton(settings: NetfilterSettings, sysctl: Sysctl, guarded: Mapping[int, str]) -> Iterator[str]:
    for counter in COUNTERS:
        yield f"counter {counter} {{ }}"
    yield from guard_set(guarded)
    yield from hooks.interface_maps(settings)
    for chain, (_, _, bypass) in worker_chains(settings).items():
        yield f"chain {chain} {{ {'accept' if bypass else BLOCK}; }}"
    for suffix in worker_suffixes(settings):
        for chain in ("out_worker", "out_use"):
            yield f"chain {chain}_{suffix} {{"
            yield "  oif . oifname != @guarded counter name out_unguarded_dropped drop"
            yield f"  goto worker_{suffix}"
            yield "}"
        yield f"chain out_open_{suffix} {{"
        yield "  oif . oifname != @guarded accept"
        yield f"  goto open_{suffix}"
        yield "}"
    yield from hooks.policy_chains(settings, clear_open="jump exempt_in; goto clear_open")
    yield from _spi_chain(settings)
    yield "chain exempt_in {"
    yield from hooks.ours(settings)
    yield "}"
    yield from hooks.neighbours(settings)
    yield from _prerouting(settings)
    yield from _postrouting(settings)
    yield from hooks.interface_out()
    if settings.udp_ports:
        yield from _output(settings)


def _spi_chain(settings: NetfilterSettings) -> Iterator[str]:
    count = buckets(settings.queues)
    targets = ", ".join(f"{bucket} : goto worker_{bucket % settings.queues}" for bucket in range(count))
    yield "chain steer {"
    for field in ("esp spi", "ah spi", "comp cpi"):
        yield f"  {field} & {count - 1} vmap {{ {targets} }}"
    yield "  accept"
    yield "}"
    yield "chain steer_udp {"
    # RFC 3948: one octet 0xff is a keepalive, four zero octets mark IKE, anything else is ESP.
    yield "  udp length 9 @th,64,8 0xff counter name natt_keepalives drop"
    yield f"  udp length > 12 @th,64,32 != 0 @th,64,32 & {count - 1} vmap {{ {targets} }}"
    yield "}"
    natt = ports(settings)
    yield "chain too_big {"
    # The quoted packet begins after the 8 octets of the ICMP header; an IPv4 header without options is assumed where
    # ports are looked at, as ours have none.  What IPv6 quotes behind extension headers the worker finds out.
    yield "  icmp type 3 icmp code 4 @th,136,8 { 50, 51, 108 } goto worker_0"
    yield f"  icmp type 3 icmp code 4 @th,64,8 0x45 @th,136,8 17 @th,224,16 {natt} goto worker_0"
    yield "  icmpv6 type 2 @th,112,8 { 0, 43, 44, 50, 51, 60, 108 } goto worker_0"
    yield f"  icmpv6 type 2 @th,112,8 17 @th,384,16 {natt} goto worker_0"
    yield "}"


def _prerouting(settings: NetfilterSettings) -> Iterator[str]:
    # Nothing comes here; that such a rule exists makes the kernel put fragments together before prerouting.
    yield "chain defragment {"
    if settings.defragment == "tproxy":
        yield "  meta length 0 meta l4proto tcp tproxy to :1"
    elif settings.defragment == "ct":
        yield "  meta length 0 ct state new counter"
    yield "}"
    if settings.direct:
        yield from _direct()
    yield "chain in_ipsec { fib daddr type local goto steer; }"
    yield f"chain in_udp {{ udp dport {ports(settings)} fib daddr type local jump steer_udp; }}"
    yield "chain in_icmp {"
    yield "  fib daddr type local jump too_big"
    yield "  jump neighbours"
    yield "}"
    yield "chain prerouting {"
    yield "  type filter hook prerouting priority -250; policy accept;"
    yield "  iifname vmap @entrances"
    yield f"  {hooks.BY_PROTOCOL}"
    if settings.loopback:
        yield f'  iif "lo" {settings.done} accept'
    yield from hooks.policies("in")
    yield "}"


def _direct() -> Iterator[str]:
    """Drops what the filter of the rings takes (:func:`ipsecq.datapath.ring.taken`), before fragments are put together."""
    ours = "meta iiftype ether fib daddr type local drop"
    yield "chain direct {"
    yield "  type filter hook prerouting priority -450; policy accept;"
    yield "  meta l4proto != esp accept"
    yield f"  ip frag-off & 0x3fff == 0 ip length <= {DIRECT_OCTETS} {ours}"
    yield f"  ip6 nexthdr esp ip6 length <= {DIRECT_OCTETS - 40} {ours}"
    yield "}"


def _postrouting(settings: NetfilterSettings) -> Iterator[str]:
    yield "chain postrouting {"
    yield "  type filter hook postrouting priority 150; policy accept;"
    yield f"  {settings.done} accept"
    yield "  oifname vmap @exits"
    yield "  meta l4proto icmpv6 jump neighbours"
    yield from hooks.policies("out")
    yield "}"


def _output(settings: NetfilterSettings) -> Iterator[str]:
    """What our sockets send comes from the NAT-T port, which belongs to IKE: so says every hook behind this one."""
    ports = ", ".join(map(str, settings.udp_ports))
    yield "chain output {"
    yield "  type filter hook output priority -250; policy accept;"
    yield f"  meta l4proto udp {settings.done} udp sport {{ {ports} }} udp sport set {settings.natt_ports[0]}"
    yield "}"


def defaults(settings: NetfilterSettings, sysctl: Sysctl) -> Iterator[str]:
    """Commands that make the chains of ``def_policy`` say what the knobs say."""
    table = settings.table
    families: tuple[tuple[str, FamilyKnobs], ...] = (("ipv4", sysctl.v4), ("ipv6", sysctl.v6))
    for side in ("in", "out"):
        yield f"flush chain inet {table} default_{side}"
        for family, knobs in families:
            if knobs.def_policy == 0:
                if side == "in":
                    yield f"add rule inet {table} default_in meta nfproto {family} jump exempt_in"
                drop = f"counter name {side}_default_dropped drop"
                yield f"add rule inet {table} default_{side} meta nfproto {family} {drop}"


def ports(settings: NetfilterSettings) -> str:
    """The UDP ports that carry ESP, as an nft set."""
    return f"{{ {', '.join(map(str, settings.natt_ports))} }}"
