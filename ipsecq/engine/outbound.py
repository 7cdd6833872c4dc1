"""A packet's way out: SPD, SA bundle, size, transforms.

:meth:`Outbound.process` is called for each packet that nftables diverts at POSTROUTING.  In the order in which a packet
meets them: header checks, the flow cache, on a miss the SPD and the SAD (:meth:`Outbound._decide`), the path MTU (what
would be too long goes to :mod:`ipsecq.engine.oversize`), the transforms innermost first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ipsecq.counters import FIRST_DROP, Counter, Fate
from ipsecq.engine.bundle import Bundle, PaddedBundle
from ipsecq.engine.choice import flow_number, share, sharers
from ipsecq.engine.emit import Acquire, Burst, Emissions
from ipsecq.engine.outbound_sa import make_step
from ipsecq.engine.outbound_step import OutboundStep
from ipsecq.engine.oversize import Oversize, SourceFor
from ipsecq.engine.tables import Pool, Tables
from ipsecq.engine.tap import Tap
from ipsecq.numbers import IPPROTO_TCP, Action, Direction, Level, Mode, Protocol
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.policy.interface import Interface
from ipsecq.policy.levels import resolve_level
from ipsecq.policy.model import Policy, Transform
from ipsecq.sa.association import SaKey
from ipsecq.sysctl import FamilyKnobs

MAX_FLOWS: Final = 65536
"""Entries of the flow cache; when it is full it is emptied, which costs each live flow one SPD look-up."""

MAX_ACQUIRES: Final = 4096
"""Pairs whose last ACQUIRE is remembered for rate limiting."""

_OUT: Final = int(Direction.OUT)

_PASS: Final = int(Fate.PASS)
_DONE: Final = int(Fate.DONE)
_HOLD: Final = int(Fate.HOLD)

_OUT_PACKETS: Final = int(Counter.OUT_PACKETS)
_OUT_BYTES: Final = int(Counter.OUT_BYTES)
_FLOW_HIT: Final = int(Counter.FLOW_HIT)
_FLOW_MISS: Final = int(Counter.FLOW_MISS)

_DISABLED: Final = {
    Protocol.ESP: ("esp_enable", Counter.ESP_PDROPS),
    Protocol.AH: ("ah_enable", Counter.AH_PDROPS),
    Protocol.IPCOMP: ("ipcomp_enable", Counter.IPCOMP_PDROPS),
}

MtuOf = Callable[[bytes], int]
"""``mtu_of(dst) -> octets``: the path MTU towards a packed address."""

OnDrop = Callable[[str, Buffer, int], None]
"""``on_drop(way, packet, reason)`` hears of each dropped packet: ``in`` or ``out``, and the Counter.

Of segments that drop it hears once, with their super-packet."""
Flow = tuple[bytes, bytes, int, int, int, bool, int]
"""Addresses, protocol, ports, whether it is a fragment, mark of the socket's policy."""


