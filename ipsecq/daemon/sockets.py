"""Policies of sockets: which socket gets which mark, who may ask for what, and what goes when sockets go.

A socket's state is its own mark, so nothing here has to be kept for it; what is kept are the pairs of policies by mark,
and of each socket the inode, to see when the last one with a mark is gone (:mod:`ipsecq.daemon.liveness`; those that a
listener's accept(2) made have its mark, and sock_diag lists them).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ipsecq.daemon import socketstore
from ipsecq.daemon.authority import Authority
from ipsecq.daemon.liveness import Watch
from ipsecq.daemon.log import LOGGER
from ipsecq.datapath.sockdiag import SockDiag
from ipsecq.errors import PolicySyntaxError, SpdError
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.numbers import Direction
from ipsecq.pfkey.somark import get_mark, set_mark
from ipsecq.policy import sockets as model
from ipsecq.policy.setpolicy import parse
from ipsecq.policy.sockets import MarkField, SocketPolicy, SocketRule

log: Final = logging.getLogger(f"{LOGGER}.sockets")

MAX_SOCKETS: Final = 1024
"""Sockets with policies that one user without privilege may have."""
MAX_PAIRS: Final = 32
"""Different pairs of policies among them: each costs entries in the kernel's maps and in every worker."""
GONE_SECONDS: Final = 10.0
"""For how long packets with a mark that no socket has any more are dropped, before it is forgotten."""
DUMP_SECONDS: Final = 2.0
"""Between two looks at all sockets while a mark may be in use by accepted ones only."""
_SO_NETNS_COOKIE: Final = 71

_Pair = tuple[SocketRule | None, SocketRule | None]


