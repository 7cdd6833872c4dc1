"""What a process gives up when it has what it needs: capabilities, core dumps, life after its parent, swappable keys.

Sources: capabilities(7), prctl(2), mlockall(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ipsecq.errors import DaemonError

CAP_NET_ADMIN: Final = 12
CAP_NET_RAW: Final = 13

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_RAISE: Final = 2
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_MCL_ALL_ON_FAULT: Final = 1 | 2 | 4

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> int:
    padded = [*arguments, 0, 0, 0, 0][:4]
    return int(_libc.prctl(option, *(ctypes.c_ulong(argument) for argument in padded)))


def set_name(name: str) -> None:
    """The name that ps and top show, up to 15 octets."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _libc.prctl(_PR_SET_NAME, buffer, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` dies.  Raises DaemonError when it has died already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise DaemonError("the supervisor is gone")


def forbid_dumps() -> None:
    """No core file and no ptrace by the same user: memory holds keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def lock_memory() -> bool:
    """Keep what is in memory out of swap, if RLIMIT_MEMLOCK has no limit; whether it is so now.

    With a limit, mlockall would make later allocations fail.  MCL_ONFAULT, or the sparse shared table would be filled.
    """
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return False
    return bool(_libc.mlockall(_MCL_ALL_ON_FAULT) == 0)


def keep_capabilities(kept: Iterable[int]) -> None:
    """Give up every capability but ``kept``, for this process and all it starts, for good.

    Capabilities that the process does not have are not asked for.  Raises DaemonError when the kernel refuses.
    """
    have = _permitted()
    wanted = sum(1 << capability for capability in kept) & have
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        if not wanted >> capability & 1:
            # EPERM without CAP_SETPCAP: then the service manager has set the bounding set.
            _prctl(_PR_CAPBSET_DROP, capability)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = wanted & 0xFFFFFFFF, wanted >> 32
    # effective, permitted, inheritable; low words, then high words.
    data = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
    if _libc.capset(header, data) != 0:
        raise DaemonError(f"cannot give up capabilities: {os.strerror(ctypes.get_errno())}")
    for capability in range(last + 1):
        if wanted >> capability & 1:
            # So that nft, which the daemon runs, has them when the daemon is not root.
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _permitted() -> int:
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0
