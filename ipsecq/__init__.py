"""ipsecq: IPsec for Linux gateways in user space, with the semantics of BSD's ipsec(4).

For programs that want a policy for a socket of their own, as ``setsockopt(IP_IPSEC_POLICY)`` sets it elsewhere::

    ipsecq.set_policy(sock, "out ipsec esp/transport//require")
    ipsecq.set_policy(sock, "in ipsec esp/transport//require")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipsecq.pfkey.socketclient import HasFileno

__version__ = "0.1.0"


def set_policy(sock: HasFileno | int, policy: str, *, path: str | os.PathLike[str] = "/run/ipsecq/sockets") -> None:
    """Set one direction of a socket's policy, a string of ipsec_set_policy(3).  It is in force when this returns.

    ``sock`` is a socket, whatever has a ``fileno()``, or a descriptor; ``path`` is the daemon's socket for this.  The socket
    keeps the policy until it is closed everywhere; what accept(2) makes of a listener has the listener's.

    Raises TypeError, PolicySyntaxError (the string), DaemonError (no daemon there) and OSError: EACCES (``bypass`` and
    ``none`` need root or CAP_NET_ADMIN, and so does changing what was set with them), EINVAL, EOPNOTSUPP (not for such a
    socket), ENOBUFS (too many).
    """
    from ipsecq.pfkey import socketclient  # noqa: PLC0415
    from ipsecq.policy.setpolicy import parse  # noqa: PLC0415

    if not isinstance(policy, str):
        raise TypeError(f"policy: expected a str, found {type(policy).__name__}")
    parse(policy)
    socketclient.ask(Path(path), sock, op="set", policy=policy)


def get_policy(sock: HasFileno | int, direction: str, *, path: str | os.PathLike[str] = "/run/ipsecq/sockets") -> str:
    """The policy of a socket for ``direction``, "in" or "out": "out entrust" when it has none of its own.

    Raises TypeError, DaemonError and OSError as :func:`set_policy` does, ValueError for another direction.
    """
    from ipsecq.pfkey import socketclient  # noqa: PLC0415

    if not isinstance(direction, str):
        raise TypeError(f"direction: expected a str, found {type(direction).__name__}")
    if direction not in ("in", "out"):
        raise ValueError(f"direction {direction!r}: in or out")
    return str(socketclient.ask(Path(path), sock, op="get", direction=direction)["policy"])
