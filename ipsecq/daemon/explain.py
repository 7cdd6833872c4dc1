"""The answer of ``ipsecq explain``, from the running daemon's tables or from files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ipsecq.daemon import explain_report
from ipsecq.daemon.content import Content
from ipsecq.engine import explain as engine
from ipsecq.engine import standalone
from ipsecq.engine.outbound import MtuOf
from ipsecq.engine.tables import Tables
from ipsecq.errors import DaemonError
from ipsecq.netfilter import where
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.numbers import Direction
from ipsecq.setkey import values

ETHERNET: Final = 1500
"""Path MTU where no kernel is asked."""


@dataclass(slots=True, frozen=True)
class Question:
    """A packet that is asked about."""

    flow: engine.Flow
    inbound: bool
    mtu: int
    """Path MTU towards the outermost destination; 0: as the kernel knows it."""

    @classmethod
    def parse(
        cls, src: str, dst: str, protocol: str, sport: int, dport: int, *, inbound: bool, mtu: int
    ) -> Question:
        """From text.  DaemonError with what was expected."""
        try:
            flow = engine.Flow(
                values.parse_address(src), values.parse_address(dst), values.parse_upper(protocol), sport, dport
            )
        except ValueError as error:
            raise DaemonError(f"explain: expected {error}") from None
        if len(flow.src) != len(flow.dst):
            raise DaemonError(f"explain: {src} and {dst} are of two families")
        if not (0 <= sport <= 65535 and 0 <= dport <= 65535 and (68 <= mtu <= 65535 or not mtu)):
            raise DaemonError(f"explain: ports {sport}, {dport} or MTU {mtu} out of range")
        if flow.protocol in values.ICMP and max(sport, dport) > 255:
            raise DaemonError(f"explain: {protocol}: expected a type and a code from 0 to 255, found {sport}, {dport}")
        return cls(flow, inbound, mtu)


def answer(
    question: Question, tables: Tables, settings: NetfilterSettings, source: str, mtu_of: MtuOf,
    places: Callable[[int], list[str]] | None = None,
) -> dict[str, Any]:
    """``data`` for programs and ``text`` for people; ``source`` says whose tables were asked."""
    flow = question.flow
    if question.inbound:
        told = engine.inbound(tables, flow)
    else:
        told = engine.outbound(tables, flow, (lambda _: question.mtu) if question.mtu else mtu_of)
    direction = Direction.IN if question.inbound else Direction.OUT
    if where.exempt(settings, flow.protocol, flow.sport):
        chains = ["neighbour discovery on the link is accepted before any policy"]
    else:
        family = 4 if len(flow.src) == 4 else 6
        chains = where.chains(tables.spd.dump(), told.policy, direction, family, settings, tables.sysctl, places)
    data = {"source": source, **explain_report.as_data(told, chains)}
    return {"data": data, "text": explain_report.as_text(told, chains)}


def offline(question: Question, content: Content) -> dict[str, Any]:
    """The answer from what files say."""
    tables = standalone.build(content.sad.dump(), content.spd.dump(), os.urandom, content.sysctl)
    tables.parallel_sas = content.config.daemon.parallel_sas
    return answer(question, tables, content.config.netfilter(), "files", lambda _: ETHERNET)
