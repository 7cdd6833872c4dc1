"""The messages about SAs: GETSPI, UPDATE, ADD, DELETE, GET, FLUSH, DUMP, EXPIRE, NAT_T_NEW_MAPPING.

Replies are those of Linux's af_key: the whole SA, to every client where RFC 2367 says "all listeners".
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from ipsecq.numbers import Protocol, SaState
from ipsecq.pfkey import saconvert
from ipsecq.pfkey.acquire import Acquires
from ipsecq.pfkey.constants import CPI_MAX, SPI_MIN, Dialect, MessageType
from ipsecq.pfkey.database import SecurityDatabase, Usage
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import Sa
from ipsecq.pfkey.hub import Client, Hub, Maker
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.xextensions import NatPort
from ipsecq.sa.association import Lifetime, SaKey, SecurityAssociation
from ipsecq.sysctl import KeyKnobs

MAX_LARVAL: Final = 8192
"""Larval SAs of all clients: each is a GETSPI that a peer's IKE message can cause."""
MAX_LARVAL_CLIENT: Final = 4096
"""Larval SAs of one client."""
_TRIES = 64
"""Random draws before the range is searched from a random start: enough for any range that is not nearly full."""


@dataclass(slots=True)
class SaHandlers:
    """Handlers by message type; each takes (client, message), raises PfkeyError and the databases' errors."""

    database: SecurityDatabase
    hub: Hub
    acquires: Acquires
    clock: Callable[[], float]
    randbelow: Callable[[int], int]
    allow_legacy: bool
    knobs: KeyKnobs
    _larvals: deque[tuple[float, SecurityAssociation, int]] = field(default_factory=deque)
    """(when it was made, SA, client id); those that have matured meanwhile are still there."""

    # -- requests --------------------------------------------------------------------------------------

    def getspi(self, client: Client, message: Message) -> None:
        """Make a larval SA with a free SPI of the range; it dies unless an UPDATE comes in time."""
        src, dst = saconvert.need_addresses(message)
        protocol = saconvert.need_protocol(message.satype)
        low, high = self._range(message, protocol)
        mode, reqid = saconvert.mode_of(message), message.sa2.reqid if message.sa2 else 0
        now = self.clock()
        self._need_room(client)
        spi = self._free_spi(dst.address, protocol, low, high, client.dialect)
        larval = SecurityAssociation(
            protocol, spi, src.address, dst.address, mode=mode, reqid=reqid, state=SaState.LARVAL,
            hard=Lifetime(addtime=self.knobs.larval_lifetime), seq=message.seq, pid=message.pid, created=now,
            label=f"pfkey:{message.pid}",
        )  # fmt: skip
        self.database.add_sa(larval)
        self._larvals.append((now, larval, client.id))
        self.hub.unicast(client, self._describe(larval, MessageType.GETSPI, message.seq, message.pid))

    def _need_room(self, client: Client) -> None:
        """PfkeyError ENOBUFS when too many larval SAs wait to be completed."""
        if len(self._larvals) < MAX_LARVAL_CLIENT:
            return
        self._larvals = deque(entry for entry in self._larvals if self._is_larval(entry[1]))
        mine = sum(owner == client.id for _, _, owner in self._larvals)
        if len(self._larvals) >= MAX_LARVAL or mine >= MAX_LARVAL_CLIENT:
            raise PfkeyError(f"{len(self._larvals)} larval SAs wait to be completed: no room for more", errno.ENOBUFS)

    def _is_larval(self, sa: SecurityAssociation) -> bool:
        return self.database.find_sa(sa.key) is sa and sa.state is SaState.LARVAL

    def _range(self, message: Message, protocol: Protocol) -> tuple[int, int]:
        if message.spirange is None:
            if protocol is Protocol.IPCOMP:
                return SPI_MIN, CPI_MAX
            low, high = self.knobs.spi_minval, self.knobs.spi_maxval
            # Set one by one, by a reload and by hand, they may have passed each other.
            return (low, high) if low <= high else (high, low)
        low, high = message.spirange.min, message.spirange.max
        if low > high:
            raise PfkeyError(f"SPI range {low:#x} to {high:#x} is empty")
        if protocol is Protocol.IPCOMP and high > 0xFFFF:
            raise PfkeyError(f"CPI range up to {high:#x}: a CPI has 16 bits")
        # Reserved SPIs are never given, even where the range asks for them.
        low = max(low, 0x100)
        if low > high:
            raise PfkeyError(f"SPI range up to {high:#x}: 0 to 0xff are reserved")
        return low, high

    def _free_spi(self, dst: bytes, protocol: Protocol, low: int, high: int, dialect: Dialect) -> int:
        width = high - low + 1
        for _ in range(_TRIES):
            spi = low + self.randbelow(width)
            if self.database.find_sa(SaKey(dst, int(protocol), spi)) is None:
                return spi
        # More than the SAD can hold is never searched: some SPI among so many is free.
        start = self.randbelow(width)
        for step in range(min(width, 1 << 20)):
            spi = low + (start + step) % width
            if self.database.find_sa(SaKey(dst, int(protocol), spi)) is None:
                return spi
        number = errno.ENOENT if dialect is Dialect.LINUX else errno.EEXIST
        raise PfkeyError(f"every SPI from {low:#x} to {high:#x} is in use", number)

    def add(self, client: Client, message: Message) -> None:
        """SADB_ADD: a new SA, at once mature."""
        sa = saconvert.to_association(message, client.dialect, self.clock(), self.allow_legacy)
        self.database.add_sa(sa, negotiated=_negotiates(client, message))
        self.acquires.answered(sa)
        self.hub.broadcast(self._describe(sa, MessageType.ADD, message.seq, message.pid))

    def update(self, client: Client, message: Message) -> None:
        """SADB_UPDATE: a larval SA matures, or an SA in use gets other lifetimes or another NAT mapping."""
        sa = saconvert.to_association(message, client.dialect, self.clock(), self.allow_legacy)
        old = self.database.find_sa(sa.key)
        if old is None or old.state is SaState.DEAD:
            raise PfkeyError(f"no SA with SPI {sa.spi:#x} for this protocol and destination", errno.ESRCH)
        if old.state is not SaState.LARVAL:
            sa = saconvert.merged_update(old, sa)
        self.database.update_sa(sa, negotiated=old.state is SaState.LARVAL or _negotiates(client, message))
        self.acquires.answered(sa)
        self.hub.broadcast(self._describe(sa, MessageType.UPDATE, message.seq, message.pid))

    def delete(self, client: Client, message: Message) -> None:
        """SADB_DELETE: one SA; of a FreeBSD client without the SA extension, all SAs between two addresses."""
        if message.sa is None and client.dialect is Dialect.FREEBSD:
            self._delete_all(message)
            return
        sa = self._need(message)
        self.database.delete_sa(sa.key)
        gone = replace(sa, state=SaState.DEAD)
        self.hub.broadcast(self._describe(gone, MessageType.DELETE, message.seq, message.pid))

    def _delete_all(self, message: Message) -> None:
        src, dst = saconvert.need_addresses(message)
        protocol = saconvert.need_protocol(message.satype)
        gone = [
            sa
            for sa in self.database.sas(int(protocol))
            if sa.src == src.address and sa.dst == dst.address and sa.state is not SaState.LARVAL
        ]
        for sa in gone:
            self.database.delete_sa(sa.key)
        reply = Message(MessageType.DELETE, message.satype, seq=message.seq, pid=message.pid, src=src, dst=dst)
        self.hub.broadcast(lambda _: replace(reply))

    def get(self, client: Client, message: Message) -> None:
        """SADB_GET: one SA, to the one who asked."""
        self.hub.unicast(client, self._describe(self._need(message), MessageType.GET, message.seq, message.pid))

    def flush(self, client: Client, message: Message) -> None:
        """SADB_FLUSH: all SAs, of one type or of all; an empty SAD is no error."""
        protocol = saconvert.protocol_of(message.satype)
        gone = self.database.flush_sas(None if protocol is None else int(protocol))
        reply = Message(MessageType.FLUSH, message.satype, seq=message.seq, pid=message.pid)
        # As in Linux: a receipt to the sender, then the news to all, if there is news.
        self.hub.unicast(client, lambda _: replace(reply))
        if gone:
            self.hub.broadcast(lambda _: replace(reply))

    def dump(self, client: Client, message: Message) -> tuple[int, Iterator[Maker]]:
        """SADB_DUMP: (how many, their messages), of the SAD as it is now."""
        protocol = saconvert.protocol_of(message.satype)
        chosen = self.database.sas(None if protocol is None else int(protocol))
        if message.filter is not None:
            chosen = [sa for sa in chosen if message.filter.matches(sa.src, sa.dst)]
        pid, count = message.pid, len(chosen)
        return count, (
            self._describe(sa, MessageType.DUMP, count - index, pid) for index, sa in enumerate(chosen, start=1)
        )

    def announce(self, kind: MessageType, sa: SecurityAssociation) -> None:
        """ADD or DELETE of an SA by somebody who isn't a PF_KEY client: to all listeners."""
        if kind is MessageType.ADD:
            self.acquires.answered(sa)
        shown = sa if kind is MessageType.ADD else replace(sa, state=SaState.DEAD)
        self.hub.broadcast(self._describe(shown, kind, 0, 0))

    def announce_flush(self, satype: int) -> None:
        """FLUSH by somebody who isn't a PF_KEY client."""
        self.hub.broadcast(lambda _: Message(MessageType.FLUSH, satype))

    # -- events ----------------------------------------------------------------------------------------

    def expire(self, sa: SecurityAssociation, *, hard: bool) -> None:
        """SADB_EXPIRE: a soft limit was reached, or a hard one and the SA has gone.  No keys in it."""
        shown = replace(sa, state=SaState.DEAD if hard else SaState.DYING)
        usage = self.database.usage(sa)

        def make(dialect: Dialect) -> Message:
            made = saconvert.from_association(shown, usage, dialect, keys=False, hard=hard, soft=not hard)
            made.type = MessageType.EXPIRE
            return made

        self.hub.to_registered(make, saconvert.SATYPE_OF[sa.protocol])

    def expire_larvals(self, now: float) -> None:
        """Remove larval SAs whose time is over."""
        while self._larvals and self._larvals[0][0] + self.knobs.larval_lifetime <= now:
            larval = self._larvals.popleft()[1]
            if self._is_larval(larval):
                self.database.delete_sa(larval.key)
                self.expire(larval, hard=True)

    def new_mapping(self, sa: SecurityAssociation, address: bytes, port: int) -> None:
        """SADB_X_NAT_T_NEW_MAPPING: the peer behind ``sa`` (inbound) now sends from ``address`` and ``port``."""

        def make(dialect: Dialect) -> Message:
            return Message(
                MessageType.X_NAT_T_NEW_MAPPING, saconvert.SATYPE_OF[sa.protocol], seq=sa.seq,
                sa=Sa(sa.spi),
                src=saconvert.host(sa.src, dialect), natt_sport=NatPort(sa.natt.sport if sa.natt else 0),
                dst=saconvert.host(address, dialect), natt_dport=NatPort(port),
            )  # fmt: skip

        self.hub.to_registered(make, saconvert.SATYPE_OF[sa.protocol])

    # -- helpers ---------------------------------------------------------------------------------------

    def _need(self, message: Message) -> SecurityAssociation:
        key = saconvert.key_of(message)
        sa = self.database.find_sa(key)
        if sa is None:
            raise PfkeyError(f"no SA with SPI {key.spi:#x} for this protocol and destination", errno.ESRCH)
        return sa

    def _describe(self, sa: SecurityAssociation, kind: MessageType, seq: int, pid: int) -> Maker:
        usage: Usage = self.database.usage(sa)

        def make(dialect: Dialect) -> Message:
            made = saconvert.from_association(sa, usage, dialect)
            made.type, made.seq, made.pid = kind, seq, pid
            return made

        return make


def _negotiates(client: Client, message: Message) -> bool:
    """Key management registers before it adds (RFC 2367 section 3.1.7); setkey(8) and scripts don't."""
    return bool(client.registered >> message.satype & 1)
