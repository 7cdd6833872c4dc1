"""The four views of enc(4): inner packets before and after the outer header, both ways, for whoever watches.

A watched SA is wrapped: the flow cache and the table of inbound SAs then hold the wrapper in place of the SA's own
step.  So nothing is asked for each packet while nobody watches, and nothing about the SAs that nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final, Protocol

from ipsecq.crypto import registry
from ipsecq.engine.emit import Burst, Emissions
from ipsecq.engine.headers import opened_header
from ipsecq.engine.history import History
from ipsecq.engine.inbound_sa import InboundSa, Opened
from ipsecq.engine.outbound_step import OutboundStep
from ipsecq.numbers import IP_MAXPACKET, IPPROTO_IPV4, IPPROTO_IPV6, IPPROTO_NONE
from ipsecq.numbers import Protocol as IpsecProtocol
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import SaKey, SecurityAssociation
from ipsecq.sysctl import Sysctl
from ipsecq.transforms.esp import Group

BEFORE: Final = 1
"""In: decrypted, the outer header still on.  Out: in clear.  The bit of the masks of enc(4)."""
AFTER: Final = 2
"""In: the outer header off.  Out: encapsulated, not yet encrypted."""
OUT: Final = 4
"""Added to a view: the packet leaves."""

CONFIDENTIAL: Final = 0x400
"""Flag of the enc header: the SA encrypts (M_CONF)."""
AUTHENTIC: Final = 0x800
"""Flag of the enc header: the SA authenticates (M_AUTH)."""

FAMILIES: Final = {4: 2, 6: 24}
"""IP version to the number in the enc header, AF_INET and AF_INET6 as OpenBSD, where enc(4) is from, has them: Linux's
own 10 is no address family to those who read captures."""

_FAMILY: Final = Struct("=I")
_SPI: Final = Struct(">I")


class Watcher(Protocol):
    """Somebody who wants packets."""

    ways: tuple[int, int]
    """The views wanted of inbound and of outbound packets: sums of :data:`BEFORE` and :data:`AFTER`."""
    spis: frozenset[int]
    """SAs that are wanted; empty: all."""

    def take(self) -> bool:
        """Room for one more?  False counts a drop."""

    def drop(self, count: int) -> None:
        """So many more that are not shown."""

    def record(self, kind: int, enc: bytes, front: bytes, body: Buffer) -> None:
        """A packet, ``front`` and ``body`` in one; copied before this returns.

        ``kind`` is a view, plus :data:`OUT`; ``enc`` the 12 octets of the enc header.  Comes after a ``take`` only.
        """


class Tap:
    """Wraps what ``watchers`` want, under the masks ``net.enc.*.ipsec_bpf_mask``.  A change of either asks for new wraps."""

    def __init__(self, watchers: Sequence[Watcher], sysctl: Sysctl) -> None:
        self._watchers = watchers
        self._sysctl = sysctl
        self._wraps: dict[tuple[SaKey, bool], _Step | _Ready] = {}
        self.quiet = False
        """No watcher has room: packets are only counted, until :meth:`wake`."""

    def outbound(self, step: OutboundStep) -> OutboundStep:
        """``step``, or what watches it."""
        views = self._views(1, step.sa.spi, self._sysctl.enc.out_bpf_mask)
        if not any(views):
            return step
        wrap = self._wraps[step.sa.key, step.tunnel] = _Step(self, step, *views)
        return wrap

    def inbound(self, ready: InboundSa) -> InboundSa:
        """``ready``, or what watches it."""
        views = self._views(0, ready.sa.spi, self._sysctl.enc.in_bpf_mask)
        if not any(views):
            return ready
        wrap = self._wraps[ready.sa.key, False] = _Ready(self, ready, *views)
        return wrap

    def tell(self) -> None:
        """Tell the watchers of what was only counted."""
        for wrap in self._wraps.values():
            if wrap.missed:
                for watcher in (*wrap.before, *wrap.after):
                    watcher.drop(wrap.missed)
                wrap.missed = 0

    def wake(self) -> None:
        """Some watcher has room again."""
        self.tell()
        self.quiet = False

    def _views(self, way: int, spi: int, mask: int) -> tuple[list[Watcher], list[Watcher]]:
        wanted = [watcher for watcher in self._watchers if not watcher.spis or spi in watcher.spis]
        return (
            [watcher for watcher in wanted if watcher.ways[way] & mask & BEFORE],
            [watcher for watcher in wanted if watcher.ways[way] & mask & AFTER],
        )


def plain(ready: InboundSa) -> InboundSa:
    """What :meth:`Tap.inbound` was given."""
    return ready.ready if isinstance(ready, _Ready) else ready


def enc_headers(sa: SecurityAssociation) -> dict[int, bytes]:
    """The enc header of packets of each IP version; family and flags in host order, the SPI in network order."""
    confidential = sa.protocol is IpsecProtocol.ESP and sa.encryption not in {None, "null", "aes-gmac"}
    combined = sa.encryption is not None and registry.encryption(sa.encryption).aead
    authentic = sa.protocol is not IpsecProtocol.IPCOMP and (combined or sa.authentication is not None)
    flags = (CONFIDENTIAL if confidential else 0) | (AUTHENTIC if authentic else 0)
    return {
        version: _FAMILY.pack(family) + _SPI.pack(sa.spi) + _FAMILY.pack(flags) for version, family in FAMILIES.items()
    }


def outer_header(datagram: bytes, inner: int, length: int) -> bytes:
    """The IP header of a finished tunnel datagram as it stands before the transform: around ``length`` octets of IP.

    ``inner`` is their IP version.  A super-packet may be too long for IPv4's length field, which then holds 0, as the
    kernel has it.
    """
    protocol = IPPROTO_IPV4 if inner == 4 else IPPROTO_IPV6
    if datagram[0] < 0x60:
        header = bytearray(datagram[:20])
        total = length + 20
        header[2:4] = (total if total <= IP_MAXPACKET else 0).to_bytes(2, "big")
        header[9] = protocol
        ipv4.fix_checksum(header)
    else:
        header = bytearray(datagram[:40])
        header[4:6] = length.to_bytes(2, "big")
        header[6] = protocol
    return bytes(header)


class _Step:
    """An outbound step that is watched."""

    __slots__ = (
        "_apply", "_apply_run", "_enc", "_tap", "after", "before", "missed", "padding", "sa", "sealed_length", "tunnel",
    )  # fmt: skip

    sealed_length: Callable[[int, int], int]

    def __init__(self, tap: Tap, step: OutboundStep, before: list[Watcher], after: list[Watcher]) -> None:
        self._tap = tap
        self._apply, self._apply_run = step.apply, step.apply_run
        self.before, self.after = before, after
        self.missed = 0
        self._enc = enc_headers(step.sa)
        self.sa, self.tunnel, self.sealed_length = step.sa, step.tunnel, step.sealed_length
        self.padding = step.padding

    def apply(self, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> bytes | int:
        """See :class:`OutboundStep`.  What is dropped is not shown: it never was under way."""
        result = self._apply(packet, view, now, emit)
        if self._tap.quiet:
            self.missed += 1
        elif not isinstance(result, int):
            self._show(packet, view, result)
        return result

    def apply_run(
        self, packet: Buffer, view: PacketView, size: int, now: float, emit: Emissions
    ) -> list[bytes] | list[Burst] | None:
        """See :class:`OutboundStep`.  A super-packet is shown as the one packet that the kernel handed over."""
        run = self._apply_run(packet, view, size, now, emit)
        if self._tap.quiet:
            self.missed += 1
        elif run:
            first = run[0]
            self._show(packet, view, first if isinstance(first, bytes) else first.datagrams()[0])
        return run

    def _show(self, packet: Buffer, view: PacketView, result: bytes) -> None:
        body = memoryview(packet)[: view.length]
        room = False
        for watcher in self.before:
            if watcher.take():
                room = True
                watcher.record(OUT | BEFORE, self._enc[view.version], b"", body)
        for watcher in self.after:
            if not watcher.take():
                continue
            room = True
            if self.tunnel:
                front, version = outer_header(result, view.version, view.length), 4 if result[0] < 0x60 else 6
            else:
                front, version = b"", view.version
            watcher.record(OUT | AFTER, self._enc[version], front, body)
        self._tap.quiet = not room


class _Ready:
    """An inbound SA that is watched."""

    __slots__ = (
        "_enc", "_open", "_open_run", "_tap", "after", "as_transport", "as_tunnel", "before", "is_tunnel", "missed",
        "ready", "sa",
    )  # fmt: skip

    as_tunnel: History
    as_transport: History
    is_tunnel: Callable[[int], bool]

    def __init__(self, tap: Tap, ready: InboundSa, before: list[Watcher], after: list[Watcher]) -> None:
        self._tap, self.ready = tap, ready
        self.before, self.after = before, after
        self.missed = 0
        self._enc = enc_headers(ready.sa)
        self._open, self._open_run = ready.open, ready.open_run
        self.sa, self.is_tunnel = ready.sa, ready.is_tunnel
        self.as_tunnel, self.as_transport = ready.as_tunnel, ready.as_transport

    def open(
        self, packet: Buffer, view: PacketView, offset: int, encapsulated: int, now: float, emit: Emissions
    ) -> Opened:
        """See :class:`InboundSa`.  What the policy refuses afterwards is shown: it did come out of the SA."""
        opened = self._open(packet, view, offset, encapsulated, now, emit)
        if self._tap.quiet:
            self.missed += not opened[0]
            return opened
        reason, next_header, payload = opened
        if not reason and next_header != IPPROTO_NONE:
            self._show(packet, view, next_header, payload)
        return opened

    def open_run(
        self, packets: list[Buffer], numbers: list[int], view: PacketView, offset: int, encapsulated: int, now: float,
        emit: Emissions,
    ) -> list[Group]:  # fmt: skip
        """See :class:`InboundSa`."""
        groups = self._open_run(packets, numbers, view, offset, encapsulated, now, emit)
        if self._tap.quiet:
            self.missed += sum([len(group.plaintexts) for group in groups])
        elif groups:
            enc = self._enc[view.version]
            shown = [self._show_run(watcher, groups, BEFORE, enc, view) for watcher in self.before]
            shown += [self._show_run(watcher, groups, AFTER, None, view) for watcher in self.after]
            self._tap.quiet = not any(shown)
        return groups

    def _show_run(self, watcher: Watcher, groups: list[Group], kind: int, enc: bytes | None, view: PacketView) -> bool:
        """Without ``enc`` the outer header is off.  False: there was no room for all, and what came last was not tried."""
        left = sum([len(group.plaintexts) for group in groups])
        for group in groups:
            name = enc or self._enc[6 if group.next_header == IPPROTO_IPV6 else 4]
            for plaintext in group.plaintexts:
                left -= 1
                if not watcher.take():
                    watcher.drop(left)
                    return False
                end = min(group.end, _length(plaintext))
                front = _outer(view, group.next_header, end) if enc is not None else b""
                watcher.record(kind, name, front, memoryview(plaintext)[:end])
        return True

    def _show(self, packet: Buffer, view: PacketView, next_header: int, payload: bytes) -> None:
        tunnel = self.is_tunnel(next_header)
        if tunnel:
            payload = payload[: _length(payload)]
        room = False
        for watcher in self.before:
            if watcher.take():
                room = True
                front = opened_header(packet, view, next_header, len(payload))
                watcher.record(BEFORE, self._enc[view.version], front, payload)
        for watcher in self.after:
            if not watcher.take():
                continue
            room = True
            if tunnel:
                watcher.record(AFTER, self._enc[6 if next_header == IPPROTO_IPV6 else 4], b"", payload)
            else:
                front = opened_header(packet, view, next_header, len(payload))
                watcher.record(AFTER, self._enc[view.version], front, payload)
        self._tap.quiet = not room


def _outer(view: PacketView, protocol: int, length: int) -> bytes:
    """The outer header that ``view`` has loaded, around ``length`` octets: one stands for all packets of a run."""
    if view.version == 4:
        return ipv4.header(
            view.src, view.dst, protocol, length, tos=view.tos, ttl=view.ttl, identification=view.identification,
            df=view.dont_fragment,
        )  # fmt: skip
    return ipv6.header(
        view.src, view.dst, protocol, length, traffic_class=view.tos, flow_label=view.flow_label, hop_limit=view.ttl
    )


def _length(packet: bytes) -> int:
    """The length that an IP header states: what is behind it is padding (RFC 4303 section 2.7)."""
    if len(packet) < 20:
        return len(packet)
    return int.from_bytes(packet[2:4], "big") if packet[0] < 0x60 else 40 + int.from_bytes(packet[4:6], "big")
