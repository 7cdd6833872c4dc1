"""``ipsecq pcap decrypt`` and ``encrypt``: a capture through the engine that the gateway has.

:class:`Decryptor` and :class:`Encryptor` treat one datagram; :func:`run` takes them through a file.  SAs keep their replay
windows, but lifetimes mean nothing here: the past cannot expire.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, NamedTuple, Protocol

from ipsecq.counters import Counter, Fate
from ipsecq.engine.emit import Acquire, Emissions
from ipsecq.engine.inbound import Inbound
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.standalone import build
from ipsecq.engine.tables import Random, Tables
from ipsecq.errors import CaptureError
from ipsecq.numbers import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_IPV4, IPPROTO_IPV6, IPPROTO_UDP, Direction
from ipsecq.numbers import Protocol as IpsecProtocol
from ipsecq.packet.address import text as address
from ipsecq.packet.fragments import Reassembler
from ipsecq.packet.view import DESTINATION_OPTIONS, PacketView
from ipsecq.pcap import links, text
from ipsecq.pcap.format import Reader, Record, Writer
from ipsecq.policy.model import Policy
from ipsecq.sa.association import Lifetime, SecurityAssociation, Slot

MAX_UNKNOWN: Final = 1000
"""Unknown SPIs that are counted one by one; later ones together."""
NO_LIMIT: Final = 1 << 20
_CUT: Final = "cut off by the snap length of the capture"
_LATEST: Final = float(1 << 40)
_IPSEC: Final = frozenset(int(protocol) for protocol in IpsecProtocol)
_WANTED: Final = _IPSEC | {IPPROTO_UDP, IPPROTO_IPV4, IPPROTO_IPV6, DESTINATION_OPTIONS}
"""Protocols whose fragments may make something to decrypt."""
_NOTDB: Final = frozenset((Counter.ESP_NOTDB, Counter.AH_NOTDB, Counter.IPCOMP_NOTDB))


class Kind(Enum):
    """What became of a packet."""

    DONE = "done"
    OTHER = "other"
    """Nothing for IPsec: not IP, or not protected, or no policy wants it protected."""
    WAITING = "waiting"
    """Finished without a result: a fragment that waits, a keepalive, a dummy packet."""
    DROPPED = "dropped"


class Result(NamedTuple):
    """What became of a packet, and why when that was nothing."""

    kind: Kind
    datagram: bytes
    """The datagram that was looked at: put together, when the packet was the last of its fragments."""
    packets: list[bytes]
    reason: str = ""


@dataclass(slots=True)
class Report:
    """The counts of a run."""

    verb: str
    packets: int = 0
    written: int = 0
    kinds: Tally[Kind] = field(default_factory=Tally)
    reasons: Tally[str] = field(default_factory=Tally)
    unknown: Tally[tuple[bytes, int, int]] = field(default_factory=Tally)
    """Packets by (destination, protocol, SPI) without an SA; key (b"", 0, 0) is all that are beyond the limit."""
    associations: list[tuple[SecurityAssociation, dict[Slot, int]]] = field(default_factory=list)
    links: set[int] = field(default_factory=set)
    """Link types that were met and are not understood."""
    error: CaptureError | None = None
    """Why the file could not be read to its end."""

    @property
    def done(self) -> int:
        """Packets decrypted or encrypted."""
        return self.kinds[Kind.DONE]

    def lines(self) -> Iterator[str]:
        """The report for people."""
        yield (
            f"{text.count(self.packets, 'packet')}: {self.done} {self.verb}, {self.kinds[Kind.DROPPED]} dropped, "
            f"{self.kinds[Kind.OTHER]} not for IPsec, {self.kinds[Kind.WAITING]} without result; "
            f"{self.written} written"
        )
        for sa, words in self.associations:
            yield (
                f"  {text.association(sa)}: {words[Slot.PACKETS]} {self.verb}, {words[Slot.BADAUTH]} ICV failures, "
                f"{words[Slot.REPLAY]} replays, {words[Slot.DROPS]} other drops"
            )
        for (dst, protocol, spi), number in self.unknown.most_common():
            if not dst:
                yield f"  more unknown SPIs: {number}"
                continue
            name = IpsecProtocol(protocol).name.lower()
            yield f"  {name} 0x{spi:08x} to {address(dst)}: {number} with this unknown SPI"
        for reason, number in self.reasons.most_common():
            yield f"  {number} {reason}"
        for link in sorted(self.links):
            yield f"  link type {link} is not known: its packets were not looked at"


class Worker(Protocol):
    """What :func:`run` takes through a file."""

    report: Report
    tables: Tables

    def process(self, datagram: bytes, now: float, missing: int = 0) -> Result:
        """Treat one IP datagram, of which the capture cut off ``missing`` octets.

        ``now`` (Unix seconds) never goes back.  Raises nothing.
        """

    def finish(self) -> Report:
        """The report, after the last packet."""


class _Common:
    def __init__(self, verb: str, tables: Tables) -> None:
        self.tables = tables
        self.report = Report(verb)
        self._view = PacketView()
        self._emit = Emissions()
        # One source is a gateway with all its traffic here, so it may have as much as all.
        self._reassembler = Reassembler(8 << 20, 4096, 60.0, limit_per_source=4096)

    def _whole(self, datagram: bytes, now: float, wanted: frozenset[int]) -> bytes | None:
        """The datagram without fragmentation, None while parts are missing; the view has loaded what is returned."""
        view = self._view
        if not view.is_fragment or (wanted and view.protocol not in wanted):
            return datagram
        whole = self._reassembler.add(datagram, now)
        return whole if whole is not None and view.load(whole) else None

    def _dropped(self, datagram: bytes, reason: str) -> Result:
        self.report.reasons[reason] += 1
        return Result(Kind.DROPPED, datagram, [], reason)

    def finish(self) -> Report:
        """See :class:`Worker`."""
        words = self.tables.words
        columns = (Slot.PACKETS, Slot.BADAUTH, Slot.REPLAY, Slot.DROPS)
        for sa in self.tables.sad:
            self.report.associations.append((sa, {column: words[sa.slot + column] for column in columns}))
        lost = self._reassembler.datagrams
        if lost:
            self.report.reasons["datagrams of which fragments are missing"] += lost
        return self.report


class Decryptor(_Common):
    """The inbound engine over a capture, which shows both directions: so there are no policies.

    ``unauthenticated`` opens ESP whose authentication key is missing, ``replay`` False takes repeated packets as well
    (with extended sequence numbers the window stays: it is what tells their high half).
    """

    def __init__(
        self, associations: Iterable[SecurityAssociation], random: Random, *, unauthenticated: bool = False,
        replay: bool = True,
    ) -> None:  # fmt: skip
        sas = [_timeless(sa) for sa in associations]
        if not replay:
            sas = [sa if sa.esn else replace(sa, replay_window=0) for sa in sas]
        super().__init__("decrypted", build(sas, (), random, unauthenticated=unauthenticated))
        self._inbound = Inbound(self.tables)

    def process(self, datagram: bytes, now: float, missing: int = 0) -> Result:
        """See :class:`Worker`."""
        view, emit = self._view, self._emit
        if not view.load(datagram):
            if _looks_protected(datagram):
                return self._dropped(datagram, _CUT if missing else text.reason(Counter.IP_MALFORMED))
            return Result(Kind.OTHER, datagram, [], _CUT if missing else "malformed")
        whole = self._whole(datagram, now, _WANTED)
        if whole is None:
            return Result(Kind.WAITING, datagram, [], "a fragment that waits for the others")
        emit.clear()
        fate = self._inbound.process(whole, now, emit)
        if fate == Fate.DONE:
            return Result(Kind.DONE, whole, list(emit.inner))
        if fate == Fate.PASS:
            return Result(Kind.OTHER, whole, [], "not protected")
        if fate == Fate.ABSORBED:
            if view.protocol in {IPPROTO_ICMP, IPPROTO_ICMPV6}:
                return Result(Kind.OTHER, whole, [], "an ICMP error about one of the SAs")
            keepalive = view.protocol == IPPROTO_UDP and view.length == view.offset + 9
            return Result(Kind.WAITING, whole, [], "a NAT keepalive" if keepalive else "a dummy packet")
        reason = text.reason(fate)
        return self._dropped(whole, reason + self._unknown(whole) if fate in _NOTDB else reason)

    def _unknown(self, packet: bytes) -> str:
        """Count an unknown SPI; what the SAs at hand have to say to it."""
        view = self._view
        ours = text.security_header(packet, view, self.tables.natt_ports)
        if ours is None:
            return ""
        protocol, spi, _ = ours
        if self.tables.sad.inbound((view.dst, int(protocol), spi)) is not None:
            return " of an inner header"
        unknown = self.report.unknown
        key = (view.dst, int(protocol), spi)
        unknown[key if key in unknown or len(unknown) < MAX_UNKNOWN else (b"", 0, 0)] += 1
        for sa in self.tables.sad:
            if sa.protocol is protocol and sa.spi == spi:
                return f": the SA with this SPI is for destination {address(sa.dst)}"
        return ""


class Encryptor(_Common):
    """The outbound engine over a capture: what outbound policies want protected is.

    ``mtu`` limits the finished datagrams as a link would (0: no limit).  Sequence numbers start at 1: these must not be
    keys that a gateway uses, or its counter-mode IVs are used twice.
    """

    def __init__(
        self, associations: Iterable[SecurityAssociation], policies: Iterable[Policy], random: Random, *, mtu: int = 0
    ) -> None:
        wanted = [replace(policy, lifetime=0) for policy in policies if policy.direction is Direction.OUT]
        super().__init__("encrypted", build([_timeless(sa) for sa in associations], wanted, random))
        limit = mtu or NO_LIMIT
        # Without an address of its own the engine answers nobody with ICMP.
        self._outbound = Outbound(self.tables, lambda _: limit, lambda _: b"")

    def process(self, datagram: bytes, now: float, missing: int = 0) -> Result:
        """See :class:`Worker`.  Policies see whole datagrams, as on a gateway."""
        view, emit = self._view, self._emit
        if not view.load(datagram):
            return self._dropped(datagram, _CUT if missing else text.reason(Counter.IP_MALFORMED))
        whole = self._whole(datagram, now, frozenset())
        if whole is None:
            return Result(Kind.WAITING, datagram, [], "a fragment that waits for the others")
        emit.clear()
        fate = self._outbound.process(whole, now, emit)
        if fate == Fate.DONE:
            return Result(Kind.DONE, whole, list(emit.wire))
        if fate == Fate.PASS:
            return Result(Kind.OTHER, whole, [], "no policy protects it")
        if fate == Fate.HOLD:
            held = emit.held
            lacking = "no SA"
            if isinstance(held, Acquire):
                name = IpsecProtocol(held.protocol).name.lower()
                lacking = f"no {name} SA from {address(held.src)} to {address(held.dst)}"
                lacking += f" with reqid {held.reqid}" if held.reqid else ""
            return self._dropped(whole, lacking)
        return self._dropped(whole, text.reason(fate))


def _timeless(sa: SecurityAssociation) -> SecurityAssociation:
    return replace(sa, soft=Lifetime(), hard=Lifetime())


def _looks_protected(datagram: bytes) -> bool:
    """Whether the IP header of a malformed (or cut off) datagram names ESP, AH or IPComp."""
    at = 9 if datagram[:1] and datagram[0] >> 4 == 4 else 6
    return len(datagram) > at and datagram[at] in _IPSEC


def run(
    reader: Reader,
    writer: Writer | None,
    worker: Worker,
    *,
    keep_others: bool = False,
    say: Callable[[str], None] | None = None,
    drops_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Take every packet of ``reader`` through ``worker``; results go to ``writer`` behind the link header they came with.

    ``keep_others`` copies packets that are not for IPsec as they are.  ``say`` gets a line for each packet, with
    ``drops_only`` for dropped ones only.  ``progress`` gets octets read and packets every 1024 packets.  An unreadable
    rest of the file is ``Report.error``; what came before it has been treated.
    """
    report = worker.report
    kinds, packets = report.kinds, 0
    now = 0.0
    try:
        for record in reader:
            packets += 1
            # Captures of several processors run backwards now and then; times out of this world are clamped.
            now = max(now, min(record.time / 1e9, _LATEST))
            result, written = _one(record, worker, now, keep_others)
            kinds[result.kind] += 1
            if writer is not None:
                for each in written:
                    writer.write(each)
                report.written += len(written)
            if say is not None and (result.kind is Kind.DROPPED or not drops_only):
                say(_line(record, result, worker.tables.natt_ports))
            if progress is not None and not packets & 1023:
                progress(reader.position, packets)
    except CaptureError as error:
        report.error = error
    report.packets = packets
    return worker.finish()


