"""An inbound SA made ready for packets: replay check, authentication, replay update, accounts, in that order."""

from __future__ import annotations

from struct import Struct
from typing import Final, Protocol

from ipsecq.counters import Counter
from ipsecq.crypto import cipher
from ipsecq.engine.accounting import Account
from ipsecq.engine.emit import Emissions, PeerMoved
from ipsecq.engine.history import Applied, History
from ipsecq.engine.tables import Tables
from ipsecq.numbers import IPPROTO_IPV4, IPPROTO_IPV6, IPPROTO_NONE, Mode
from ipsecq.numbers import Protocol as IpsecProtocol
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import SecurityAssociation, Slot
from ipsecq.sa.replay import ReplayWindow
from ipsecq.transforms.ah import AhTransform
from ipsecq.transforms.esp import EspTransform, Group
from ipsecq.transforms.ipcomp import IpcompTransform

_BADAUTH: Final = int(Slot.BADAUTH)
_REPLAY: Final = int(Slot.REPLAY)
_DROPS: Final = int(Slot.DROPS)

_ESP_INPUT: Final = int(Counter.ESP_INPUT)
_ESP_IBYTES: Final = int(Counter.ESP_IBYTES)
_AH_INPUT: Final = int(Counter.AH_INPUT)
_AH_IBYTES: Final = int(Counter.AH_IBYTES)
_IPCOMP_INPUT: Final = int(Counter.IPCOMP_INPUT)
_IPCOMP_IBYTES: Final = int(Counter.IPCOMP_IBYTES)

MAX_INNER: Final = 65535

_INSIDE: Final = frozenset({IPPROTO_IPV4, IPPROTO_IPV6, IPPROTO_NONE})
"""What a tunnel may carry: IP, and dummies."""

_IP: Final = frozenset({IPPROTO_IPV4, IPPROTO_IPV6})

IDLE: Final = 64

_u32: Final = Struct(">I").unpack_from

Opened = tuple[int, int, bytes]
"""(0 or the Counter of the drop, next header, what the next header names)."""


class InboundSa(Protocol):
    """What :mod:`ipsecq.engine.inbound` asks of an SA."""

    sa: SecurityAssociation
    as_tunnel: History
    as_transport: History

    def is_tunnel(self, next_header: int) -> bool:
        """True when what was opened is a whole IP packet of its own."""

    def open(
        self, packet: Buffer, view: PacketView, offset: int, encapsulated: int, now: float, emit: Emissions
    ) -> Opened:
        """Open the header at ``offset``; ``encapsulated`` is the UDP source port that it came from, 0 without UDP."""

    def open_run(
        self, packets: list[Buffer], numbers: list[int], view: PacketView, offset: int, encapsulated: int, now: float,
        emit: Emissions,
    ) -> list[Group]:  # fmt: skip
        """Open as many of ``packets`` as :meth:`open` would open to whole IP packets, from the first on.

        All have the outer header that ``view`` has loaded and end with their buffers; ``numbers`` are their low
        sequence numbers, which rise.  Nothing has happened to those that are in no group.
        """


class _Ready:
    """What ESP, AH and IPComp have in common."""

    def __init__(self, sa: SecurityAssociation, tables: Tables) -> None:
        self.sa = sa
        protocol = int(sa.protocol)
        self.as_tunnel: History = (Applied(protocol, int(Mode.TUNNEL), sa.src, sa.dst, sa.reqid, sa.spi),)
        """The SA's entry in a packet's history, made once."""
        self.as_transport: History = (Applied(protocol, int(Mode.TRANSPORT), sa.src, sa.dst, sa.reqid, sa.spi),)
        self._mode = sa.mode
        self._is_tunnel = sa.mode is Mode.TUNNEL
        self._words, self._base = tables.words, sa.slot
        self._counters = tables.counters
        self._account = Account(sa, tables.words)
        self._window = ReplayWindow(tables.words, sa.slot, sa.replay_window, sa.esn)

    def is_tunnel(self, next_header: int) -> bool:
        """See :class:`InboundSa`.  Mode ``any`` is a tunnel when an IP packet is inside (BSD)."""
        return self._is_tunnel or (self._mode is Mode.ANY and next_header in {IPPROTO_IPV4, IPPROTO_IPV6})

    def open_run(
        self, packets: list[Buffer], numbers: list[int], view: PacketView, offset: int, encapsulated: int, now: float,
        emit: Emissions,
    ) -> list[Group]:  # fmt: skip
        """See :class:`InboundSa`: one by one, please."""
        return []

    def _refuse(self, word: int, reason: int) -> Opened:
        self._words[self._base + word] += 1
        return reason, 0, b""


