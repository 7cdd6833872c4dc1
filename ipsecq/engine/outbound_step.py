"""One step of a bundle: an outbound SA made ready for packets.

Each step takes the datagram that the step before it made and returns the next one, or the Counter that says why not.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

from ipsecq.engine.emit import Burst, Emissions
from ipsecq.engine.headers import OuterHeader
from ipsecq.engine.padding import Padding
from ipsecq.engine.tables import Tables
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sa.sequence import LIMIT_32, LIMIT_64, OutboundSequence


class OutboundStep(Protocol):
    """What a bundle asks of each of its SAs."""

    sa: SecurityAssociation
    tunnel: bool
    padding: Padding | None

    def apply(self, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> bytes | int:
        """Transform ``packet``, whose headers ``view`` has loaded; an int is the drop's Counter."""

    def apply_run(
        self, packet: Buffer, view: PacketView, size: int, now: float, emit: Emissions
    ) -> list[bytes] | list[Burst] | None:
        """The datagrams of a super-packet's segments with ``size`` octets of data each; None: one by one, please."""

    def sealed_length(self, length: int, header: int) -> int:
        """Octets of the datagram that this step makes of one of ``length`` octets whose IP header has ``header``.

        Without TFC padding, which takes no more than is left.
        """


def outer_header(sa: SecurityAssociation, protocol: int, tables: Tables) -> OuterHeader:
    """The outer header maker of a tunnel mode SA, by the knobs of its family."""
    knobs = tables.sysctl.v4 if len(sa.dst) == 4 else tables.sysctl.v6
    identification = int.from_bytes(tables.random(2), "big")
    return OuterHeader(sa.src, sa.dst, protocol, ecn=knobs.ecn, dfbit=knobs.dfbit, identification=identification)


def sequence_of(sa: SecurityAssociation, tables: Tables) -> OutboundSequence:
    """The SA's sequence numbers, leased a block at a time."""
    limit = LIMIT_64 if sa.esn else LIMIT_32
    return OutboundSequence(partial(tables.lease, sa.slot, limit), limit)
