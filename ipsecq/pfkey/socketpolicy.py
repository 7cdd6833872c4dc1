"""Per-socket policies of unmodified programs: what ``setsockopt(IP_IPSEC_POLICY)`` does under ``ipsecq exec``.

``bypass`` needs nothing but the packet mark: a socket that carries the DONE bit is left alone by our rules in both
directions (outbound by its packets' mark, inbound by nft's ``socket mark``).  One bit serves both, so it is set when
the program has asked for both, as every IKE daemon does for its own port; until then the system's policies hold.
Policies that protect (``ipsec``) are the daemon's business, handed on to ``protect``.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ipsecq.numbers import Action
from ipsecq.pfkey.constants import DIR_IN, DIR_OUT
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.policyext import PolicyExt
from ipsecq.pfkey.seccomp import IP_IPSEC_POLICY

SO_MARK: Final = 36
_REMEMBERED: Final = 4096
"""Sockets with half a bypass that are remembered; the oldest are forgotten first."""
_BOTH: Final = 1 << DIR_IN | 1 << DIR_OUT


@dataclass(slots=True, frozen=True)
class OptionRequest:
    """One setsockopt of a per-socket policy."""

    socket: socket.socket
    """A duplicate of the program's own socket, closed after the call."""
    level: int
    option: int
    value: bytes
    """A ``sadb_x_policy`` with its requests (:meth:`PolicyExt.from_option`); empty: remove the policies."""
    privileged: bool
    """The program has CAP_NET_ADMIN."""


Protect = Callable[[OptionRequest, PolicyExt], int]
"""Set a policy of type ``ipsec`` for a socket; returns an errno, or 0."""


@dataclass(slots=True)
class SocketPolicies:
    """The hook for :class:`ipsecq.pfkey.notify.Responder`: called with a request, returns an errno or 0."""

    mark_done: int
    mark_mask: int
    protect: Protect | None = None
    _bypassed: dict[int, int] = field(default_factory=dict)
    """Inode of a socket to the directions (bits by IPSEC_DIR_*) in which it asked for bypass."""

    def __call__(self, request: OptionRequest) -> int:
        """Errnos as Linux gives them: EPERM, EOPNOTSUPP (family and option), EINVAL (the policy)."""
        if not request.privileged:
            return errno.EPERM
        wanted = socket.AF_INET if request.option == IP_IPSEC_POLICY else socket.AF_INET6
        if request.socket.family != wanted:
            return errno.EOPNOTSUPP
        if not request.value:
            return self._change(request.socket, _BOTH, bypass=False)
        try:
            policy = PolicyExt.from_option(request.value)
        except PfkeyError as error:
            return error.errno
        if policy.direction not in (DIR_IN, DIR_OUT) or policy.type > Action.BYPASS:
            return errno.EINVAL
        if policy.type == Action.BYPASS:
            return self._change(request.socket, 1 << policy.direction, bypass=True)
        failed = self._change(request.socket, 1 << policy.direction, bypass=False)
        if failed or policy.type == Action.ENTRUST:
            # entrust is what every socket starts with: the system's policies decide.
            return failed
        if policy.type != Action.IPSEC or self.protect is None:
            return errno.EOPNOTSUPP
        return self.protect(request, policy)

    def _change(self, sock: socket.socket, directions: int, *, bypass: bool) -> int:
        inode = os.fstat(sock.fileno()).st_ino
        old = self._bypassed.pop(inode, 0)
        new = old | directions if bypass else old & ~directions
        if new:
            self._bypassed[inode] = new
            if len(self._bypassed) > _REMEMBERED:
                del self._bypassed[next(iter(self._bypassed))]
        if not bypass and not old:
            return 0
        try:
            mark = sock.getsockopt(socket.SOL_SOCKET, SO_MARK) & ~self.mark_mask
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark | (self.mark_done if new == _BOTH else 0))
        except OSError as error:
            return error.errno or errno.EPERM
        return 0
