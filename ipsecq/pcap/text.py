"""What the pcap tool says: packets on one line, reasons of drops, the report at the end."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from ipsecq.counters import Counter
from ipsecq.numbers import IPPROTO_UDP, Protocol
from ipsecq.packet.address import text as address
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import SecurityAssociation
from ipsecq.transforms import natt

_NAMES: Final = {
    1: "ICMP", 2: "IGMP", 4: "IPIP", 6: "TCP", 17: "UDP", 41: "IPv6", 47: "GRE", 50: "ESP", 51: "AH", 58: "ICMPv6",
    89: "OSPF", 103: "PIM", 108: "IPComp", 112: "VRRP", 132: "SCTP", 135: "MH", 136: "UDP-Lite",
}  # fmt: skip
_WITH_PORTS: Final = frozenset((6, 17, 33, 132, 136))
_SPI_AT: Final = {Protocol.ESP: (0, 4), Protocol.AH: (4, 4), Protocol.IPCOMP: (2, 2)}
"""By protocol: where SPI or CPI is in the header, and its octets; the sequence number follows that of ESP and AH."""

_REASONS: Final = {
    Counter.IP_MALFORMED: "malformed IP header",
    Counter.IP_FRAGMENT: "a fragment, which transport mode cannot protect",
    Counter.IP_TOOBIG: "too long for the MTU, and must not be fragmented",
    Counter.OUT_DISCARD: "the policy says discard",
    Counter.IN_INVAL: "outer ECN says congestion, inner packet cannot (RFC 6040)",
    Counter.IN_TOODEEP: "too many headers inside each other",
    Counter.ESP_HDROPS: "too short for ESP",
    Counter.ESP_NOTDB: "unknown SPI",
    Counter.ESP_BADILEN: "not whole cipher blocks: another algorithm than the SA says, or cut off",
    Counter.ESP_BADAUTH: "ICV failure: another key or algorithm, or altered on the way",
    Counter.ESP_BADENC: "padding is wrong after decryption: probably another key or ICV length",
    Counter.ESP_REPLAY: "replay: seen before, or left of the window",
    Counter.ESP_INVALID: "no IP packet inside the tunnel",
    Counter.ESP_TOOBIG: "longer than 65535 octets with ESP",
    Counter.ESP_NATT: "in UDP while the SA is plain esp, or plain while the SA is esp-udp",
    Counter.ESP_WRAP: "sequence numbers are used up",
    Counter.AH_HDROPS: "too short for AH",
    Counter.AH_NOTDB: "unknown SPI",
    Counter.AH_BADAUTHL: "ICV of another length than the SA's algorithm has",
    Counter.AH_BADAUTH: "ICV failure: another key or algorithm, or altered on the way",
    Counter.AH_REPLAY: "replay: seen before, or left of the window",
    Counter.AH_INVALID: "no IP packet inside the tunnel",
    Counter.AH_TOOBIG: "longer than 65535 octets with AH",
    Counter.AH_WRAP: "sequence numbers are used up",
    Counter.IPCOMP_HDROPS: "too short for IPComp",
    Counter.IPCOMP_NOTDB: "unknown CPI",
    Counter.IPCOMP_INVALID: "cannot be decompressed",
    Counter.IPCOMP_BOMB: "longer than 65535 octets when decompressed",
}  # fmt: skip


def reason(counter: int) -> str:
    """Why a packet was dropped, for people."""
    return _REASONS.get(Counter(counter)) or Counter(counter).name.lower()


def moment(time: int) -> str:
    """Nanoseconds since 1970 as ``2026-02-03T04:05:06.000789Z``."""
    try:
        return datetime.fromtimestamp(time // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + (
            f".{time // 1000 % 1_000_000:06}Z"
        )
    except (OverflowError, ValueError, OSError):  # a time that no clock ever showed
        return f"{time / 1e9:.6f}"


def security_header(packet: Buffer, view: PacketView, ports: frozenset[int]) -> tuple[Protocol, int, int] | None:
    """Protocol, SPI (or CPI) and sequence number (IPComp: -1) of the outermost header of ours; None without any.

    ``view`` has loaded ``packet``; ``ports`` are the UDP ports of encapsulated ESP.
    """
    offset = view.offset
    if view.protocol == IPPROTO_UDP:
        offset = natt.esp_offset(packet, view, ports)
        if offset <= 0:
            return None
        protocol = Protocol.ESP
    elif view.protocol in _SPI_AT and not view.fragment_word & 0x1FFF:
        protocol = Protocol(view.protocol)
    else:
        return None
    at, size = _SPI_AT[protocol]
    at += offset
    if at + size > view.length:
        return None
    spi = int.from_bytes(packet[at : at + size], "big")
    if protocol is Protocol.IPCOMP or at + 8 > view.length:
        return protocol, spi, -1
    return protocol, spi, int.from_bytes(packet[at + 4 : at + 8], "big")


def packet_line(packet: Buffer, ports: frozenset[int]) -> str:
    """One IP packet: ``10.1.0.2.1000 > 10.2.0.2.2000 UDP, 128 octets``."""
    view = PacketView()
    if not view.load(packet):
        return f"malformed, {len(packet)} octets"
    src, dst = address(view.src), address(view.dst)
    name = _NAMES.get(view.protocol, f"protocol {view.protocol}")
    ours = security_header(packet, view, ports)
    if ours is not None:
        protocol, spi, sequence = ours
        if view.protocol == IPPROTO_UDP:
            src, dst, name = f"{src}.{view.sport}", f"{dst}.{view.dport}", "ESP in UDP"
        name += f" cpi=0x{spi:04x}" if protocol is Protocol.IPCOMP else f" spi=0x{spi:08x} seq={sequence}"
    elif view.fragment_word & 0x1FFF:
        name += f" fragment at {view.fragment_offset}"
    elif view.protocol in _WITH_PORTS:
        src, dst = f"{src}.{view.sport}", f"{dst}.{view.dport}"
    elif view.protocol in {1, 58}:
        name += f" type {view.sport} code {view.dport}"
    return f"{src} > {dst} {name}, {view.length} octets"


def association(sa: SecurityAssociation) -> str:
    """``esp 0x00001001 192.0.2.1 > 192.0.2.2``."""
    spi = f"0x{sa.spi:04x}" if sa.protocol is Protocol.IPCOMP else f"0x{sa.spi:08x}"
    return f"{sa.protocol.name.lower()} {spi} {address(sa.src)} > {address(sa.dst)}"


def count(number: int, one: str, many: str = "") -> str:
    """``1 packet``, ``2 packets``."""
    return f"{number} {one if number == 1 else many or one + 's'}"
