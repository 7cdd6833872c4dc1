"""Key management: the PF_KEY server on top of the authority, and what the packet path has to tell it.

A reply leaves when every worker has what it answers for: a daemon that was told "added" may let its peer use the SA.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.config import Config
from ipsecq.daemon.log import LOGGER
from ipsecq.errors import DaemonError, IpsecqError, SadError, SpdError
from ipsecq.numbers import Direction, Protocol, SaState
from ipsecq.pfkey.constants import Dialect, MessageType
from ipsecq.pfkey.database import Usage
from ipsecq.pfkey.saconvert import SATYPE_OF
from ipsecq.pfkey.server import Datagrams, PfkeyServer
from ipsecq.pfkey.socket_server import PfkeySocketServer
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sa.association import SaKey, SecurityAssociation, Slot

log: Final = logging.getLogger(f"{LOGGER}.keys")

MAX_ACQUIRES: Final = 4096
"""Questions to key management without an answer; a scan through a wide transport policy asks for a pair each packet."""
LOG_SECONDS: Final = 10.0
"""Between two lines about SAs that nobody negotiates."""


class AuthorityDatabase:
    """:class:`ipsecq.pfkey.database.SecurityDatabase` over the supervisor's originals."""

    def __init__(
        self,
        authority: Authority,
        acquire_failed: Callable[[int, bytes, bytes, int], None],
        clock: Callable[[], float] = time.time,
        interfaces: Callable[[], dict[int, Policy]] = dict,
    ) -> None:
        """``interfaces``: the policies of route-based tunnels by their ids, which are not in the SPD."""
        self._authority, self._clock, self._interfaces = authority, clock, interfaces
        self.acquire_failed = acquire_failed

    def find_sa(self, key: SaKey) -> SecurityAssociation | None:  # noqa: D102
        return self._authority.sad.get(*key) if key in self._authority.sad else None

    def add_sa(self, sa: SecurityAssociation, *, negotiated: bool = False) -> None:  # noqa: D102
        with _pfkey_errors():
            self._authority.add_sa(sa, passing=negotiated)

    def update_sa(self, sa: SecurityAssociation, *, negotiated: bool = False) -> None:  # noqa: D102
        with _pfkey_errors():
            self._authority.update_sa(sa, passing=negotiated)

    def delete_sa(self, key: SaKey) -> SecurityAssociation:  # noqa: D102
        return self._authority.retire_sa(key, self._clock())

    def flush_sas(self, protocol: int | None) -> Sequence[SecurityAssociation]:  # noqa: D102
        return self._authority.flush_sas(protocol)

    def sas(self, protocol: int | None) -> Sequence[SecurityAssociation]:  # noqa: D102
        return self._authority.sad.dump(protocol)

    def usage(self, sa: SecurityAssociation) -> Usage:  # noqa: D102
        words = self._authority.usage_words(sa)
        if words is None:
            return Usage()
        return Usage(words[Slot.PACKETS], words[Slot.BYTES], words[Slot.FIRST_USE], words[Slot.SEQUENCE])

    def add_policy(self, policy: Policy) -> Policy:  # noqa: D102
        return self._authority.add_policy(policy)

    def update_policy(self, policy: Policy) -> Policy:  # noqa: D102
        return self._authority.update_policy(policy)

    def delete_policy(self, policy_id: int) -> Policy:  # noqa: D102
        return self._authority.delete_policy(policy_id)

    def find_policy(self, direction: Direction, selector: Selector) -> Policy | None:  # noqa: D102
        return self._authority.spd.find(direction, selector)

    def get_policy(self, policy_id: int) -> Policy:  # noqa: D102
        return self._interfaces().get(policy_id) or self._authority.spd.get(policy_id)

    def flush_policies(self) -> Sequence[Policy]:  # noqa: D102
        return self._authority.flush_policies()

    def policies(self) -> Sequence[Policy]:  # noqa: D102
        return self._authority.spd.dump()


