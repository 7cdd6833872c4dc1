"""The clients of the PF_KEY server, and who gets which message (RFC 2367 section 3).

Nothing is sent here: what is to be sent collects in an outbox of (client id, datagram), which the server hands to its
caller.  A message is written once for each dialect and each right to see keys, not once for each client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ipsecq.pfkey.constants import Dialect
from ipsecq.pfkey.messages import Message, build

Maker = Callable[[Dialect], Message]
"""Makes a message in one dialect: algorithm numbers and some units depend on it."""


@dataclass(slots=True)
class Client:
    """One open socket."""

    id: int
    privileged: bool
    """Root: sees keys.  Others, let in by the socket's group, get the same messages without the key extensions."""
    dialect: Dialect
    registered: int = 0
    """Bit *n* is set: SADB_REGISTER came for SA type *n*."""
    promiscuous: bool = False
    dump: Iterator[Maker] | None = None
    dump_left: int = 0


@dataclass(slots=True)
class Hub:
    """All clients, by id, and the outbox."""

    clients: dict[int, Client] = field(default_factory=dict)
    outbox: list[tuple[int, bytes]] = field(default_factory=list)

    def take(self) -> list[tuple[int, bytes]]:
        """Empty the outbox into the caller's hands."""
        sent, self.outbox = self.outbox, []
        return sent

    def unicast(self, client: Client, make: Maker) -> None:
        """To one client, and to the promiscuous ones."""
        self._send(make, lambda _: False, client)

    def broadcast(self, make: Maker) -> None:
        """To all clients, the sender of the request among them."""
        self._send(make, lambda _: True, None)

    def to_registered(self, make: Maker, satype: int, also: Client | None = None) -> None:
        """To the clients that registered for ``satype``, and to ``also``, once."""
        self._send(make, lambda client: bool(client.registered >> satype & 1), also)

    def anyone_registered(self, satype: int) -> bool:
        """Is there a client to send an SADB_ACQUIRE for ``satype`` to?"""
        return any(client.registered >> satype & 1 for client in self.clients.values())

    def anyone_registered_at_all(self) -> bool:
        """Is any key management there?"""
        return any(client.registered for client in self.clients.values())

    def _send(self, make: Maker, meant: Callable[[Client], bool], also: Client | None) -> None:
        written: dict[tuple[Dialect, bool], bytes] = {}
        for client in self.clients.values():
            # As in Linux, a promiscuous client that is meant anyway gets the message twice.
            copies = client.promiscuous + (client is also or meant(client))
            if not copies:
                continue
            form = (client.dialect, client.privileged)
            if form not in written:
                written[form] = render(make, client)
            self.outbox += [(client.id, written[form])] * copies


def render(make: Maker, client: Client) -> bytes:
    """The datagram as this client may see it."""
    message = make(client.dialect)
    if not client.privileged:
        message.key_auth = message.key_encrypt = None
    return build(message, client.dialect)
