"""Rates out of two samples of the daemon (:mod:`ipsecq.metrics.live`): what ``ipsecq top`` shows, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

Sample = dict[str, Any]


@dataclass(slots=True)
class Flow:
    """An SA, or a peer in one direction."""

    direction: str
    protocol: str
    spi: str
    peer: str
    state: str
    packets: float
    """A second, as all rates."""
    bits: float
    bad: float
    """ICV failures, replays and other drops."""
    total_bytes: int
    total_bad: int
    problem: str = ""


@dataclass(slots=True)
class Worker:
    """One worker."""

    index: int
    pid: int
    up: bool
    load: float
    """Share of the time that it was busy: 0 to 1."""
    packets_in: float
    packets_out: float
    waiting: int
    lost: float
    restarts: int


@dataclass(slots=True)
class Drop:
    """One reason."""

    reason: str
    rate: float
    total: int
    meaning: str


@dataclass(slots=True)
class View:
    """One screen."""

    time: float
    host: str
    version: str
    uptime: float
    sa_count: int
    tunnel_count: int
    policy_count: int
    packets: dict[str, float]
    bits: dict[str, float]
    alarms: list[str] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    sas: list[Flow] = field(default_factory=list)
    peers: list[Flow] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


SORTS: Final[dict[str, tuple[str, Callable[[Flow], Any], bool]]] = {
    "b": ("bits", lambda flow: flow.bits, True),
    "k": ("packets", lambda flow: flow.packets, True),
    "d": ("drops", lambda flow: (flow.bad, flow.total_bad), True),
    "t": ("total", lambda flow: flow.total_bytes, True),
    "a": ("peer", lambda flow: (flow.peer, flow.direction), False),
    "n": ("SPI", lambda flow: (flow.spi, flow.protocol), False),
}
"""Key: name, what to sort by, largest first.  Equals stand in the order of peer, direction and SPI."""


def ordered(flows: Iterable[Flow], key: str, *, reverse: bool = False) -> list[Flow]:
    """Sorted by one of :data:`SORTS`."""
    _, of, largest_first = SORTS[key]
    stable = sorted(flows, key=lambda flow: (flow.peer, flow.direction, flow.spi))
    return sorted(stable, key=of, reverse=largest_first != reverse)


def view(before: Sample, now: Sample) -> View:
    """What happened between two samples of one daemon.  What is new in the second one counts from 0."""
    if now["started"] != before["started"]:
        before = now  # another daemon: nothing can be said yet
    seconds = max(now["time"] - before["time"], 1e-3)

    def rate(after: float, earlier: float) -> float:
        return float(max(after - earlier, 0) / seconds)

    drops = {each["reason"]: each["count"] for each in before["drops"]}
    return View(
        time=now["time"],
        host=now["host"],
        version=now["version"],
        uptime=now["time"] - now["started"],
        sa_count=now["sa_count"],
        tunnel_count=now["tunnel_count"],
        policy_count=sum(now["policies"].values()),
        packets={way: rate(now["packets"][way], before["packets"][way]) for way in ("in", "out")},
        bits={way: 8 * rate(now["bytes"][way], before["bytes"][way]) for way in ("in", "out")},
        alarms=_alarms(now),
        workers=[
            Worker(
                each["index"], each["pid"], each["up"], min(rate(each["busy"], was["busy"]), 1.0),
                rate(each["in"], was["in"]), rate(each["out"], was["out"]), each["waiting"],
                rate(each["lost"], was["lost"]), each["restarts"],
            )
            for each, was in zip(now["workers"], before["workers"], strict=True)
        ],
        drops=sorted(
            (
                Drop(each["reason"], rate(each["count"], drops.get(each["reason"], 0)), each["count"], each["meaning"])
                for each in now["drops"]
            ),
            key=lambda drop: (-drop.rate, -drop.total),
        ),
        sas=_flows(before["sas"], now["sas"], _sa_key, rate),
        peers=_flows(before["peers"], now["peers"], _peer_key, rate),
    )  # fmt: skip


def _alarms(now: Sample) -> list[str]:
    alarms = []
    if now["fail_open"]:
        alarms.append(f"FAIL OPEN: {now['fail_open']} policies let packets pass in clear when nobody serves them")
    down = [each for each in now["tunnels"] if not each["up"]]
    alarms += [f"TUNNEL DOWN: {each['local']} - {each['peer']}: {each['missing']}" for each in down]
    alarms += [f"WORKER {each['index']} DOWN" for each in now["workers"] if not each["up"]]
    if not now["reload"]["success"]:
        alarms.append("the last reload was refused: the files differ from what is in force")
    return alarms


def _sa_key(each: Sample) -> tuple[str, ...]:
    return each["spi"], each["protocol"], each["dst"]


def _peer_key(each: Sample) -> tuple[str, ...]:
    return each["peer"], each["direction"]


def _flows(
    before: list[Sample], now: list[Sample], key: Callable[[Sample], tuple[str, ...]], rate: Callable[[float, float], float]
) -> list[Flow]:
    earlier = {key(each): each for each in before}
    nothing = {"packets": 0, "bytes": 0, "bad": 0, "replays": 0, "drops": 0}
    flows = []
    for each in now:
        was = earlier.get(key(each), nothing)
        bad = each["bad"] + each["replays"] + each["drops"]
        flows.append(
            Flow(
                each["direction"], each.get("protocol", ""), each.get("spi", ""),
                each["peer"] if "peer" in each else each["dst" if each["direction"] == "out" else "src"],
                "refused" if each.get("problem") else each.get("state") or str(each["sas"]),
                rate(each["packets"], was["packets"]), 8 * rate(each["bytes"], was["bytes"]),
                rate(bad, was["bad"] + was["replays"] + was["drops"]), each["bytes"], bad, each.get("problem", ""),
            )
        )  # fmt: skip
    return flows