class Barrier:
    """Holds replies back until all workers have what they answer for, in order (``socket_server.Barrier``).

    While one publication is under way the next changes collect, so a client that sends a thousand requests without
    waiting costs a few publications, not a thousand.
    """

    def __init__(
        self,
        authority: Authority,
        publish: Callable[[], Awaitable[None]],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._authority, self._publish, self._spawn = authority, publish, spawn
        self._waiting: list[Callable[[], None]] = []
        self._busy = False

    def __call__(self, release: Callable[[], None]) -> None:
        """Call ``release`` when everything changed so far is in force."""
        if not self._busy and not self._authority.changed:
            release()
            return
        self._waiting.append(release)
        if not self._busy:
            self._busy = True
            self._spawn(self._serve())

    async def _serve(self) -> None:
        try:
            while self._waiting:
                released, self._waiting = self._waiting, []
                try:
                    await self._publish()
                except IpsecqError as error:
                    # The change stays in the originals and goes out with the next one; a new worker gets it anyway.
                    log.error("%s", error)  # the message says it all
                for release in released:
                    release()
        finally:
            self._busy = False


class KeyService:
    """PF_KEY of one daemon.  ``publish`` and ``spawn`` are the supervisor's; all methods belong to its event loop."""

    def __init__(
        self,
        authority: Authority,
        config: Config,
        publish: Callable[[], Awaitable[None]],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        acquire_failed: Callable[[int, bytes, bytes, int], None],
        interfaces: Callable[[], dict[int, Policy]] = dict,
    ) -> None:
        self._authority, self._interfaces = authority, interfaces
        database = AuthorityDatabase(authority, acquire_failed, interfaces=interfaces)
        self.server = PfkeyServer(
            database, time.time, secrets.randbelow, allow_legacy=config.daemon.allow_legacy, knobs=authority.sysctl.key
        )
        self._barrier = Barrier(authority, publish, spawn)
        self.sockets = PfkeySocketServer(self.server, self._barrier)
        self._next_tick = 0.0
        self._next_log = 0.0
        group = _group(config.daemon.group)
        try:
            self.sockets.listen(config.pfkey_socket, group=group)
            if config.daemon.pfkey_freebsd:
                path = config.pfkey_socket
                self.sockets.listen(path.with_name(path.name + ".freebsd"), group=group, dialect=Dialect.FREEBSD)
        except BaseException:
            self.sockets.close()
            raise

    def fileno(self) -> int:
        """Readable when :meth:`on_readable` has something to do."""
        return self.sockets.fileno()

    def on_readable(self) -> None:
        """Serve what is ready."""
        self.sockets.on_readable()

    def close(self) -> None:
        """Close all sockets and remove their files."""
        self.sockets.close()

    def tick(self) -> None:
        """To be called often; once a second something is done: larval SAs and unanswered ACQUIREs die."""
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + 1.0
            self._send(self.server.tick())

    # -- changes by setkey, which listeners hear of --------------------------------------------------------------------

    def added(self, sa: SecurityAssociation) -> None:
        """An SA was added."""
        self.server.sadb.announce(MessageType.ADD, sa)
        self._send(self.server.changed())

    def deleted(self, sa: SecurityAssociation) -> None:
        """An SA was deleted."""
        self.server.sadb.announce(MessageType.DELETE, sa)
        self._send(self.server.changed())

    def flushed(self, gone: Sequence[SecurityAssociation], protocol: Protocol | None) -> None:
        """All SAs (of one protocol) were deleted."""
        if gone:
            self.server.sadb.announce_flush(int(SATYPE_OF[protocol]) if protocol is not None else 0)
            self._send(self.server.changed())

    def put_policy(self, policy: Policy, *, exclusive: bool) -> None:
        """Add or replace.  SpdError EEXIST."""
        self.server.spdb.put(policy, exclusive=exclusive)
        self._send(self.server.changed())

    def delete_policy(self, direction: Direction, selector: Selector) -> None:
        """Remove.  SpdError ENOENT."""
        self.server.spdb.remove(direction, selector)
        self._send(self.server.changed())

    def flush_policies(self) -> None:
        """Remove all."""
        self.server.spdb.clear()
        self._send(self.server.changed())

    # -- news of the packet path -------------------------------------------------------------------------------------

    def acquire(self, policy_id: int, protocol: int, mode: int, src: bytes, dst: bytes, reqid: int) -> bool:
        """A packet waits for an SA (a worker's words, checked against the SPD); False: not true, or too many do."""
        if len(src) != len(dst) or len(src) not in (4, 16) or len(self.server.acquires) >= MAX_ACQUIRES:
            return False
        try:
            policy = self._interfaces().get(policy_id) or self._authority.policy(policy_id)
        except SpdError:
            return False  # deleted a moment ago
        for transform in policy.transforms:
            if _asks(transform, protocol, mode, src, dst, reqid):
                sent = self.server.acquire(policy, transform, src, dst)
                self._send(sent)
                if not sent and not self.server.hub.anyone_registered_at_all():
                    self._nobody(policy)
                return True
        return False

    def _nobody(self, policy: Policy) -> None:
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + LOG_SECONDS
            interface = policy.id in self._interfaces()
            who = f"interface {policy.label}" if interface else f"policy {policy.id}"
            log.warning("%s wants an SA and no key management is running: add it with ipsecq setkey", who)

    def expired(self, found: Iterable[tuple[SecurityAssociation, bool]]) -> None:
        """SAs that reached a limit, as :meth:`Authority.expire` says."""
        for sa, hard in found:
            self._send(self.server.expire(sa, hard=hard))

    def policies_expired(self, policies: Iterable[Policy]) -> None:
        """Policies whose lifetime is over; they have gone."""
        for policy in policies:
            self._send(self.server.policy_expired(policy))

    def moved(self, key: SaKey, address: bytes, port: int) -> bool:
        """The NAT in front of the peer of an inbound SA has changed (a worker's words); False: that cannot be."""
        if not 0 < port < 65536 or key not in self._authority.sad:
            return False
        sa = self._authority.sad.get(*key)
        if sa.natt is None or len(address) != len(sa.src) or sa.state is SaState.LARVAL:
            return False
        self._send(self.server.new_mapping(sa, address, port))
        return True

    def _send(self, datagrams: Datagrams) -> None:
        """Behind the replies that wait: news never overtake what they are about."""
        if datagrams:
            self._barrier(lambda: self.sockets.send(datagrams))


def _asks(transform: Transform, protocol: int, mode: int, src: bytes, dst: bytes, reqid: int) -> bool:
    return (
        transform.protocol == protocol
        and transform.mode == mode
        and transform.reqid == reqid
        and transform.src in (None, src)
        and transform.dst in (None, dst)
    )


def _group(name: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise DaemonError(f"[daemon] group: no group {name!r}; create it: groupadd --system {name}") from None


@contextlib.contextmanager
def _pfkey_errors() -> Any:
    """A full table or disk is what PF_KEY calls ENOBUFS; the daemon's log says which."""
    try:
        yield
    except (SadError, SpdError):
        raise
    except IpsecqError as error:
        log.error("%s", error)  # the message says it all
        raise SadError(str(error), errno.ENOBUFS) from error