class Outbound:
    """One worker's outbound side.  ``mtu_of`` and ``source_for`` are the only questions to the world outside."""

    def __init__(self, tables: Tables, mtu_of: MtuOf, source_for: SourceFor) -> None:
        self._tables = tables
        self._mtu_of = mtu_of
        self._counters = tables.counters
        self._pool = Pool(tables.random)
        self._view = PacketView()
        self._flows: dict[Flow, Bundle | int] = {}
        self._interface: Interface | None = None
        self._caches: dict[Interface | None, dict[Flow, Bundle | int]] = {None: self._flows}
        self._steps: dict[tuple[SaKey, bool], OutboundStep] = {}
        self._bundles: dict[OutboundStep, Bundle] = {}
        """The newest one with this innermost step."""
        self._generation = tables.generation()
        self._acquired: dict[Acquire, tuple[float, int]] = {}
        self._oversize = Oversize(tables, source_for)
        self._tap: Tap | None = None
        self._shown: dict[OutboundStep, OutboundStep] = {}
        """Steps and what watches them: one for all flows."""
        self.on_drop: OnDrop | None = None

    def watch(self, tap: Tap | None) -> None:
        """Show packets to ``tap``, from the next one on; None: to nobody."""
        self._tap = tap
        self._clear_flows()

    def through(self, interface: Interface | None) -> None:
        """What comes next was routed into ``interface``, whose policy decides about it; None: the SPD does, again."""
        self._interface = interface
        self._flows = self._caches.setdefault(interface, {})

    def forget_interface(self, interface: Interface) -> None:
        """It has gone, or has changed into another one."""
        self._caches.pop(interface, None)

    def _clear_flows(self) -> None:
        for flows in self._caches.values():
            flows.clear()
        self._bundles.clear()
        self._shown.clear()

    def process(self, packet: Buffer, now: float, emit: Emissions, mark: int = 0) -> int:
        """The fate of one whole IP datagram: a :class:`Fate`, or the Counter of the drop (counted here).

        ``mark`` is that of the sending socket's policy (:class:`ipsecq.policy.sockets.SocketPolicy`), 0 for none.
        ``DONE``: ``emit.wire`` holds what replaces it.  ``HOLD``: it waits for ``emit.held``.  Drops may put an ICMP
        error into ``emit.wire``.  Raises nothing, whatever the octets.
        """
        counters = self._counters
        view = self._view
        if not view.load(packet):
            counters[Counter.IP_MALFORMED] += 1
            return Counter.IP_MALFORMED
        counters[_OUT_PACKETS] += 1
        counters[_OUT_BYTES] += view.length
        if self._generation != self._tables.generation():
            self._forget()
        # Fragments have no ports, the first one neither: all pieces of a datagram get one policy (BSD).
        fragment = view.fragment_word & 0x3FFF != 0
        flow = (view.src, view.dst, view.protocol, view.sport, view.dport, fragment, mark)
        decision = self._flows.get(flow)
        if decision is None:
            counters[_FLOW_MISS] += 1
            decision = self._decide(flow, now, emit)
        else:
            counters[_FLOW_HIT] += 1
        fate = decision if isinstance(decision, int) else self._send(decision, packet, view, now, emit)
        if fate >= FIRST_DROP:
            counters[fate] += 1
            if self.on_drop is not None:
                self.on_drop("out", packet, fate)
        elif fate == _PASS:
            counters[Counter.OUT_PASSED] += 1
        return fate

    def settled(self, mark: int) -> Bundle | None:
        """What protects the flow of the packet that was looked at last, if that is decided."""
        view = self._view
        fragment = view.fragment_word & 0x3FFF != 0
        decision = self._flows.get((view.src, view.dst, view.protocol, view.sport, view.dport, fragment, mark))
        return decision if isinstance(decision, Bundle) else None

    @property
    def view(self) -> PacketView:
        """The headers of that packet."""
        return self._view

    def process_super(self, packet: Buffer, size: int, now: float, emit: Emissions, mark: int = 0) -> int:
        """The fate of a TCP super-packet whose segments have ``size`` octets of data: one decision for all of them.

        ``PASS`` leaves it whole.  -1: not decided and nothing counted, its segments must come one by one; so it is
        where they would be too long for the tunnel (each sender's packet has its own answer), or wait for an SA.
        """
        view = self._view
        if not view.load(packet) or view.protocol != IPPROTO_TCP or view.length < view.offset + 20:
            return -1
        if self._generation != self._tables.generation():
            self._forget()
        decision = self._flows.get((view.src, view.dst, view.protocol, view.sport, view.dport, False, mark))
        if decision is None:
            return -1
        counters = self._counters
        header = view.offset + (packet[view.offset + 12] >> 4 << 2)
        data = view.length - header
        if data <= size:
            return -1
        count = -(-data // size)
        dropped = count
        if isinstance(decision, int):
            fate = decision
        else:
            if decision.sealed_length(header + size, view.header_length) > self._mtu_of(decision.dst):
                return -1
            finished, reason = decision.apply_run(packet, view, size, now, emit)
            self._collect(finished, emit)
            fate = reason or _DONE
            dropped -= len(finished)
        counters[_OUT_PACKETS] += count
        counters[_OUT_BYTES] += view.length + (count - 1) * header
        counters[_FLOW_HIT] += count
        if fate >= FIRST_DROP:
            counters[fate] += dropped
            if self.on_drop is not None:
                self.on_drop("out", packet, fate)
            if dropped < count:
                fate = _DONE
        elif fate == _PASS:
            counters[Counter.OUT_PASSED] += count
        return fate

    @staticmethod
    def _collect(finished: list[bytes] | list[Burst], emit: Emissions) -> None:
        for each in finished:
            if isinstance(each, bytes):
                emit.wire.append(each)
            else:
                emit.bursts.append((len(emit.wire), each))

    # -- the decision: once a flow ---------------------------------------------------------------------

    def _forget(self) -> None:
        """An SA, a policy or a knob has changed: drop what was derived from the old ones.

        Steps of SAs that are still the same object stay, and with them the rest of their sequence lease.  A changed
        knob shows in outer headers, so then they go too.
        """
        generation = self._tables.generation()
        self._clear_flows()
        if generation[2] != self._generation[2]:
            self._steps.clear()
        else:
            get = self._tables.sad.inbound
            self._steps = {key: step for key, step in self._steps.items() if get(key[0]) is step.sa}
        self._generation = generation

    def _decide(self, flow: Flow, now: float, emit: Emissions) -> Bundle | int:
        """What happens to a flow; remembered unless it waits for an SA."""
        src, dst, protocol, sport, dport, fragment, mark = flow
        knobs = self._tables.sysctl.v4 if len(src) == 4 else self._tables.sysctl.v6
        if self._interface is not None:
            policy: Policy | None = self._interface.policy(4 if len(src) == 4 else 6)
        elif mark:
            policy = self._tables.spd.lookup_socket(mark, _OUT, src, dst, protocol, sport, dport, fragment)
        else:
            policy = self._tables.spd.lookup(_OUT, src, dst, protocol, sport, dport, fragment)
        decision: Bundle | int
        wanted: list[Acquire] = []
        if policy is None:
            decision = Counter.OUT_DISCARD if knobs.def_policy == 0 else _PASS
        elif policy.action is Action.IPSEC:
            decision, wanted = self._bundle(policy, flow, knobs)
        else:
            decision = Counter.OUT_DISCARD if policy.action is Action.DISCARD else _PASS
        if wanted:
            for acquire in wanted:
                self._acquire(acquire, now, emit)
            return decision
        if len(self._flows) >= MAX_FLOWS:
            self._flows.clear()
        self._flows[flow] = decision
        return decision

    def _bundle(self, policy: Policy, flow: Flow, knobs: FamilyKnobs) -> tuple[Bundle | int, list[Acquire]]:
        """The steps of ``policy`` for a flow, and the SAs that are missing.

        A packet that is held waits for the last one of these.  ``knobs`` are those of the policy's family, whatever the
        family of its tunnels: inbound, and in the kernel's rules, a level means the same.
        """
        tables = self._tables
        src, dst = flow[:2]
        number = flow_number(*flow[:6]) if tables.parallel_sas else 0
        steps: list[OutboundStep] = []
        wanted: list[Acquire] = []
        for transform in policy.transforms:
            enabled, disabled = _DISABLED[transform.protocol]
            if not getattr(knobs, enabled):
                return disabled, []
            tunnel = transform.mode is Mode.TUNNEL
            near = transform.src or src
            far = transform.dst or dst
            sa = share(sharers(tables, transform, near, far), number)
            if sa is None:
                wanted.append(self._wanted(policy, transform, near, far))
                if resolve_level(transform, knobs) is not Level.USE:
                    return _HOLD, wanted
                continue
            key = (sa.key, tunnel)
            step = self._steps.get(key)
            if step is None or step.sa is not sa:
                step = self._steps[key] = make_step(sa, tables, self._pool, tunnel)
            if self._tap is not None:
                step = self._shown.get(step) or self._shown.setdefault(step, self._tap.outbound(step))
            steps.append(step)
            if tunnel:
                src, dst = near, far
        return (self._bundle_of(tuple(steps), dst) if steps else _PASS), wanted

    def _bundle_of(self, steps: tuple[OutboundStep, ...], dst: bytes) -> Bundle:
        """One bundle for all flows that take the same way one after the other: many flows, little memory."""
        bundle = self._bundles.get(steps[0])
        if bundle is None or bundle.dst != dst or bundle.steps != steps:
            if any(step.padding is not None for step in steps):
                bundle = PaddedBundle(steps, dst, self._counters, self._mtu_of)
            else:
                bundle = Bundle(steps, dst, self._counters)
            self._bundles[steps[0]] = bundle
        return bundle

    @staticmethod
    def _wanted(policy: Policy, transform: Transform, near: bytes, far: bytes) -> Acquire:
        return Acquire(int(transform.protocol), int(transform.mode), near, far, transform.reqid, policy.id)

    def _acquire(self, wanted: Acquire, now: float, emit: Emissions) -> None:
        """Ask for an SA, at most every ``blockacq_count``-th packet or ``blockacq_lifetime`` seconds (net.key)."""
        emit.held = wanted
        key = self._tables.sysctl.key
        asked, packets = self._acquired.get(wanted, (0.0, 0))
        if packets and packets <= key.blockacq_count and now - asked < key.blockacq_lifetime:
            self._acquired[wanted] = (asked, packets + 1)
            return
        if len(self._acquired) >= MAX_ACQUIRES:
            self._acquired.clear()
        self._acquired[wanted] = (now, 1)
        self._counters[Counter.OUT_ACQUIRE] += 1
        emit.events.append(wanted)

    # -- the packet ------------------------------------------------------------------------------------

    def _send(self, bundle: Bundle, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> int:
        """Apply ``bundle``; deal with sizes on both sides of it."""
        mtu = self._mtu_of(bundle.dst)
        header = view.header_length
        length = bundle.sealed_length(view.length, header)
        if length > mtu:
            return self._oversize.send(bundle, packet, view, now, emit, mtu, length)
        if view.fragment_word & 0x3FFF and not bundle.first.tunnel:
            return Counter.IP_FRAGMENT  # RFC 4303 section 3.1.1: transport mode takes whole datagrams only
        result = bundle.apply(packet, view, now, emit)
        if isinstance(result, int):
            return result
        emit.wire.append(result)
        return _DONE
