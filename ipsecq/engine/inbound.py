"""A packet's way in: SAD, replay window, authentication, history, and at the end the inbound SPD.

:meth:`Inbound.process` is called for each packet that nftables diverts at PREROUTING.  It opens one header after the
other for as long as there is one that is ours, keeps the history of what it opened, and hands the innermost packet over
if its policy agrees with that history.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from ipsecq.counters import FIRST_DROP, Counter, Fate
from ipsecq.engine import history
from ipsecq.engine.emit import Emissions
from ipsecq.engine.headers import ECN_NOCARE, decapsulated_ecn, opened_header, with_tos
from ipsecq.engine.history import Applied, History
from ipsecq.engine.inbound_sa import InboundSa, make_inbound
from ipsecq.engine.pmtu import PathMtuCheck
from ipsecq.engine.tables import Tables
from ipsecq.engine.tap import Tap, plain
from ipsecq.numbers import (
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_IPV4,
    IPPROTO_IPV6,
    IPPROTO_NONE,
    IPPROTO_TCP,
    IPPROTO_UDP,
    Action,
    Direction,
    Mode,
    Protocol,
)
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.fragments import Reassembler, strip_fragment_header
from ipsecq.packet.view import PacketView
from ipsecq.policy.model import Policy, Selector
from ipsecq.sa.association import NatTraversal, SecurityAssociation
from ipsecq.transforms import natt

MAX_DEPTH: Final = 16
"""Headers that one packet may have opened: four transforms a policy, nested tunnels, and room to spare."""

MAX_FLOWS: Final = 65536

SOCKET_SECONDS: Final = 1.0
"""For how long a flow is believed to belong to the same socket.  A new policy of a socket counts at once."""
_NEVER: Final = float("inf")

_SOCKETS: Final = frozenset((IPPROTO_TCP, IPPROTO_UDP))
_UNSURE: Final = Policy(Direction.IN, Selector(b"", b"", b"", b""), Action.DISCARD, label="no answer about its socket")
_FREE: Final = Policy(Direction.IN, Selector(b"", b"", b"", b""), Action.NONE, label="no policy of its socket")
_IN: Final = int(Direction.IN)
_ESP: Final = int(Protocol.ESP)
_AH: Final = int(Protocol.AH)
_IPCOMP: Final = int(Protocol.IPCOMP)
_TUNNEL: Final = int(Mode.TUNNEL)
_DONE: Final = int(Fate.DONE)
_PASS: Final = int(Fate.PASS)
_ABSORBED: Final = int(Fate.ABSORBED)
_HOLD: Final = int(Fate.HOLD)
_IN_PACKETS: Final = int(Counter.IN_PACKETS)
_IN_BYTES: Final = int(Counter.IN_BYTES)
_IN_DELIVERED: Final = int(Counter.IN_DELIVERED)
_NOT_ITS_SA: Final = int(Counter.IN_INTERFACE)

_u32: Final = Struct(">I").unpack_from

_HDROPS: Final = {_ESP: Counter.ESP_HDROPS, _AH: Counter.AH_HDROPS, _IPCOMP: Counter.IPCOMP_HDROPS}
_NOTDB: Final = {_ESP: Counter.ESP_NOTDB, _AH: Counter.AH_NOTDB, _IPCOMP: Counter.IPCOMP_NOTDB}
_INVALID: Final = {_ESP: Counter.ESP_INVALID, _AH: Counter.AH_INVALID, _IPCOMP: Counter.IPCOMP_INVALID}
_PDROPS: Final = {
    _ESP: ("esp_enable", Counter.ESP_PDROPS),
    _AH: ("ah_enable", Counter.AH_PDROPS),
    _IPCOMP: ("ipcomp_enable", Counter.IPCOMP_PDROPS),
}


class Inbound:
    """One worker's inbound side.

    ``reassembler`` puts fragmented outer datagrams together where nobody below has done so (the pcap tool; on a gateway
    the kernel has).  Without one they are dropped.
    """

    def __init__(self, tables: Tables, reassembler: Reassembler | None = None) -> None:
        self._tables = tables
        self._counters = tables.counters
        self._reassembler = reassembler
        self._view = PacketView()
        self._sas: dict[tuple[bytes, int, int], InboundSa] = {}
        self._verdicts: dict[tuple[bytes, bytes, int, int, int, bool, History], int] = {}
        self._generation = tables.generation()
        self._verdicts_end = _NEVER
        """When verdicts that depend on sockets must be asked for again."""
        self._disabled: dict[tuple[int, int], int] = {}
        self._check_enabled()
        self._pmtu = PathMtuCheck(tables)
        self._tap: Tap | None = None
        self.on_drop: Callable[[str, Buffer, int], None] | None = None
        """``on_drop(way, packet, reason)`` hears of each dropped packet, as it was before anything was opened."""

    def watch(self, tap: Tap | None) -> None:
        """Show packets to ``tap``, from the next one on; None: to nobody."""
        self._tap = tap
        for key, ready in self._sas.items():
            self._sas[key] = plain(ready) if tap is None else tap.inbound(plain(ready))

    def process(self, packet: Buffer, now: float, emit: Emissions) -> int:
        """The fate of one datagram addressed to us: a :class:`Fate`, or the Counter of the drop (counted here).

        ``HOLD``: the peer uses an SA that key management is about to make here (``emit.held``).
        ``DONE``: ``emit.inner`` holds the opened packet.  ``PASS``: it was nothing for us and policy lets it in as it is.
        Raises nothing, whatever the octets.
        """
        fate = self._open_all(packet, now, emit)
        if fate >= FIRST_DROP:
            self._counters[fate] += 1
            if self.on_drop is not None:
                self.on_drop("in", packet, fate)
        return fate

    def _check_enabled(self) -> None:
        """Which protocols the knobs forbid: (IP version, protocol) to the drop's Counter.  Usually empty."""
        families = ((4, self._tables.sysctl.v4), (6, self._tables.sysctl.v6))
        self._disabled = {
            (version, protocol): int(counter)
            for version, knobs in families
            for protocol, (name, counter) in _PDROPS.items()
            if not getattr(knobs, name)
        }

    def _forget(self) -> None:
        """An SA, a policy or a knob has changed: drop what was derived from the old ones."""
        generation = self._tables.generation()
        self._verdicts.clear()
        self._verdicts_end = _NEVER
        self._check_enabled()
        if generation[2] != self._generation[2]:
            self._sas.clear()
        else:
            get = self._tables.sad.inbound
            self._sas = {key: ready for key, ready in self._sas.items() if get(key) is ready.sa}
        self._generation = generation

    def _compressed_tunnel(self, src: bytes, dst: bytes) -> SecurityAssociation | None:
        """The IPComp tunnel between two addresses: what it could not compress arrives as plain IP in IP (RFC 3173)."""
        return self._tables.sad.outbound(_IPCOMP, _TUNNEL, src, dst)

    # -- header after header ---------------------------------------------------------------------------

    def _open_all(self, packet: Buffer, now: float, emit: Emissions) -> int:
        view = self._view
        counters = self._counters
        if not view.load(packet):
            return Counter.IP_MALFORMED
        counters[_IN_PACKETS] += 1
        counters[_IN_BYTES] += view.length
        tables = self._tables
        seen = self._generation
        # Three comparisons in place of a call and a tuple for each packet.
        if tables.sad.generation != seen[0] or tables.spd.generation != seen[1] or tables.sysctl.generation != seen[2]:
            self._forget()
        if view.fragment_word & 0x3FFF:
            if self._reassembler is None:
                return Counter.IP_FRAGMENT
            whole = self._reassembler.add(packet, now)
            if whole is None:
                return _ABSORBED
            packet = whole
            if not view.load(packet):
                return Counter.IP_MALFORMED
        return self._chain(packet, (), now, emit)

    def _chain(self, packet: Buffer, opened: History, now: float, emit: Emissions) -> int:
        """The fate of a packet that the view has loaded: every header of ours opened, then policy.

        ``opened`` is what has been opened around it.
        """
        view, counters, tables = self._view, self._counters, self._tables
        fresh = bool(opened)  # the packet came out of a tunnel: what is inside needs no SA of ours
        natted: NatTraversal | None = None  # of an SA that was opened behind this IP header
        for _ in range(MAX_DEPTH - len(opened)):
            protocol = view.protocol
            if protocol == _ESP:
                offset, encapsulated = view.offset, 0
            elif protocol == IPPROTO_UDP:
                offset = natt.esp_offset(packet, view, tables.natt_ports)
                if not offset:
                    break
                if offset < 0:
                    counters[Counter.NATT_KEEPALIVE] += 1
                    return _ABSORBED
                protocol, encapsulated = _ESP, view.sport
            elif protocol in {_AH, _IPCOMP}:
                offset, encapsulated = view.offset, 0
            elif protocol in {IPPROTO_IPV4, IPPROTO_IPV6} and (
                plain := self._compressed_tunnel(view.src, view.dst)
            ):
                opened = (
                    *opened, Applied(Protocol.IPCOMP, Mode.TUNNEL, plain.src, plain.dst, plain.reqid, plain.spi)
                )  # fmt: skip
                packet = bytes(memoryview(packet)[view.offset : view.length])
                fate = self._enter_tunnel(packet, view.version, view.tos, Counter.IPCOMP_INVALID)
                if isinstance(fate, int):
                    return fate
                packet, fresh, natted = fate, True, None
                continue
            else:
                break
            end = view.length
            spi = spi_of(packet, protocol, offset, end)
            if spi < 0:
                return _HDROPS[protocol]
            ready = self._sas.get((view.dst, protocol, spi)) or self._ready((view.dst, protocol, spi))
            if ready is None:
                if fresh:
                    break  # somebody else's packet, that came through our tunnel
                if not opened and (view.dst, protocol, spi) in tables.larval and not view.fragment_word & 0x3FFF:
                    emit.held = (view.dst, protocol, spi)
                    return _HOLD
                return _NOTDB[protocol]
            if self._disabled and (disabled := self._disabled.get((view.version, protocol))):
                return disabled
            if view.fragment_header and not view.fragment_word & 0x3FFF:
                # Atomic (RFC 6946): as if it had been reassembled, which comes before AH and ESP.
                packet = strip_fragment_header(packet, view)
                view.load(packet)
                offset -= 8
            reason, next_header, payload = ready.open(packet, view, offset, encapsulated, now, emit)
            if reason:
                return reason
            if next_header == IPPROTO_NONE:
                counters[Counter.ESP_DUMMY] += 1
                return _ABSORBED
            tunnel = ready.is_tunnel(next_header)
            applied = ready.as_tunnel if tunnel else ready.as_transport
            opened = opened + applied if opened else applied
            if tunnel:
                fate = self._enter_tunnel(payload, view.version, view.tos, _INVALID[protocol])
                if isinstance(fate, int):
                    return fate
                packet, fresh, natted = fate, True, None
                continue
            natted = ready.sa.natt or natted
            header = opened_header(packet, view, next_header, len(payload))
            packet = header + payload if header else b""
            if not view.load(packet):
                return _INVALID[protocol]
        else:
            return Counter.IN_TOODEEP
        if natted is not None:
            knobs = tables.sysctl.v4 if view.version == 4 else tables.sysctl.v6
            packet = natt.fix_checksum(packet, view, natted, knobs.natt_cksum_policy)
        return self._enter(packet, opened, now, emit)

    def _ready(self, key: tuple[bytes, int, int]) -> InboundSa | None:
        """The SA for ``key``, its keys made ready; None when there is none."""
        sa = self._tables.sad.inbound(key)
        if sa is None:
            return None
        ready = make_inbound(sa, self._tables)
        if self._tap is not None:
            ready = self._tap.inbound(ready)
        self._sas[key] = ready
        return ready

    def _enter_tunnel(self, inner: bytes, version: int, outer_tos: int, invalid: Counter) -> bytes | int:
        """Load the packet that came out of a tunnel of IP ``version``; carry the outer ECN field over (RFC 6040).

        The knob ``ecn`` is that of the tunnel's family, as on the way out.
        """
        view = self._view
        if not view.load(inner):
            return invalid
        if view.length != len(inner):
            inner = inner[: view.length]  # TFC padding (RFC 4303 section 2.7)
        outer = outer_tos & 3
        if outer and (self._tables.sysctl.v4 if version == 4 else self._tables.sysctl.v6).ecn != ECN_NOCARE:
            ecn = decapsulated_ecn(view.tos & 3, outer)
            if ecn < 0:
                return Counter.IN_INVAL
            if ecn != view.tos & 3:
                inner = with_tos(inner, view.tos & 0xFC | ecn)
                view.load(inner)
        return inner

    def ready(self, key: tuple[bytes, int, int]) -> InboundSa | None:
        """The SA by destination, protocol and SPI, if it has opened something and no knob forbids its protocol."""
        version = 4 if len(key[0]) == 4 else 6
        return self._sas.get(key) if (version, key[1]) not in self._disabled else None

    def knows(self, key: tuple[bytes, int, int]) -> bool:
        """Whether there is an SA by destination, protocol and SPI, or key management is about to make one."""
        return key in self._sas or key in self._tables.larval or self._ready(key) is not None

    def admits(self, flow: tuple[bytes, bytes, int, int, int], opened: History) -> int | None:
        """Where packets of ``flow`` with this history enter, as far as is known: an interface's reqid, 0: from none.

        None: they do not, or not for good (a socket's policy holds as long as the socket), or nobody has asked yet.
        """
        if self._tables.spd.inbound_sockets:
            return None
        home = self._home(opened)
        if home < 0:
            return opened[-1].reqid
        return 0 if not home and self._verdicts.get((*flow, False, opened)) == 0 else None

    # -- policy ----------------------------------------------------------------------------------------

    def _enter(self, packet: Buffer, opened: History, now: float, emit: Emissions) -> int:
        """Hold the innermost packet, which the view has loaded, against the inbound SPD; deliver it."""
        view = self._view
        if not opened and view.protocol in {IPPROTO_ICMP, IPPROTO_ICMPV6} and self._pmtu.is_about_us(packet, view, emit):
            return _ABSORBED
        home = self._home(opened)
        verdict = home if home > 0 else self._verdict(opened, now, home)
        if verdict:
            return verdict
        if not opened:
            return _PASS
        self._counters[_IN_DELIVERED] += 1
        into = emit.into(opened[-1].reqid) if home else emit
        into.inner.append(packet if isinstance(packet, bytes) else bytes(packet))
        return _DONE

    def _home(self, opened: History) -> int:
        """-1 when a packet with this history enters from an interface; 0: from none; else the Counter of the drop.

        The innermost SA counts.  An interface's policy is that its SAs, and no others, have opened the packet.
        """
        interfaces = self._tables.interfaces
        if not interfaces or not opened:
            return 0
        last = opened[-1]
        interface = interfaces.get(last.reqid)
        if interface is None:
            return 0
        return -1 if interface.owns(last.protocol, last.mode, last.src, last.dst) else _NOT_ITS_SA

    def _verdict(self, opened: History, now: float, home: int) -> int:
        """0 when the packet that the view has loaded may enter with this history, else the Counter of the drop.

        The SPD has no say about what enters from an interface (``home``), its socket's own policy has.
        """
        if home and not self._tables.spd.inbound_sockets:
            return 0
        view = self._view
        fragment = view.fragment_word & 0x3FFF != 0  # the first one too: fragments have no ports
        key = (view.src, view.dst, view.protocol, view.sport, view.dport, fragment, opened)
        if now >= self._verdicts_end:
            self._verdicts.clear()
            self._verdicts_end = _NEVER
        verdict = self._verdicts.get(key)
        if verdict is None:
            knobs = self._tables.sysctl.v4 if view.version == 4 else self._tables.sysctl.v6
            policy = self._policy(view, fragment, now, home)
            verdict = history.check(policy, opened, knobs, view.src, view.dst)
            if len(self._verdicts) >= MAX_FLOWS:
                self._verdicts.clear()
            self._verdicts[key] = verdict
        return verdict

    def _policy(self, view: PacketView, fragment: bool, now: float, home: int) -> Policy | None:
        """The inbound policy for the packet in the view: its socket's, when there are sockets with policies, or the SPD's.

        Which socket a flow belongs to can change without a word, so verdicts then live for a second only.
        """
        tables = self._tables
        flow = view.src, view.dst, view.protocol, view.sport, view.dport
        if tables.spd.inbound_sockets and tables.socket_of is not None and not fragment and view.protocol in _SOCKETS:
            self._verdicts_end = min(self._verdicts_end, now + SOCKET_SECONDS)
            mark = tables.socket_of(*flow)
            if mark < 0:
                return _UNSURE
            if mark and home:
                socket = tables.spd.sockets.get(mark)
                return (socket.policy(_IN, view.version) if socket is not None else None) or _FREE
            if mark:
                return tables.spd.lookup_socket(mark, _IN, *flow, fragment)
        return _FREE if home else tables.spd.lookup(_IN, *flow, fragment)


def spi_of(packet: Buffer, protocol: int, offset: int, end: int) -> int:
    """The SPI (IPComp: the CPI) of the header at ``offset``; -1 when the packet ends before it."""
    if protocol == _ESP:
        return int(_u32(packet, offset)[0]) if end - offset >= 8 else -1
    if protocol == _AH:
        return int.from_bytes(packet[offset + 4 : offset + 8], "big") if end - offset >= 12 else -1
    return int.from_bytes(packet[offset + 2 : offset + 4], "big") if end - offset >= 4 else -1
