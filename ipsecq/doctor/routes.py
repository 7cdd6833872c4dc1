"""Routes, the way to the peers, and what else of the network around the gateway can be in the way.

Asks ``ip`` and, where allowed, the peers themselves (``ping``); changes nothing.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ipsecq.doctor.finding import Finding, Grade
from ipsecq.netfilter.links import list_links
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.numbers import Action, Direction, Mode
from ipsecq.packet.address import text as _text
from ipsecq.policy.model import Policy, Selector

MOST: Final = 16
"""Peers and networks that are looked at."""

PROBE_SECONDS: Final = 1
_SMALL: Final = 64

STA_UNSYNC: Final = 0x40
_OFFLOADS: Final = ("generic-segmentation-offload", "scatter-gather")


def examine(
    settings: NetfilterSettings, policies: Sequence[Policy], *, guarded: Sequence[str] | None, probe: bool
) -> Iterator[Finding]:
    """``guarded``: devices that the running daemon watches over, None without one; ``probe``: ping the peers."""
    peers: dict[bytes, bytes] = {}
    networks: dict[bytes, Selector] = {}
    for policy in policies:
        if policy.direction is not Direction.OUT or policy.action is not Action.IPSEC:
            continue
        networks.setdefault(policy.selector.dst_first, policy.selector)
        outer = next((each for each in reversed(policy.transforms) if each.mode is Mode.TUNNEL), None)
        if outer is not None and outer.src is not None and outer.dst is not None:
            peers.setdefault(outer.dst, outer.src)
    devices: set[str] = set()
    for peer, near in list(peers.items())[:MOST]:
        route, finding = _route(_text(peer), f"the peer {_text(peer)}")
        if route is not None:
            devices.add(route["dev"])
            if probe:
                yield from _path(peer, near, route)
        if finding is not None:
            yield finding
    for selector in list(networks.values())[:MOST]:
        route, finding = _route(_text(_inside(selector)), f"the protected network at {_text(selector.dst_first)}")
        if finding is not None:
            yield finding
        elif route is not None:
            devices.add(route["dev"])
            yield from _leads_out(route, selector, settings, guarded)
    yield from conntrack()
    yield from clock(clock_status())
    for device in sorted(devices):
        yield from _offloads(device)


def _inside(selector: Selector) -> bytes:
    """An address of the destination that is no network address."""
    first = int.from_bytes(selector.dst_first, "big")
    last = int.from_bytes(selector.dst_last, "big")
    return min(first + 1, last).to_bytes(len(selector.dst_first), "big")


def _route(address: str, what: str) -> tuple[dict[str, Any] | None, Finding | None]:
    done = subprocess.run(
        ["ip", "-json", "route", "get", address], capture_output=True, text=True, check=False, timeout=10
    )
    if done.returncode == 0:
        try:
            route: dict[str, Any] = json.loads(done.stdout)[0]
        except (ValueError, IndexError):
            return None, None
        if route.get("type") not in {"unreachable", "blackhole", "prohibit"} and "dev" in route:
            return route, None
    return None, Finding(
        Grade.FAIL, "route", f"no route to {what}: its packets are dropped before any policy sees them",
        f"ip route add {address} via GATEWAY (a default route is enough)",
    )  # fmt: skip


def _leads_out(
    route: dict[str, Any], selector: Selector, settings: NetfilterSettings, guarded: Sequence[str] | None
) -> Iterator[Finding]:
    network, device = _text(selector.dst_first), str(route["dev"])
    if device == settings.enc_device:
        yield Finding(
            Grade.FAIL, "route", f"the route to {network} leads into {device}, from which packets only come",
            f"ip route del {network}…; the default route is the right one",
        )  # fmt: skip
    elif device == "lo":
        return
    elif guarded is not None and device not in guarded:
        yield Finding(
            Grade.FAIL, "device", f"the route to {network} leads out by {device}, which ipsecq does not watch over: "
            "protected packets are dropped there", "systemctl restart ipsecq, and read its log",
        )  # fmt: skip


def _path(peer: bytes, near: bytes, route: dict[str, Any]) -> Iterator[Finding]:
    """A small and a full-sized ping that may not be fragmented."""
    if not shutil.which("ping"):
        return
    address, source = _text(peer), _text(near)
    mtu = _mtu(str(route["dev"]))
    if not _ping(address, source, _SMALL):
        yield Finding(
            Grade.WARN, "peer", f"the peer {address} does not answer a ping: it is down, out of reach, or just silent",
            f"ping -I {source} {address}; traceroute {address}",
        )  # fmt: skip
        return
    if mtu is None or _ping(address, source, mtu - _headers(peer)):
        yield Finding(Grade.OK, "peer", f"{address} answers, with packets of {mtu} octets, too")
        return
    # The first answer may have been an ICMP error from which the kernel has learned: ask again, then search.
    low, high = _SMALL, mtu - _headers(peer)
    route_again, _ = _route(address, address)
    known = next((m.get("mtu") for m in (route_again or {}).get("metrics", []) if m.get("mtu")), None)
    if known:
        yield Finding(Grade.OK, "peer", f"{address} answers; the way there carries {known} octets and says so")
        return
    while high - low > 8:
        middle = (low + high) // 2
        low, high = (middle, high) if _ping(address, source, middle) else (low, middle)
    carries = low + _headers(peer)
    yield Finding(
        Grade.FAIL, "mtu", f"packets of more than about {carries} octets vanish on the way to {address} and no router says "
        f"so (a black hole); {route['dev']} has MTU {mtu}", f"ip route add {address} via … mtu {carries}; or let ICMP "
        "errors through",
    )  # fmt: skip


def _headers(peer: bytes) -> int:
    """IP and ICMP header: what a ping adds to its payload, in octets."""
    return 28 if len(peer) == 4 else 48


def _ping(address: str, source: str, size: int) -> bool:
    # Two: one lost packet is no black hole, and a ping that was late itself gives up before it reads its only answer.
    argv = ["ping", "-n", "-q", "-c", "2", "-i", "0.2", "-W", str(PROBE_SECONDS), "-M", "do", "-s", str(size)]
    argv += ["-I", source, address]
    return subprocess.run(argv, capture_output=True, check=False, timeout=10).returncode == 0


def _mtu(device: str) -> int | None:
    return next((link.mtu for link in list_links().values() if link.name == device), None)


def conntrack(root: Path = Path("/proc/sys/net/netfilter")) -> Iterator[Finding]:
    """A full table drops the packets of new connections, inner ones included."""
    try:
        count = int((root / "nf_conntrack_count").read_text())
        limit = int((root / "nf_conntrack_max").read_text())
    except (OSError, ValueError):
        return
    if limit and count >= 0.9 * limit:
        yield Finding(
            Grade.FAIL, "conntrack", f"{count} of {limit} connections are tracked: packets of new ones are dropped",
            f"sysctl -w net.netfilter.nf_conntrack_max={2 * limit}",
        )  # fmt: skip


class _Timex(ctypes.Structure):
    """The head of struct timex (adjtimex(2)); the kernel writes all of it."""

    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_char * 256),
    )  # fmt: skip


def clock_status() -> int | None:
    """The kernel's STA_* bits; None when it does not say."""
    timex = _Timex()
    if ctypes.CDLL(None).adjtimex(ctypes.byref(timex)) < 0:
        return None
    return int(timex.status)