class SocketPolicies:
    """One daemon's.  ``publish`` is the supervisor's; all methods belong to its event loop."""

    def __init__(
        self, authority: Authority, settings: NetfilterSettings, directory: Path, boot: bytes,
        publish: Callable[[], Awaitable[None]],
    ) -> None:  # fmt: skip
        """``authority`` may hold policies that a daemon before us gave to sockets: they stay in force."""
        self._authority, self._settings, self._publish = authority, settings, publish
        self._directory, self._boot = directory, boot
        self._field = MarkField(settings.mark_sockets)
        self._marks: dict[_Pair, int] = {
            (policy.inbound, policy.outbound): mark for mark, policy in authority.spd.sockets.items()
        }
        self._inherited = set(self._marks.values())
        """Of sockets that are known by their mark alone: nobody can tell when the last of them is gone."""
        self._leaving: dict[int, float] = {}
        self._sockets: dict[int, tuple[int, int]] = {}
        """Inode → (mark, user)."""
        self._last = max((policy.number for policy in authority.spd.sockets.values()), default=0)
        self._next_reqid = model.FIRST_REQID + self._last * 4
        self._watch = Watch()
        self._busy = asyncio.Lock()
        self._next_dump = 0.0
        self._diag: SockDiag | None = None
        self._netns = b""
        with contextlib.suppress(OSError):
            self._diag = SockDiag()
            self._diag.marks(settings.mark_sockets or 1)
            self._netns = _netns(self._diag.socket)
        if self._diag is None:
            log.warning("no sock_diag here: inbound policies of sockets are refused, and those set stay for good")

    def close(self) -> None:
        """Close descriptors; what sockets have, they keep."""
        self._watch.close()
        if self._diag is not None:
            self._diag.close()

    # -- what is asked -----------------------------------------------------------------------------------------------

    async def set(self, sock: socket.socket, text: str, *, privileged: bool, user: int) -> None:
        """Give ``sock``, a duplicate of the caller's, a policy.  It is in force when this returns.

        SpdError with an errno: EINVAL (the policy), EACCES (privilege), EOPNOTSUPP (no such thing for this socket, or
        here), ENOBUFS (too many).  DaemonError, NetfilterError when it cannot be put into force.
        """
        rule, direction = self._checked(sock, text, privileged)
        async with self._busy:
            mark = get_mark(sock)
            before = self._pair_of(mark)
            changes = model.check_change(before[direction is Direction.OUT], rule, privileged=privileged)
            if not changes and not (rule is not None and model.wants_reqid(rule.spec)):
                return
            pair = (rule, before[1]) if direction is Direction.IN else (before[0], rule)
            wanted = await self._mark_for(sock, pair, privileged=privileged, user=user)
            ours = self._settings.mark_sockets | self._settings.mark_mask
            try:
                set_mark(sock, mark & ~ours | wanted)
            except OSError as error:
                raise SpdError(f"SO_MARK: {error.strerror}", error.errno or errno.EPERM) from error

    def get(self, sock: socket.socket, direction: Direction) -> str:
        """The string of a socket's policy; ``in entrust`` or ``out entrust`` for one without."""
        rule = self._pair_of(get_mark(sock))[direction is Direction.OUT]
        return f"{direction.name.lower()} entrust" if rule is None else rule.text

    def _checked(self, sock: socket.socket, text: str, privileged: bool) -> tuple[SocketRule | None, Direction]:
        """The rule and its direction, when this socket can have it."""
        if not self._settings.mark_sockets:
            raise SpdError("policies of sockets are off: mark_sockets is 0", errno.EOPNOTSUPP)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise SpdError("only sockets of IPv4 and IPv6 have policies", errno.EOPNOTSUPP)
        if self._netns and _netns(sock) != self._netns:
            raise SpdError("the socket is of another network namespace than the daemon", errno.EOPNOTSUPP)
        try:
            spec = parse(text)
        except PolicySyntaxError as error:
            raise SpdError(str(error), errno.EINVAL) from None
        rule = model.rule_of(spec, privileged=privileged)
        if rule is not None and spec.direction is Direction.IN:
            if sock.proto not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                raise SpdError("inbound, only sockets of TCP and UDP have policies of their own", errno.EOPNOTSUPP)
            if not self._settings.socket_match or self._diag is None:
                raise SpdError("inbound, this kernel cannot tell sockets (nft socket, sock_diag)", errno.EOPNOTSUPP)
        return rule, spec.direction

    def _pair_of(self, mark: int) -> _Pair:
        if mark & self._settings.mark_mask == self._settings.mark_done:
            return _BYPASS
        found = self._authority.spd.sockets.get(mark & self._settings.mark_sockets)
        return (None, None) if found is None or found.mark in self._leaving else (found.inbound, found.outbound)

    async def _mark_for(self, sock: socket.socket, pair: _Pair, *, privileged: bool, user: int) -> int:
        """The mark that stands for a pair, after everybody knows it; the socket is watched from here on."""
        inode = os.fstat(sock.fileno()).st_ino
        if pair == (None, None):
            self._sockets.pop(inode, None)
            return 0
        if pair == _BYPASS:
            self._sockets.pop(inode, None)
            return self._settings.mark_done
        if not privileged:
            self._look()
            mine = {inode: mark for inode, (mark, owner) in self._sockets.items() if owner == user}
            if inode not in mine and len(mine) >= MAX_SOCKETS:
                raise SpdError(f"user {user} has {MAX_SOCKETS} sockets with policies", errno.ENOBUFS)
            if self._marks.get(pair) not in mine.values() and len(set(mine.values())) >= MAX_PAIRS:
                raise SpdError(f"user {user} has {MAX_PAIRS} different policies of sockets", errno.ENOBUFS)
        mark = self._marks.get(pair)
        fresh = mark is None
        if mark is None:
            mark = self._allocate(pair)
        elif pair[0] is not None:
            # What workers remember about flows of this socket is from before.
            self._authority.again(self._authority.spd.sockets[mark])
        try:
            self._watch.add(sock.fileno())
        except OSError as error:
            raise SpdError(f"{error.strerror}", errno.ENOBUFS) from error
        self._sockets[inode] = mark, user
        if self._authority.changed:
            await self._publish()
        if fresh:
            self._save()
        return mark

    def _allocate(self, pair: _Pair) -> int:
        taken = self._authority.spd.sockets
        for _ in range(self._field.largest):
            self._last += 1
            mark = self._field.mark((self._last - 1) % self._field.largest + 1)
            if mark not in taken:
                break
        else:
            raise SpdError(f"all {self._field.largest} marks for policies of sockets are in use", errno.ENOBUFS)
        self._authority.put_socket(SocketPolicy(mark, self._own(pair[0]), self._own(pair[1]), self._last))
        if not any(rule is not None and model.wants_reqid(rule.spec) for rule in pair):
            self._marks[pair] = mark
        return mark

    def _own(self, rule: SocketRule | None) -> SocketRule | None:
        """``unique`` without a number gets one of its own."""
        if rule is None or not model.wants_reqid(rule.spec):
            return rule
        spec = model.with_reqids(rule.spec, self._next_reqid)
        self._next_reqid += len(spec.transforms)
        return replace(rule, spec=spec)

    # -- what goes ---------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """To be called often: policies whose sockets are gone go."""
        now = time.monotonic()
        if not self._sockets and not self._leaving and len(self._authority.spd.sockets) == len(self._inherited):
            return
        async with self._busy:
            for mark in [mark for mark, until in self._leaving.items() if until <= now]:
                del self._leaving[mark]
                self._authority.drop_socket(mark)
            self._look()
            in_use = {mark for mark, _ in self._sockets.values()} | self._inherited | self._leaving.keys()
            idle = self._authority.spd.sockets.keys() - in_use
            if idle and now >= self._next_dump and self._diag is not None:
                self._next_dump = now + DUMP_SECONDS
                # Those that accept(2) made, and what the kernel still sends for closed ones.
                idle -= await asyncio.to_thread(self._diag.marks, self._settings.mark_sockets)
                for mark in idle:
                    self._retire(mark, now)
                if idle:
                    self._save()
            if self._authority.changed:
                await self._publish()

    def _look(self) -> None:
        """Forget the sockets that nobody has open."""
        if self._sockets:
            alive = self._watch.alive()
            for inode in self._sockets.keys() - alive:
                del self._sockets[inode]

    def _retire(self, mark: int, now: float) -> None:
        policy = self._authority.spd.sockets[mark]
        self._marks.pop((policy.inbound, policy.outbound), None)
        self._leaving[mark] = now + GONE_SECONDS
        self._authority.put_socket(model.gone(mark, policy.number))

    def _save(self) -> None:
        living = [policy for mark, policy in self._authority.spd.sockets.items() if mark not in self._leaving]
        try:
            socketstore.save(self._directory, self._boot, living)
        except OSError as error:
            log.error("%s: %s: after a restart, sockets will not have their policies", self._directory, error.strerror)

    # -- what is shown -----------------------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """(different pairs of policies in force, sockets that asked for one and live)."""
        return len(self._authority.spd.sockets) - len(self._leaving), len(self._sockets)

    def show(self) -> list[dict[str, Any]]:
        """For ``ipsecq status``: each pair with its number of sockets."""
        users = Counter(mark for mark, _ in self._sockets.values())
        return [
            {
                "mark": f"0x{mark:08x}",
                "in": policy.inbound.text if policy.inbound else "in entrust",
                "out": policy.outbound.text if policy.outbound else "out entrust",
                "privileged": any(rule is not None and rule.privileged for rule in (policy.inbound, policy.outbound)),
                "sockets": users[mark],
                "inherited": mark in self._inherited,
            }
            for mark, policy in list(self._authority.spd.sockets.items())
            if mark not in self._leaving
        ]


_BYPASS: Final[_Pair] = (
    SocketRule(parse("in bypass"), privileged=True), SocketRule(parse("out bypass"), privileged=True)
)  # fmt: skip
"""Both ways out of the system's policies: what the DONE bit of the mark means anyway."""


def _netns(sock: socket.socket) -> bytes:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, struct.calcsize("=Q"))
    except OSError:  # before Linux 5.14
        return b""
