"""Per-socket policies of unmodified programs: what ``setsockopt(IP_IPSEC_POLICY)`` does under ``ipsecq exec``.

The option's value is read here, and the daemon is asked, with the program's own socket, privilege and user.  While no
daemon answers, ``bypass`` in both directions still works for privileged programs, since all it needs is the packet
mark: a socket that carries the DONE bit is left alone by our rules.  Every IKE daemon asks for that at its start.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipsecq.errors import DaemonError, IpsecqError
from ipsecq.numbers import Action, Direction
from ipsecq.pfkey import socketclient
from ipsecq.pfkey.constants import Dialect
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.seccomp import IP_IPSEC_POLICY
from ipsecq.pfkey.somark import get_mark, set_mark
from ipsecq.pfkey.spconvert import transforms_of
from ipsecq.policy import setpolicy
from ipsecq.policy.setpolicy import PolicySpec

_REMEMBERED: Final = 4096
"""Sockets with half a bypass that are remembered; the oldest are forgotten first."""
_BOTH: Final = 1 << Direction.IN | 1 << Direction.OUT


@dataclass(slots=True, frozen=True)
class OptionRequest:
    """One setsockopt or getsockopt of a per-socket policy."""

    socket: socket.socket
    """A duplicate of the program's own socket, closed after the call."""
    level: int
    option: int
    value: bytes
    """A ``sadb_x_policy`` with its requests (:meth:`PolicyExt.from_option`); empty: remove the policies."""
    privileged: bool
    """The program has CAP_NET_ADMIN."""
    user: int = 0
    """Its effective user id."""


@dataclass(slots=True)
class SocketPolicies:
    """The hook for :class:`ipsecq.pfkey.notify.Responder`."""

    mark_done: int
    mark_mask: int
    path: Path | None = None
    """Where the daemon takes policies of sockets."""
    _bypassed: dict[int, int] = field(default_factory=dict)
    """Inode of a socket to the directions (bits by IPSEC_DIR_*) in which it asked for bypass without a daemon."""

    def __call__(self, request: OptionRequest) -> int:
        """Set.  EOPNOTSUPP (family and option; nothing can protect it), EINVAL (the policy), EACCES (privilege), …."""
        try:
            specs = _wanted(request)
        except PfkeyError as error:
            return error.errno
        for spec in specs:
            number = self._set(request, spec)
            if number:
                return number
        return 0

    def get(self, request: OptionRequest) -> tuple[int, bytes]:
        """(errno, the option's value): the policy for the direction that the request's value names."""
        try:
            ext = PolicyExt.from_option(request.value)
            _check_family(request)
            if ext.direction not in (Direction.IN, Direction.OUT):
                return errno.EINVAL, b""
            if self.path is None:
                return errno.EOPNOTSUPP, b""
            direction = Direction(ext.direction)
            answer = socketclient.ask(self.path, request.socket, op="get", direction=direction.name.lower())
            spec = setpolicy.parse(str(answer["policy"]))
        except PfkeyError as error:
            return error.errno, b""
        except OSError as error:
            return error.errno or errno.EINVAL, b""
        except (IpsecqError, KeyError):
            return errno.EOPNOTSUPP, b""
        requests = [
            Request(int(each.protocol), int(each.mode), int(each.level), each.reqid, each.src, each.dst)
            for each in spec.transforms
        ]
        action = spec.action if spec.action is not None else Action.ENTRUST
        return 0, PolicyExt(int(action), int(direction), requests=requests).to_option()

    def _set(self, request: OptionRequest, spec: PolicySpec) -> int:
        if self.path is not None:
            # Root asks on behalf of the program's user; others can only ask for themselves.
            user = {"user": request.user} if os.geteuid() == 0 else {}
            try:
                socketclient.ask(
                    self.path, request.socket, op="set", policy=setpolicy.format(spec), privileged=request.privileged,
                    **user,
                )  # fmt: skip
            except OSError as error:
                return error.errno or errno.EINVAL
            except DaemonError:
                pass
            else:
                return 0
        return self._set_alone(request, spec)

    def _set_alone(self, request: OptionRequest, spec: PolicySpec) -> int:
        """Without a daemon: one bit serves both directions, so it is set when the program has asked for both."""
        bypass = spec.action is Action.BYPASS
        if not bypass and spec.action is not Action.ENTRUST:
            return errno.EOPNOTSUPP
        if bypass and not request.privileged:
            return errno.EACCES
        direction = 1 << spec.direction
        inode = os.fstat(request.socket.fileno()).st_ino
        if self._bypassed.get(inode, 0) & direction and not request.privileged:
            return errno.EACCES  # what was set with privilege is changed with privilege, as the daemon has it
        old = self._bypassed.pop(inode, 0)
        new = old | direction if bypass else old & ~direction
        if new:
            self._bypassed[inode] = new
            if len(self._bypassed) > _REMEMBERED:
                del self._bypassed[next(iter(self._bypassed))]
        if not bypass and not old:
            return 0
        try:
            mark = get_mark(request.socket) & ~self.mark_mask
            set_mark(request.socket, mark | (self.mark_done if new == _BOTH else 0))
        except OSError as error:
            return error.errno or errno.EPERM
        return 0


def _check_family(request: OptionRequest) -> None:
    wanted = socket.AF_INET if request.option == IP_IPSEC_POLICY else socket.AF_INET6
    if request.socket.family != wanted:
        raise PfkeyError("the option is of the other family", errno.EOPNOTSUPP)


def _wanted(request: OptionRequest) -> list[PolicySpec]:
    """The policies that an option's value means; PfkeyError."""
    _check_family(request)
    if not request.value:
        return [PolicySpec(direction, Action.ENTRUST) for direction in Direction]
    ext = PolicyExt.from_option(request.value)
    if ext.direction not in (Direction.IN, Direction.OUT) or ext.type > Action.BYPASS:
        raise PfkeyError(f"direction {ext.direction}, type {ext.type}: in and out, up to bypass (4)")
    action = Action(ext.type)
    transforms = transforms_of(ext, Dialect.LINUX) if action is Action.IPSEC else ()
    if action is Action.IPSEC and not transforms:
        raise PfkeyError("a policy of type ipsec without a request")
    return [PolicySpec(Direction(ext.direction), action, transforms=transforms)]
