"""Why packets drop, in the log: ``net.inet.ipsec.debug`` and ``net.inet6.ipsec6.debug``, for what a worker drops.

What the kernel's rules drop never comes here; it has counters.
"""

from __future__ import annotations

import logging
import time
from ipaddress import ip_address
from typing import Final

from ipsecq.counters import Counter
from ipsecq.numbers import Protocol
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.sysctl import Sysctl

log: Final = logging.getLogger(__name__)

LINES: Final = 20
"""Lines in a second; a flood says how many more there were."""

_SPI: Final = {int(Protocol.ESP): (0, 4), int(Protocol.AH): (4, 4), int(Protocol.IPCOMP): (2, 2)}


class DropLog:
    """``on_drop`` of the engines: a line for each dropped packet while its family's ``debug`` is not 0."""

    def __init__(self, sysctl: Sysctl) -> None:
        self._sysctl = sysctl
        self._view = PacketView()
        self._second = 0
        self._lines = self._more = 0

    def __call__(self, way: str, packet: Buffer, reason: int) -> None:
        """``way`` is ``in`` or ``out``; ``reason`` a Counter."""
        family = self._sysctl.v6 if len(packet) and packet[0] >> 4 == 6 else self._sysctl.v4
        if not family.debug:
            return
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        if self._lines >= LINES:
            self._more += 1
            return
        self._lines += 1
        more, self._more = self._more, 0
        log.info(
            "%s dropped (%s): %s%s", way, Counter(reason).name.lower(), self._words(packet),
            f"; {more} more before this one" if more else "",
        )  # fmt: skip

    def _words(self, packet: Buffer) -> str:
        view = self._view
        if not view.load(packet):
            return f"{len(packet)} octets that are no IP packet"
        text = f"{ip_address(view.src)} > {ip_address(view.dst)} protocol {view.protocol}"
        if view.protocol in _SPI:
            at, size = _SPI[view.protocol]
            return f"{text} SPI 0x{bytes(packet[view.offset + at : view.offset + at + size]).hex()}"
        return f"{text} {view.sport} {view.dport}, {view.length} octets"
