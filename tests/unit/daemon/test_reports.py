"""What the supervisor believes of workers' reports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ipsecq.daemon.reports import Reports
from ipsecq.sysctl import Sysctl


class Heard:
    """Whoever hears of a path MTU: ``told`` are (destination, MTU)."""

    def __init__(self) -> None:
        self.told: list[tuple[bytes, int]] = []

    def learn(self, dst: bytes, mtu: int, now: float) -> bool:
        self.told.append((dst, mtu))
        return True

    def broadcast(self, operations: list[tuple[Any, ...]], but: int) -> None:
        assert but == 1
        self.told += [(dst, mtu) for _, dst, mtu in operations]


@pytest.mark.parametrize(
    ("dst", "mtu", "believed"),
    [
        ("c0000202", 1300, 1300), ("c0000202", 100, 576), ("c0000202", -5, 576), ("20" * 16, 100, 1280),
        ("c000", 1300, None), ("", 1300, None), ("c0000202", "x", None), ("c0000202", [], None),
        ("c0000202", float("inf"), None),
    ],
)  # fmt: skip
def test_a_path_mtu_that_a_worker_reports_is_held_to_the_floor_and_nonsense_reaches_nobody(
    dst: str, mtu: object, believed: int | None
) -> None:
    workers, own = Heard(), Heard()
    authority = SimpleNamespace(sysctl=Sysctl())
    supervisor = cast("Any", SimpleNamespace(authority=authority, pool=workers, path_mtu=own))
    worker = cast("Any", SimpleNamespace(index=1))
    Reports(supervisor).take(worker, {"kind": "path_mtu", "dst": dst, "mtu": mtu})
    expected = [] if believed is None else [(bytes.fromhex(dst), believed)]
    assert (workers.told, own.told) == (expected, expected)
