"""NAT between the gateways: peers whose port changes are followed, and mappings of ours are kept alive (RFC 3948)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.log import LOGGER
from ipsecq.numbers import IPPROTO_UDP, SaState
from ipsecq.packet import ipv4, ipv6
from ipsecq.sa.association import NatTraversal, SaKey, SecurityAssociation, Slot
from ipsecq.transforms import natt

log: Final = logging.getLogger(f"{LOGGER}.nat")


class Output(Protocol):
    """Who sends datagrams: :class:`ipsecq.datapath.output.RawOutput`."""

    def send(self, datagrams: list[bytes]) -> int:
        """Send whole IP datagrams; how many went."""


class NatPeers:
    """``interval`` is the silence in seconds after which a mapping is kept alive; 0 sends nothing.

    ``is_local(address)`` says which end of an SA is ours.
    """

    def __init__(self, authority: Authority, output: Output, is_local: Callable[[bytes], bool], interval: int) -> None:
        self._authority, self._output, self._is_local, self._interval = authority, output, is_local, interval
        self._next = 0.0

    def follow(self, key: SaKey, src: bytes, sport: int) -> bool:
        """An authenticated packet of the inbound SA ``key`` came from another port; True when its peer was followed.

        Only for SAs that say so (``rebind``), and only the port: another address changes the tunnel's ends, and
        with them policies, which is key management's to do.  Sequence numbers go on: key and SPI are the same SA.
        """
        if key not in self._authority.sad:
            return False
        inbound = self._authority.sad.get(*key)
        if inbound.natt is None or not inbound.natt.rebind or src != inbound.src or not 0 < sport < 65536:
            return False
        old = inbound.natt.sport
        self._authority.update_sa(_with_ports(inbound, inbound.natt, sport=sport))
        for sa in self._authority.sad.dump():
            if sa.src == inbound.dst and sa.dst == src and sa.natt is not None and sa.natt.dport == old:
                self._authority.update_sa(_with_ports(sa, sa.natt, dport=sport))
        log.info("the peer of SA 0x%08x has moved from port %d to %d: followed", inbound.spi, old, sport)
        return True

    def keep_alive(self, now: float) -> int:
        """Send a keepalive for each outbound SA in UDP that has been silent for the interval; how many were sent."""
        if not self._interval or now < self._next:
            return 0
        self._next = now + self._interval / 2
        due: dict[tuple[bytes, bytes, int, int], bytes] = {}
        for sa in self._authority.sad.dump():
            if sa.natt is None or sa.state not in {SaState.MATURE, SaState.DYING} or not self._is_local(sa.src):
                continue
            words = self._authority.usage_words(sa)
            if words is not None and now - words[Slot.LAST_USE] >= self._interval / 2:
                due[sa.src, sa.dst, sa.natt.sport, sa.natt.dport] = _keepalive(sa, sa.natt)
        return self._output.send(list(due.values())) if due else 0


def _with_ports(sa: SecurityAssociation, old: NatTraversal, **ports: int) -> SecurityAssociation:
    return replace(sa, natt=replace(old, **ports))  # type: ignore[arg-type]


def _keepalive(sa: SecurityAssociation, ports: NatTraversal) -> bytes:
    payload = natt.keepalive(ports)
    if len(sa.dst) == 4:
        return ipv4.header(sa.src, sa.dst, IPPROTO_UDP, len(payload)) + payload
    return natt.finish(ipv6.header(sa.src, sa.dst, IPPROTO_UDP, len(payload)) + payload)