def _one(record: Record, worker: Worker, now: float, keep_others: bool) -> tuple[Result, list[Record]]:
    link, data = record.link, record.data
    offset = links.locate(link, data)
    out = links.written_as(link)
    if offset < 0:
        if not links.known(link):
            worker.report.links.add(link)
        result = Result(Kind.OTHER, b"", [], "no IP packet")
    else:
        result = worker.process(data[offset:], now, record.wire_length - len(data))
    if result.kind is Kind.DONE:
        written = []
        for packet in result.packets:
            frame = links.header(link, data, offset, packet[0] >> 4) + packet
            written.append(Record(record.time, out, frame, len(frame)))
        return result, written
    if result.kind is not Kind.OTHER or not keep_others:
        return result, []
    if offset >= 0 and result.datagram != data[offset:]:
        # Put together out of fragments: there is no frame that holds it.
        frame = data[:offset] + result.datagram
        return result, [Record(record.time, out, frame, len(frame))]
    return result, [record._replace(link=out)]


def _line(record: Record, result: Result, ports: frozenset[int]) -> str:
    what = text.packet_line(result.datagram, ports) if result.datagram else f"{len(record.data)} octets"
    if result.kind is Kind.DONE:
        became = " + ".join(text.packet_line(packet, ports) for packet in result.packets)
    else:
        became = f"{'DROPPED: ' if result.kind is Kind.DROPPED else ''}{result.reason}"
    return f"{text.moment(record.time)} {what} -> {became}"
