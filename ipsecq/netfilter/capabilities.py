"""What this kernel and this process can do, found by trying it in a network namespace of its own.

Trying beats reading module lists: modules load on demand, may be built in, and a container may forbid what the kernel
has.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ipsecq import netlink as nl
from ipsecq.errors import NetfilterError
from ipsecq.netfilter import compat
from ipsecq.netfilter.load import COMPAT, NATIVE, run_nft
from ipsecq.netfilter.nftsocket import NftSocket
from ipsecq.netfilter.settings import NetfilterSettings

_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x1
_IFF_NO_PI: Final = 0x1000
_NFQNL_MSG_CONFIG: Final = 0x302
_NFQA_CFG_CMD: Final = 1
_NFQA_CFG_FLAGS: Final = 5
_NFQA_CFG_MASK: Final = 4
_NFQA_CFG_F_GSO: Final = 4
_CAP_NET_ADMIN: Final = 12
_CAP_NET_RAW: Final = 13

_BASE: Final = "add table inet {t}\nadd chain inet {t} c {{ type filter hook prerouting priority -250; }}\n"
_PROBES: Final = {
    "nft": "add table inet {t}\n",
    "native_queue": _BASE + "add rule inet {t} c meta length 0 queue to 0\n",
    "tproxy": _BASE + "add rule inet {t} c meta length 0 meta l4proto tcp tproxy to :1\n",
    "conntrack": _BASE + "add rule inet {t} c meta length 0 ct state new counter\n",
    "fib": _BASE + "add rule inet {t} c meta length 0 fib daddr type local\n",
    "socket_match": _BASE + "add rule inet {t} c meta length 0 meta l4proto udp socket mark 1\n",
    "owner": "add table inet {t} {{ flags owner; }}\n",
    "egress": (
        "add table netdev {t}\n"
        'add chain netdev {t} c {{ type filter hook egress device "lo" priority 0; }}\n'
        "delete table netdev {t}\n"
    ),
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class Capabilities:
    """True: it worked when tried."""

    nft: bool = False
    native_queue: bool = False
    compat_queue: bool = False
    egress: bool = False
    tproxy: bool = False
    conntrack: bool = False
    fib: bool = False
    socket_match: bool = False
    owner: bool = False
    """Tables that a foreign ``flush ruleset`` leaves alone (kernel 5.12)."""
    gso: bool = False
    """The queue hands over super-packets (NFQA_CFG_F_GSO)."""
    tun: bool = False
    net_admin: bool = False
    net_raw: bool = False
    scratch: bool = False
    """Tried in a namespace of its own; False: in the current one, with a table that was removed at once."""

    @property
    def mechanism(self) -> str | None:
        """How packets get to the workers: nft's ``queue``, xt_NFQUEUE through nft_compat, or None."""
        return NATIVE if self.native_queue else COMPAT if self.compat_queue else None

    def adapt(self, settings: NetfilterSettings) -> NetfilterSettings:
        """The settings with what this kernel lacks left out."""
        defragment = settings.defragment
        if defragment == "tproxy" and not self.tproxy:
            defragment = "ct" if self.conntrack else "none"
        return replace(settings, defragment=defragment, socket_match=settings.socket_match and self.socket_match)


def detect() -> Capabilities:
    """Try everything.  Needs no privilege to be called; without CAP_NET_ADMIN all answers are False.

    Runs in a thread that leaves for a new network namespace (needs CAP_SYS_ADMIN); when that is not allowed it tries
    in the current one, with tables of a name of their own that exist for an instant and hook nothing that matches.
    """
    found: list[Capabilities] = []
    thread = threading.Thread(target=lambda: found.append(_probe(_unshare())))
    thread.start()
    thread.join()
    return found[0] if found else Capabilities()


def process_capabilities() -> int:
    """The effective capability set of this process as a bit mask (``/proc/self/status``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _unshare() -> bool:
    # Threads have network namespaces of their own; this one's ends with the thread.
    return bool(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0)


def _probe(scratch: bool) -> Capabilities:
    table = f"ipsecq_probe_{os.getpid()}"
    mine = process_capabilities()
    answers: dict[str, bool] = {}
    if shutil.which("nft"):
        # Of these, what a kernel of today may lack is the queue statement: the others are asked for together.
        answers = _try_nft(["native_queue"], table) | _try_nft([*_PROBES.keys() - {"native_queue"}], table)
    return Capabilities(
        **answers,
        compat_queue=answers.get("nft", False) and _works(lambda: _try_compat(table)),
        gso=_works(_try_gso),
        tun=_works(lambda: _try_tun(scratch)),
        net_admin=bool(mine >> _CAP_NET_ADMIN & 1),
        net_raw=bool(mine >> _CAP_NET_RAW & 1),
        scratch=scratch,
    )


def _try_nft(names: Sequence[str], table: str) -> dict[str, bool]:
    """Which of these probes nft takes: all in one transaction, as each waits for the kernel, or else one by one."""
    scripts = {name: _scoped(_PROBES[name], f"{table}_{name}") for name in names}
    if len(names) > 1 and _works(lambda: run_nft("".join(scripts.values()))):
        return dict.fromkeys(names, True)
    return {name: _works(lambda script=script: run_nft(script)) for name, script in scripts.items()}  # type: ignore[misc]


def _scoped(text: str, table: str) -> str:
    # Made and deleted in one transaction: every expression is looked up and checked, nothing is ever active.
    script = text.format(t=table)
    return script if "netdev" in script else script + f"delete table inet {table}\n"


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (NetfilterError, OSError):
        return False
    return True


def _try_compat(table: str) -> None:
    run_nft(f"add table inet {table}\nadd chain inet {table} c\n")
    try:
        with NftSocket() as netlink:
            netlink.batch([compat.queue_rule(table, "c", 0, 0, False)])
    finally:
        run_nft(f"delete table inet {table}\n")


def _try_gso() -> None:
    """Bind the last queue number and ask for super-packets."""
    queue = 0xFFFF
    body = nl.attribute(_NFQA_CFG_CMD, struct.pack(">BxH", 1, socket.AF_UNSPEC))
    flag = _NFQA_CFG_F_GSO.to_bytes(4, "big")
    more = nl.attribute(_NFQA_CFG_MASK, flag) + nl.attribute(_NFQA_CFG_FLAGS, flag)
    with NftSocket() as netlink:
        for sequence, attributes in enumerate((body, more), 1):
            request = nl.genmsg(0, queue) + attributes
            netlink.socket.send(nl.message(_NFQNL_MSG_CONFIG, nl.NLM_F_ACK, sequence, request))
            number = nl.error_number(netlink.socket.recv(4096)[nl.HEADER :])
            if number:
                raise OSError(number, os.strerror(number))


def _try_tun(scratch: bool) -> None:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        if scratch:
            with contextlib.suppress(BlockingIOError):
                fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"ipsecqprobe", _IFF_TUN | _IFF_NO_PI))
        elif not process_capabilities() >> _CAP_NET_ADMIN & 1:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    finally:
        os.close(descriptor)