class EspReady(_Ready):
    """An inbound ESP SA."""

    def __init__(self, sa: SecurityAssociation, tables: Tables) -> None:
        super().__init__(sa, tables)
        built = cipher.build(
            sa.encryption or "null", sa.encryption_key, sa.authentication, sa.authentication_key,
            unauthenticated=tables.unauthenticated,
        )  # fmt: skip
        self._transform = EspTransform(sa.spi, built, esn=sa.esn)
        self._peer_port = sa.natt.sport if sa.natt is not None else 0
        self._peer = sa.src
        self._idle = 0
        """Runs that are not tried, after one that held nothing for us."""

    @property
    def cipher(self) -> object:
        """The SA's cipher."""
        return self._transform.cipher

    @property
    def limits(self) -> tuple[float, float, float, float, float, float]:
        """See :meth:`ipsecq.engine.accounting.Account.limits`."""
        return self._account.limits()

    @property
    def peer(self) -> tuple[bytes, int]:
        """Address and UDP port that the peer's packets come from (0 without UDP)."""
        return self._peer, self._peer_port

    @property
    def window(self) -> ReplayWindow:
        """The replay window."""
        return self._window

    def open(
        self, packet: Buffer, view: PacketView, offset: int, encapsulated: int, now: float, emit: Emissions
    ) -> Opened:
        """See :class:`InboundSa`."""
        if bool(encapsulated) != (self.sa.natt is not None):
            return self._refuse(_DROPS, Counter.ESP_NATT)
        sequence = self._window.check(_u32(packet, offset + 4)[0])
        if sequence < 0:
            return self._refuse(_REPLAY, Counter.ESP_REPLAY)
        octets = memoryview(packet)
        if view.length != len(octets):
            octets = octets[: view.length]
        reason, next_header, payload = self._transform.open(octets, offset, sequence)
        if reason:
            return self._refuse(_BADAUTH if reason == Counter.ESP_BADAUTH else _DROPS, reason)
        if not self._window.update(sequence):
            return self._refuse(_REPLAY, Counter.ESP_REPLAY)
        if not self._account.charge(len(payload), now, emit):
            return self._refuse(_DROPS, Counter.ESP_EXPIRED)
        if self._is_tunnel and next_header not in _INSIDE:
            return self._refuse(_DROPS, Counter.ESP_INVALID)
        if encapsulated and (encapsulated != self._peer_port or view.src != self._peer):
            self._moved(view.src, encapsulated, emit)
        self._counters[_ESP_INPUT] += 1
        self._counters[_ESP_IBYTES] += len(payload)
        return 0, next_header, payload

    def open_run(
        self, packets: list[Buffer], numbers: list[int], view: PacketView, offset: int, encapsulated: int, now: float,
        emit: Emissions,
    ) -> list[Group]:  # fmt: skip
        """See :class:`InboundSa`."""
        if self._idle:
            self._idle -= 1
            return []
        if bool(encapsulated) != (self.sa.natt is not None):
            return []
        if encapsulated and (encapsulated != self._peer_port or view.src != self._peer):
            return []
        window, account, fits = self._window, self._account, self._transform.fits
        lengths = list(map(len, packets))
        if not account.allows(sum(lengths), len(packets), now):
            return []  # the last packets before a limit are counted one by one
        first = window.check(numbers[0])
        if first < 0:
            return []
        late = window.size != 0 and first <= window.edge
        if late and self.sa.esn:
            return []  # the edge could decide about the high half of what follows
        if late or not all(fits(length - offset) for length in set(lengths)):
            for index, length in enumerate(lengths):
                if not fits(length - offset) or (late and window.check(numbers[index]) < 0):
                    del packets[index:]
                    break
        groups = self._transform.open_run(packets, offset, first)
        for index, group in enumerate(groups):
            if not (group.next_header in _IP and self.is_tunnel(group.next_header)):
                del groups[index:]
                break
        count = sum([len(group.plaintexts) for group in groups])
        if not count:
            # Transport mode, dummies, or somebody without keys: no use to open each packet twice.
            self._idle = IDLE
            return []
        octets = sum([len(group.plaintexts) * group.end for group in groups])
        if not late and numbers[count - 1] - numbers[0] == count - 1:
            window.advance(first, count)
        else:
            for number in numbers[:count]:
                window.update(first + number - numbers[0])
        account.charge(octets, now, emit, count)
        counters = self._counters
        counters[_ESP_INPUT] += count
        counters[_ESP_IBYTES] += octets
        return groups

    def _moved(self, src: bytes, sport: int, emit: Emissions) -> None:
        """The packet is authentic, but its peer's NAT gave it another address: say so once, if the SA may follow."""
        sa = self.sa
        if sa.natt is not None and sa.natt.rebind:
            self._counters[Counter.NATT_REBOUND] += 1
            emit.events.append(PeerMoved(sa.dst, int(sa.protocol), sa.spi, self._peer, src, sport))
        self._peer, self._peer_port = src, sport