def clock(status: int | None) -> Iterator[Finding]:
    """Certificates and lifetimes go by the clock; ``status`` are its STA_* bits."""
    if status is None:
        return
    if status & STA_UNSYNC:
        yield Finding(
            Grade.WARN, "clock", "the clock is not synchronized: IKE's certificates and lifetimes go by it",
            "timedatectl set-ntp true",
        )  # fmt: skip
    else:
        yield Finding(Grade.OK, "clock", "the clock is synchronized")


def _offloads(device: str) -> Iterator[Finding]:
    """Super-packets are what makes ipsecq fast; a device that cannot send or make them costs most of that."""
    if not shutil.which("ethtool"):
        return
    done = subprocess.run(["ethtool", "-k", device], capture_output=True, text=True, check=False, timeout=10)
    off = [name for name in _OFFLOADS if f"{name}: off" in done.stdout]
    if "large-receive-offload: on" in done.stdout:
        yield Finding(
            Grade.FAIL, "offload", f"{device} has large receive offload on: it changes packets that are forwarded",
            f"ethtool -K {device} lro off",
        )  # fmt: skip
    if off:
        yield Finding(
            Grade.WARN, "offload", f"{device} has {' and '.join(off)} off: packets come one by one, which is slower",
            f"ethtool -K {device} gso on sg on",
        )  # fmt: skip
