"""The screen of ``ipsecq top`` as lines of text with a style each: no terminal is needed to make it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ipsecq.cli import report
from ipsecq.metrics.rates import SORTS, Drop, Flow, View, Worker, ordered

WIDTH: Final = 80
MOST_WORKERS: Final = 8
MOST_DROPS: Final = 4
MOST_ALARMS: Final = 4
_BAR: Final = 20

Line = tuple[str, str]
"""(style, text); styles: "", title, head, alarm, warn, dim."""


@dataclass(slots=True)
class Choices:
    """What the user has chosen."""

    sort: str = "b"
    reverse: bool = False
    peers: bool = False
    held: bool = False
    message: str = ""


def lines(view: View, choices: Choices, width: int = WIDTH, height: int = 0) -> list[Line]:
    """The whole screen; ``height`` 0 is as long as it takes, without the line of keys."""
    made = [*_top(view), *_alarms(view), ("", ""), *_workers(view.workers), *_drops(view.drops), *_flows(view, choices)]
    if height:
        room = max(height - 1, 0)
        if len(made) > room:
            kept = max(room - 1, 0)
            made = [*made[:kept], ("dim", f"… {len(made) - kept} more")][:room]
        made += [("", "")] * (room - len(made))
        made.append(("head", _keys(choices)))
    return [(style, text[:width]) for style, text in made]


def amount(value: float) -> str:
    """``0``, ``0.3``, ``12``, ``1.5k``, ``123k``, ``1.5M``: at most five characters."""
    if value < 1000:
        return f"{value:.1f}" if 0 < value < 9.95 and value != int(value) else f"{value:.0f}"
    for unit in "kMGT":
        value /= 1000
        if value < 9.95:
            return f"{value:.1f}{unit}"
        if value < 999.5 or unit == "T":
            return f"{value:.0f}{unit}"
    return ""


def shorten(text: str, width: int) -> str:
    """Cut in the middle: both ends of an address tell more than one."""
    if len(text) <= width:
        return text
    front = (width - 1) // 2
    return f"{text[:front]}…{text[front - width + 1 :]}"


def _top(view: View) -> Iterator[Line]:
    left = f"ipsecq {view.version}  {shorten(view.host, 20)}  up {report.duration(view.uptime)}"
    clock = time.strftime("%H:%M:%S", time.localtime(view.time))
    yield "title", f"{left:<{WIDTH - 9}} {clock}"
    drops = sum(drop.rate for drop in view.drops)
    rates = "   ".join(
        f"{way} {amount(view.packets[way])} pkt/s {amount(view.bits[way])}bit/s" for way in ("in", "out")
    )
    yield "", f"{rates}   drops {amount(drops)}/s"
    yield "", f"{view.sa_count} SAs, {view.tunnel_count} tunnels, {view.policy_count} policies"


def _alarms(view: View) -> Iterator[Line]:
    for alarm in view.alarms[:MOST_ALARMS]:
        yield "alarm", alarm
    if len(view.alarms) > MOST_ALARMS:
        yield "alarm", f"… {len(view.alarms) - MOST_ALARMS} more alarms: ipsecq status"


def _workers(workers: list[Worker]) -> Iterator[Line]:
    yield "head", f"{'worker':<14}{'load':<{_BAR + 7}}{'in/s':>7}{'out/s':>8}{'waiting':>9}{'lost/s':>8}{'died':>6}"
    for worker in sorted(workers, key=lambda each: -each.load)[:MOST_WORKERS]:
        full = round(worker.load * _BAR)
        bar = "█" * full + "·" * (_BAR - full)
        style = "alarm" if not worker.up or worker.lost else "warn" if worker.load > 0.9 else ""
        yield style, (
            f"{worker.index:>3} {worker.pid if worker.up else 'DOWN':<10}{bar} {worker.load:>4.0%} "
            f"{amount(worker.packets_in):>7}{amount(worker.packets_out):>8}{worker.waiting:>9}"
            f"{amount(worker.lost):>8}{worker.restarts:>6}"
        )
    if len(workers) > MOST_WORKERS:
        yield "dim", f"… {len(workers) - MOST_WORKERS} workers with less load"


def _drops(drops: list[Drop]) -> Iterator[Line]:
    yield "", ""
    if not drops:
        yield "dim", "no packet was dropped"
        return
    yield "head", f"{'drops':<20}{'a second':>9}{'total':>10}  why"
    for drop in drops[:MOST_DROPS]:
        why = shorten_end(drop.meaning, WIDTH - 41)
        yield ("warn" if drop.rate else ""), f"{drop.reason:<20}{amount(drop.rate):>9}{amount(drop.total):>10}  {why}"
    if len(drops) > MOST_DROPS:
        yield "dim", f"… {len(drops) - MOST_DROPS} more reasons: ipsecq stat"


def shorten_end(text: str, width: int) -> str:
    """Cut at the end."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _flows(view: View, choices: Choices) -> Iterator[Line]:
    yield "", ""
    flows = ordered(view.peers if choices.peers else view.sas, choices.sort, reverse=choices.reverse)
    what = f"{'peer':<43}" if choices.peers else f"{'':4}{'SA':<7}{'SPI':<11}{'peer':<21}"
    yield "head", f"{what}{'pkt/s':>7}{'bit/s':>7}{'total':>8}{'bad/s':>6} {'SAs' if choices.peers else 'state'}"
    for flow in flows:
        yield _style(flow), f"{_name(flow, choices.peers)}{_figures(flow)} {_state(flow)}"
    if not flows:
        yield "dim", "none"


def _style(flow: Flow) -> str:
    if flow.problem:
        return "alarm"
    return "warn" if flow.bad else "" if flow.packets else "dim"


def _name(flow: Flow, peers: bool) -> str:
    if peers:
        return f"{flow.direction:<4}{shorten(flow.peer, 38):<39}"
    return f"{flow.direction:<4}{flow.protocol:<7}{flow.spi:<11}{shorten(flow.peer, 20):<21}"


def _figures(flow: Flow) -> str:
    return f"{amount(flow.packets):>7}{amount(flow.bits):>7}{amount(flow.total_bytes) + 'B':>8}{amount(flow.bad):>6}"


def _state(flow: Flow) -> str:
    return flow.state if len(flow.state) <= 7 else flow.state[:7]


def _keys(choices: Choices) -> str:
    if choices.message:
        return choices.message
    order = f"{SORTS[choices.sort][0]}{', reversed' if choices.reverse else ''}"
    other = "s SAs" if choices.peers else "p peers"
    return f"q quit  {other}  space {'go on' if choices.held else 'hold'}  r reverse  {' '.join(SORTS)} sort: {order}"