class AhReady(_Ready):
    """An inbound AH SA."""

    def __init__(self, sa: SecurityAssociation, tables: Tables) -> None:
        super().__init__(sa, tables)
        self._transform = AhTransform(sa.spi, cipher.icv(sa.authentication or "", sa.authentication_key), esn=sa.esn)
        self._knobs = tables.sysctl.v4

    def open(
        self, packet: Buffer, view: PacketView, offset: int, encapsulated: int, now: float, emit: Emissions
    ) -> Opened:
        """See :class:`InboundSa`."""
        sequence = self._window.check(int.from_bytes(packet[offset + 8 : offset + 12], "big"))
        if sequence < 0:
            return self._refuse(_REPLAY, Counter.AH_REPLAY)
        reason, next_header, payload = self._transform.open(
            memoryview(packet)[: view.length], offset, sequence,
            cleartos=self._knobs.ah_cleartos != 0, offsetmask=self._knobs.ah_offsetmask,
        )  # fmt: skip
        if reason:
            return self._refuse(_BADAUTH if reason == Counter.AH_BADAUTH else _DROPS, reason)
        if not self._window.update(sequence):
            return self._refuse(_REPLAY, Counter.AH_REPLAY)
        if not self._account.charge(len(payload), now, emit):
            return self._refuse(_DROPS, Counter.AH_EXPIRED)
        if self.is_tunnel(next_header) and next_header not in {IPPROTO_IPV4, IPPROTO_IPV6, 59}:
            return self._refuse(_DROPS, Counter.AH_INVALID)
        self._counters[_AH_INPUT] += 1
        self._counters[_AH_IBYTES] += len(payload)
        return 0, next_header, payload


class IpcompReady(_Ready):
    """An inbound IPComp SA."""

    def __init__(self, sa: SecurityAssociation, tables: Tables) -> None:
        super().__init__(sa, tables)
        self._transform = IpcompTransform(sa.spi, sa.compression or "deflate")

    def open(
        self, packet: Buffer, view: PacketView, offset: int, encapsulated: int, now: float, emit: Emissions
    ) -> Opened:
        """See :class:`InboundSa`."""
        reason, next_header, payload = self._transform.open(memoryview(packet)[offset : view.length], MAX_INNER)
        if reason:
            return self._refuse(_DROPS, reason)
        if not self._account.charge(len(payload), now, emit):
            return self._refuse(_DROPS, Counter.IPCOMP_EXPIRED)
        self._counters[_IPCOMP_INPUT] += 1
        self._counters[_IPCOMP_IBYTES] += len(payload)
        return 0, next_header, payload


def make_inbound(sa: SecurityAssociation, tables: Tables) -> InboundSa:
    """The ready form of an inbound SA."""
    if sa.protocol is IpsecProtocol.ESP:
        return EspReady(sa, tables)
    return AhReady(sa, tables) if sa.protocol is IpsecProtocol.AH else IpcompReady(sa, tables)
