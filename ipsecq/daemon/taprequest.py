"""What a reader of ``ipsecq tap`` asks for, as supervisor and workers say it to each other.

Apart from :mod:`ipsecq.daemon.tap`: workers need none of what a server does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ipsecq.datapath.tap import SHARE
from ipsecq.engine.tap import AFTER, BEFORE
from ipsecq.errors import DaemonError
from ipsecq.pcap.format import SNAPLEN
from ipsecq.sysctl import Sysctl

VIEWS: Final = {"before": BEFORE, "after": AFTER}
DIRECTIONS: Final = ("in", "out")
MIRROR: Final = 0
"""Number of the watcher that shows outbound packets on enc0; captures count from 1."""


@dataclass(slots=True, frozen=True)
class TapRequest:
    """What one reader wants to see."""

    ways: tuple[int, int]
    """Views of inbound and of outbound packets."""
    spis: frozenset[int]
    snaplen: int
    share: int

    @classmethod
    def parse(cls, document: Any, sysctl: Sysctl) -> TapRequest:
        """Check a client's request.  DaemonError: what it asks for makes no sense, or a mask of enc(4) hides it."""
        if not isinstance(document, dict):
            raise DaemonError("expected one JSON object")
        view, direction = document.get("view") or "", document.get("dir") or ""
        if view not in {"", *VIEWS} or direction not in {"", *DIRECTIONS}:
            raise DaemonError(f"view {view!r}, dir {direction!r}: expected before or after, in or out")
        wanted = VIEWS[view] if view else BEFORE | AFTER
        ways = tuple(wanted if direction in {"", way} else 0 for way in DIRECTIONS)
        masks = sysctl.enc.in_bpf_mask, sysctl.enc.out_bpf_mask
        if not any(way & mask for way, mask in zip(ways, masks, strict=True)):
            names = [f"net.enc.{way}.ipsec_bpf_mask={masks[DIRECTIONS.index(way)]}"
                     for way in DIRECTIONS if direction in {"", way}]  # fmt: skip
            raise DaemonError(f"{' and '.join(names)} hides what is asked for: ipsecq sysctl sets it (1 before, 2 after, 3)")
        spis = document.get("spi") or []
        snaplen, share = document.get("snaplen", SNAPLEN), document.get("share", SHARE)
        if not isinstance(spis, list) or not all(type(spi) is int for spi in spis):
            raise DaemonError("spi: expected a list of numbers")
        if type(snaplen) is not int or not 1 <= snaplen <= SNAPLEN:
            raise DaemonError(f"snaplen {snaplen!r}: expected 1 to {SNAPLEN}")
        if type(share) is not int or not 1 <= share <= 100:
            raise DaemonError(f"share {share!r}: expected 1 to 100 percent")
        return cls((ways[0], ways[1]), frozenset(spis), snaplen, share)
