"""IP headers around transforms: a tunnel's outer header, and a packet's own header in transport mode.

DSCP, ECN, DF, TTL and flow label by RFC 4301 section 5.1.2, RFC 6040 and the knobs ``ecn`` and ``dfbit`` of ipsec(4).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

import numpy as np
import numpy.typing as npt

from ipsecq.packet import ipv4
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.checksum import update
from ipsecq.packet.view import PacketView

TUNNEL_TTL: Final = 64
"""TTL and hop limit of outer headers: the tunnel is one hop for the inner packet, however long."""

_IPV4: Final = Struct(">BBHHHBBH4s4s")
_IPV6: Final = Struct(">IHBB16s16s")

ECN_ALLOWED: Final = 1
ECN_FORBIDDEN: Final = 0
ECN_NOCARE: Final = -1

_CE: Final = 3


class OuterHeader:
    """Makes the outer headers of one tunnel.  The parts that never change are summed once.

    ``ecn`` and ``dfbit`` are the knobs; a change of a knob makes a new object.
    """

    __slots__ = ("_base", "_dfbit", "_dst", "_identification", "_protocol", "_src", "_tos_mask", "length", "version")

    def __init__(self, src: bytes, dst: bytes, protocol: int, *, ecn: int, dfbit: int, identification: int = 0) -> None:
        self.version = 4 if len(dst) == 4 else 6
        self.length = 20 if self.version == 4 else 40
        self._src, self._dst, self._protocol = src, dst, protocol
        self._tos_mask = 0xFC if ecn == ECN_FORBIDDEN else 0xFF
        self._dfbit = dfbit
        self._identification = identification
        self._base = 0
        if self.version == 4:
            # A whole address counts in the checksum as its words do: 2^16 is 1 modulo 65535.
            self._base = (
                0x4500 + (TUNNEL_TTL << 8) + protocol + int.from_bytes(src, "big") + int.from_bytes(dst, "big")
            )

    def build(self, payload: int, tos: int, inner_df: bool, flow_label: int, sequence: int) -> bytes:
        """The outer header for ``payload`` octets behind it.

        ``tos`` and ``flow_label`` are the inner packet's (IPv4 inner: label 0), ``sequence`` gives IPv4's identification
        so that fragments of neighbouring packets do not mix.  About 0.5 µs.
        """
        tos &= self._tos_mask
        if self.version == 6:
            return _IPV6.pack(0x60000000 | tos << 20 | flow_label, payload, self._protocol, TUNNEL_TTL, self._src, self._dst)
        length = payload + 20
        identification = (self._identification + sequence) & 0xFFFF
        dfbit = self._dfbit
        df = 0x4000 if dfbit == 1 or (dfbit == 2 and inner_df) else 0
        checksum = -(self._base + tos + length + identification + df) % 65535
        return _IPV4.pack(
            0x45, tos, length, identification, df, TUNNEL_TTL, self._protocol, checksum, self._src, self._dst
        )

    def fields(self, tos: int, inner_df: bool, flow_label: int, sequence: int) -> tuple[int, bool, int, int]:
        """What :meth:`build` would write: TOS, DF, flow label, identification."""
        df = self._dfbit == 1 or (self._dfbit == 2 and inner_df)
        return tos & self._tos_mask, df, flow_label, self._identification + sequence & 0xFFFF

    @property
    def rules(self) -> tuple[int, int]:
        """Bits of the inner TOS that are copied, and the knob ``dfbit``."""
        return self._tos_mask, self._dfbit

    def identification(self, sequence: int) -> int:
        """IPv4's identification of the datagram with that sequence number."""
        return self._identification + sequence & 0xFFFF

    def build_run(
        self, count: int, payload: int, last: int, tos: int, inner_df: bool, flow_label: int, first: int, room: int
    ) -> npt.NDArray[np.uint8]:
        """The headers of ``count`` datagrams as rows, with ``room`` octets behind each header for the caller.

        ``payload`` octets are behind each header, ``last`` behind that of the last; sequence numbers count from ``first``.
        """
        rows: npt.NDArray[np.uint8] = np.empty((count, self.length + room), np.uint8)
        rows[:, : self.length] = np.frombuffer(self.build(payload, tos, inner_df, flow_label, first), np.uint8)
        if self.version == 4:
            numbers = (np.arange(count) + (self._identification + first)) & 0xFFFF
            rest = self._base + (tos & self._tos_mask) + payload + 20 + (int(rows[0, 6]) << 8)
            rows[:, 4:6] = numbers.astype(">u2").view(np.uint8).reshape(count, 2)
            rows[:, 10:12] = (-(numbers + rest % 65535) % 65535).astype(">u2").view(np.uint8).reshape(count, 2)
        final = self.build(last, tos, inner_df, flow_label, first + count - 1)
        rows[-1, : self.length] = np.frombuffer(final, np.uint8)
        return rows


def decapsulated_ecn(inner: int, outer: int) -> int:
    """The inner packet's new ECN field, or -1 when it must be dropped (RFC 6040 section 4.2, figure 4).

    Both arguments are ECN fields, 0 to 3.
    """
    if outer == _CE:
        return -1 if inner == 0 else _CE
    if outer == 1 and inner == 2:
        return 1
    return inner


def with_tos(packet: bytes, tos: int) -> bytes:
    """``packet`` with another TOS octet or traffic class; the IPv4 header checksum is updated (RFC 1624)."""
    changed = bytearray(packet)
    if packet[0] >> 4 == 4:
        before = packet[0] << 8 | packet[1]
        after = packet[0] << 8 | tos
        changed[1] = tos
        checksum = update(packet[10] << 8 | packet[11], before, after)
        changed[10], changed[11] = checksum >> 8, checksum & 0xFF
    else:
        changed[0] = 0x60 | tos >> 4
        changed[1] = (tos & 15) << 4 | packet[1] & 15
    return bytes(changed)


def own_header(packet: Buffer, view: PacketView, protocol: int, payload: int) -> bytes:
    """The packet's own header, up to ``view.header_length``, around another payload: where transport mode begins.

    ``payload`` is the new payload's length in octets, ``protocol`` its protocol.  b"" when the packet would be
    longer than IP allows.
    """
    return _around(packet, view.version, view.header_length, view.header_nexthdr, protocol, payload)


def opened_header(packet: Buffer, view: PacketView, protocol: int, payload: int) -> bytes:
    """All headers in front of the AH, ESP, IPComp or UDP header at ``view.offset``, around what that held.

    IPv6 destination options may stand there, too (RFC 4302 and RFC 4303 section 3.1.1): the sender decides.  Arguments
    and result as for :func:`own_header`.
    """
    return _around(packet, view.version, view.offset, view.nexthdr_offset, protocol, payload)


def _around(packet: Buffer, version: int, end: int, named_by: int, protocol: int, payload: int) -> bytes:
    length = end + payload
    head = bytearray(packet[:end])
    head[named_by] = protocol
    if version == 4:
        if length > 65535:
            return b""
        head[2], head[3] = length >> 8, length & 0xFF
        ipv4.fix_checksum(head)
    else:
        length -= 40
        if length > 65535:
            return b""
        head[4], head[5] = length >> 8, length & 0xFF
    return bytes(head)
