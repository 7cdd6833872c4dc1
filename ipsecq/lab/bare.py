"""A gateway without a daemon: the engine on a wire, and nothing else.

It takes a device of a namespace whose kernel has no address there, so no kernel, NFQUEUE or netfilter is between the
engine and the peer: what differs from a peer's idea of IPsec is the engine's doing.  Packets from inside are handed in
by the caller, packets for inside are handed back.
"""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Final

from ipsecq.counters import Counter, Fate
from ipsecq.datapath.queue import SO_RCVBUFFORCE
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound import Inbound
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.standalone import build
from ipsecq.engine.tables import Tables
from ipsecq.lab.netns import Namespace
from ipsecq.numbers import IPPROTO_UDP
from ipsecq.packet import checksum, ipv4, ipv6
from ipsecq.packet.fragments import Reassembler
from ipsecq.packet.view import HOP_BY_HOP, PacketView
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import Slot
from ipsecq.sa.sad import Sad
from ipsecq.setkey import apply, parser

ETHERTYPE: Final = {4: b"\x08\x00", 6: b"\x86\xdd"}
_ETH_P_ALL: Final = 3


class BareGateway:
    """The engine behind ``device`` of ``space``: ``mac`` is its own Ethernet address, ``peer_mac`` the only peer's.

    ``load`` gives it SAs and policies, ``send`` takes a packet from inside, ``receive`` returns packets for inside.
    """

    def __init__(self, space: Namespace, device: str, mac: bytes, peer_mac: bytes, mtu: int = 1500) -> None:
        self.mtu = mtu
        self.tables: Tables
        self.sent: list[bytes] = []
        """Datagrams that the last :meth:`send` put on the wire."""
        self.answers: list[bytes] = []
        """ICMP errors to senders inside, since the last :meth:`load`."""
        self.refused: list[tuple[str, bytes]] = []
        """(reason, datagram) of each datagram from the wire that was dropped, since the last :meth:`load`."""
        self._head = {version: peer_mac + mac + kind for version, kind in ETHERTYPE.items()}
        self._view = PacketView()
        self._emit = Emissions()
        space.sysctl(f"net/ipv6/conf/{device}/disable_ipv6", 1)  # not a word from the kernel of this side
        self._wire = space.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        self._wire.bind((device, _ETH_P_ALL))
        self._wire.setblocking(False)
        space.lab.on_close(self._wire.close)

    def load(self, setkey: str, first: int = 0) -> None:
        """Forget everything, start with the SAs and policies of a setkey.conf.

        ``first``: the last sequence number that is used up, in both directions.
        """
        applied = apply.apply(parser.parse(setkey), Sad(), Spd(), now=time.time(), allow_legacy=True)
        self.tables = tables = build(applied.sad.dump(), applied.spd.dump(), os.urandom)
        if first:
            for sa in tables.sad:
                tables.words[sa.slot + Slot.LEASED] = first + 1
                tables.words[sa.slot + Slot.SEQUENCE] = first
        self._outbound = Outbound(tables, lambda _: self.mtu, lambda dst: bytes(len(dst)))
        self._inbound = Inbound(tables)
        self._outside = Reassembler(1 << 22, 64, 30.0)  # what the kernel's defragmentation is on a gateway
        self._inside = Reassembler(1 << 22, 64, 30.0)
        self.answers, self.refused = [], []
        while self._frame():  # what is late belongs to the SAs before
            pass

    def count(self, counter: Counter) -> int:
        """A counter since the last :meth:`load`."""
        return int(self.tables.counters[counter])

    def send(self, packet: bytes) -> str:
        """Protect a packet from inside and send it; "" or the reason why not."""
        emit, view = self._emit, self._view
        emit.clear()
        fate = self._outbound.process(packet, time.time(), emit)
        if fate == Fate.PASS:
            emit.wire.append(packet)
        self.sent = []
        view.load(packet)
        inside = view.src
        for datagram in emit.wire:
            if view.load(datagram) and view.dst == inside and view.src != inside:
                self.answers.append(datagram)
            else:
                self.sent.append(datagram)
                self._wire.send(self._head[datagram[0] >> 4] + datagram)
        return "" if fate in {Fate.DONE, Fate.PASS} else _name(fate)

    def receive(self, seconds: float) -> list[bytes]:
        """Packets for inside, fragments joined: all that is there, or the first that comes within ``seconds``."""
        found: list[bytes] = []
        deadline = time.monotonic() + seconds
        while not found and select.select([self._wire], [], [], max(0.0, deadline - time.monotonic()))[0]:
            while frame := self._frame():
                if frame[12:14] in ETHERTYPE.values():
                    found += self._open(frame[14:])
        return found

    def _frame(self) -> bytes:
        try:
            return self._wire.recv(65600)
        except BlockingIOError:
            return b""

    def _open(self, datagram: bytes) -> list[bytes]:
        emit, now = self._emit, time.time()
        emit.clear()
        if self._view.load(datagram) and self._view.fragment_word & 0x3FFF:
            joined = self._outside.add(datagram, now)
            if joined is None:
                return []
            datagram = joined
        fate = self._inbound.process(datagram, now, emit)
        if fate == Fate.PASS:
            emit.inner.append(datagram)
        elif fate not in {Fate.DONE, Fate.ABSORBED}:
            self.refused.append((_name(fate), datagram))
        whole = []
        for packet in emit.inner:
            self._view.load(packet)
            if not self._view.fragment_word & 0x3FFF:
                whole.append(packet)
            elif done := self._inside.add(packet, now):
                whole.append(done)
        return whole


def udp(
    src: bytes, dst: bytes, sport: int, dport: int, payload: bytes, *, head: bytes = b"", kind: int = HOP_BY_HOP,
    tos: int = 0,
) -> bytes:  # fmt: skip
    """A UDP datagram with right checksums.

    ``head``: IPv4 options (a multiple of 4 octets), or one IPv6 extension header, of type ``kind``, that names UDP as what
    follows it.
    """
    fixed = b"".join(number.to_bytes(2, "big") for number in (sport, dport, 8 + len(payload)))
    total = checksum.transport(src, dst, IPPROTO_UDP, b"".join((fixed, b"\0\0", payload))) or 0xFFFF
    segment = b"".join((fixed, total.to_bytes(2, "big"), payload))
    if len(src) == 16:
        follows = kind if head else IPPROTO_UDP
        return ipv6.header(src, dst, follows, len(head) + len(segment), traffic_class=tos) + head + segment
    packet = bytearray(ipv4.header(src, dst, IPPROTO_UDP, len(head) + len(segment), tos=tos, identification=sport))
    packet[0] += len(head) // 4
    packet += head
    ipv4.fix_checksum(packet)
    return bytes(packet) + segment


def _name(fate: int) -> str:
    return Counter(fate).name if fate in set(Counter) else Fate(fate).name
