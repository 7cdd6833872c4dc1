"""The PF_KEYv2 server without its sockets: a datagram of a client in, datagrams for clients out.

The order of every request is that of Linux's af_key: copies to promiscuous clients, the base header, the extensions,
the handler; an errno goes to the sender alone, in a bare header.  A message that is refused has changed nothing.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Final

from ipsecq.errors import AlgorithmError, SadError, SpdError
from ipsecq.pfkey import algorithms
from ipsecq.pfkey.acquire import Acquires
from ipsecq.pfkey.constants import HEADER_LENGTH, SATYPE_MAX, Dialect, MessageType
from ipsecq.pfkey.database import SecurityDatabase
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.forward import ForwardPolicies
from ipsecq.pfkey.hub import Client, Hub, render
from ipsecq.pfkey.messages import Message, build, parse
from ipsecq.pfkey.saconvert import PROTOCOL_OF
from ipsecq.pfkey.sadb import SaHandlers
from ipsecq.pfkey.spdb import PolicyHandlers
from ipsecq.policy.model import Policy, Transform
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sysctl import KeyKnobs, Sysctl

Datagrams = list[tuple[int, bytes]]
"""(client id, datagram): to be sent in this order."""



class PfkeyServer:
    """State of all clients, and the handlers.  Not thread-safe: one loop owns it.

    ``clock`` returns Unix seconds, ``randbelow(n)`` an unpredictable int below ``n`` (``secrets.randbelow``).
    """

    def __init__(
        self,
        database: SecurityDatabase,
        clock: Callable[[], float],
        randbelow: Callable[[int], int],
        *,
        allow_legacy: bool = False,
        knobs: KeyKnobs | None = None,
    ) -> None:
        """``knobs``: ``net.key``; without them their defaults."""
        self.hub = Hub()
        self.acquires = Acquires()
        self._database, self._clock, self._allow_legacy = database, clock, allow_legacy
        self.sadb = SaHandlers(
            database, self.hub, self.acquires, clock, randbelow, allow_legacy, knobs or Sysctl().key
        )
        self.spdb = PolicyHandlers(database, self.hub, self.acquires, ForwardPolicies(database), clock, allow_legacy)
        self._handlers: dict[int, Callable[[Client, Message], None]] = {
            MessageType.GETSPI: self.sadb.getspi,
            MessageType.UPDATE: self.sadb.update,
            MessageType.ADD: self.sadb.add,
            MessageType.DELETE: self.sadb.delete,
            MessageType.GET: self.sadb.get,
            MessageType.ACQUIRE: self._acquire_failed,
            MessageType.REGISTER: self._register,
            MessageType.FLUSH: self.sadb.flush,
            MessageType.DUMP: self._dump,
            MessageType.X_PROMISC: self._promisc,
            MessageType.X_SPDUPDATE: self.spdb.update,
            MessageType.X_SPDADD: self.spdb.add,
            MessageType.X_SPDDELETE: self.spdb.delete,
            MessageType.X_SPDGET: self.spdb.get,
            MessageType.X_SPDDUMP: self._dump,
            MessageType.X_SPDFLUSH: self.spdb.flush,
            MessageType.X_SPDSETIDX: self.spdb.add,
            MessageType.X_SPDDELETE2: self.spdb.delete_by_id,
        }

    # -- clients ---------------------------------------------------------------------------------------

    def open(self, client_id: int, *, privileged: bool, dialect: Dialect = Dialect.LINUX) -> None:
        """A client has connected.  ``privileged``: it is root and may see keys."""
        self.hub.clients[client_id] = Client(client_id, privileged, dialect)

    def close(self, client_id: int) -> None:
        """A client has gone: its registrations and its dump go with it, SAs and policies stay."""
        self.hub.clients.pop(client_id, None)

    def handle(self, client_id: int, data: bytes) -> Datagrams:
        """One datagram of a client.  A DUMP is answered by :meth:`more`, as the client has room.  Raises nothing."""
        client = self.hub.clients[client_id]
        try:
            message = parse(data, client.dialect)
        except PfkeyError as error:
            self._refuse(client, data, error.errno)
            return self.hub.take()
        self._show(client, data, message)
        try:
            handler = self._handlers.get(message.type, _unsupported)
            if not client.privileged and message.type not in _FOR_ALL:
                handler = _forbidden
            handler(client, message)
        except (PfkeyError, SadError, SpdError) as error:
            self._refuse(client, data, error.errno)
        except AlgorithmError:
            self._refuse(client, data, errno.EINVAL)
        return self.hub.take()

    def more(self, client_id: int, limit: int) -> list[bytes]:
        """The next datagrams, at most ``limit``, of the dump that a client waits for; empty when there is none.

        They come from a snapshot, so that none is lost or sent twice however slowly the client reads.
        """
        client = self.hub.clients[client_id]
        if client.dump is None:
            return []
        datagrams = [render(make, client) for make in islice(client.dump, limit)]
        client.dump_left -= len(datagrams)
        if client.dump_left <= 0:
            client.dump = None
        return datagrams

    def dumping(self, client_id: int) -> bool:
        """Has :meth:`more` something for this client?"""
        return self.hub.clients[client_id].dump is not None

    def _show(self, client: Client, data: bytes, message: Message) -> None:
        """Requests go to promiscuous clients first; those of another dialect get them translated."""
        for other in self.hub.clients.values():
            if not other.promiscuous:
                continue
            same = other.dialect is client.dialect and other.privileged
            self.hub.outbox.append((other.id, data if same else render(lambda _: replace(message), other)))

    def _refuse(self, client: Client, data: bytes, number: int) -> None:
        """The base header back to the sender, whatever there is of it, with ``number`` as errno."""
        head = data[:HEADER_LENGTH].ljust(HEADER_LENGTH, b"\0")
        kind, satype = head[1], head[3]
        seq, pid = (int.from_bytes(head[at : at + 4], sys.byteorder) for at in (8, 12))
        self.hub.unicast(client, lambda _: Message(kind, satype, min(number, 255), seq, pid))

    # -- requests about neither SAs nor policies -------------------------------------------------------

    def _register(self, client: Client, message: Message) -> None:
        satype = message.satype
        if satype > SATYPE_MAX[client.dialect]:
            raise PfkeyError(f"SA type {satype} is unknown")
        if satype:
            if client.registered >> satype & 1:
                raise PfkeyError(f"SA type {satype} is registered already", errno.EEXIST)
            client.registered |= 1 << satype
            protocol = PROTOCOL_OF.get(satype)  # type: ignore[call-overload]
            if protocol is not None:
                self.acquires.ask_again(int(protocol))

        def make(dialect: Dialect) -> Message:
            auth, encrypt = algorithms.supported(dialect, self._allow_legacy)
            return Message(
                MessageType.REGISTER, satype, seq=message.seq, pid=message.pid,
                supported_auth=auth, supported_encrypt=encrypt,
            )  # fmt: skip

        self.hub.to_registered(make, satype, also=client)

    def _acquire_failed(self, client: Client, message: Message) -> None:
        """A key manager says that it cannot make the SA that an ACQUIRE asked for (RFC 2367 section 3.1.6)."""
        if build(message, client.dialect)[HEADER_LENGTH:]:
            raise PfkeyError("an SADB_ACQUIRE from a client is a bare header with an errno", errno.EOPNOTSUPP)
        if not message.seq or not message.errno:
            return
        failed = self.acquires.failed(message.seq)
        if failed is not None:
            self._database.acquire_failed(failed.protocol, failed.src, failed.dst, failed.reqid)

    def _dump(self, client: Client, message: Message) -> None:
        if client.dump is not None:
            raise PfkeyError("a dump to this socket is under way", errno.EBUSY)
        handlers = self.sadb.dump if message.type == MessageType.DUMP else self.spdb.dump
        count, makers = handlers(client, message)
        if not count:
            raise PfkeyError("there is nothing to dump", errno.ENOENT)
        client.dump, client.dump_left = makers, count

    def _promisc(self, client: Client, message: Message) -> None:
        bare = len(build(message, client.dialect)) == HEADER_LENGTH
        if bare:
            if message.satype > 1:
                raise PfkeyError(f"promiscuous mode {message.satype}: 0 is off, 1 is on")
            client.promiscuous = bool(message.satype)
            message.errno = 0
        self.hub.broadcast(lambda _: replace(message))

    # -- events of the gateway -------------------------------------------------------------------------

    def acquire(self, policy: Policy, transform: Transform, src: bytes, dst: bytes) -> Datagrams:
        """A packet from ``src`` to ``dst`` (the ends of the SA) needs an SA: SADB_ACQUIRE, at most one at a time."""
        self.spdb.acquire(policy, transform, src, dst)
        return self.hub.take()

    def expire(self, sa: SecurityAssociation, *, hard: bool) -> Datagrams:
        """A lifetime of ``sa`` is over: SADB_EXPIRE.  The database has changed its state, or removed it."""
        self.sadb.expire(sa, hard=hard)
        return self.hub.take()

    def new_mapping(self, sa: SecurityAssociation, address: bytes, port: int) -> Datagrams:
        """The peer behind a UDP-encapsulated SA has moved: SADB_X_NAT_T_NEW_MAPPING."""
        self.sadb.new_mapping(sa, address, port)
        return self.hub.take()

    def policy_expired(self, policy: Policy) -> Datagrams:
        """A policy's lifetime is over and the database has removed it: SADB_X_SPDEXPIRE."""
        self.spdb.expired(policy)
        return self.hub.take()

    def changed(self) -> Datagrams:
        """What ``sadb.announce``, ``spdb.put`` and their like have to tell the listeners."""
        return self.hub.take()

    def tick(self) -> Datagrams:
        """To be called once a second or so: larval SAs and unanswered ACQUIREs die."""
        now = self._clock()
        self.sadb.expire_larvals(now)
        self.acquires.expire(now)
        return self.hub.take()


_FOR_ALL: Final = frozenset(
    {
        MessageType.GET, MessageType.DUMP, MessageType.REGISTER, MessageType.X_PROMISC, MessageType.X_SPDGET,
        MessageType.X_SPDDUMP,
    }
)  # fmt: skip
"""What the members of the socket's group may ask: they look on."""


def _forbidden(client: Client, message: Message) -> None:
    raise PfkeyError("only root may change SAs and policies", errno.EPERM)


def _unsupported(client: Client, message: Message) -> None:
    raise PfkeyError(f"message type {message.type} is not for clients to send", errno.EOPNOTSUPP)
