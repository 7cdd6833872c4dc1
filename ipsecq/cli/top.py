"""``ipsecq top``: a live view of the running daemon in a terminal, or the same for scripts."""

from __future__ import annotations

import contextlib
import curses
import json
import locale
import math
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ipsecq.cli import top_screen
from ipsecq.cli.top_screen import Choices
from ipsecq.daemon import config as configuration
from ipsecq.daemon.control import ask
from ipsecq.errors import DaemonError, IpsecqError
from ipsecq.metrics import rates

_BOLD_RED, _YELLOW = 1, 2
_SORTS: Final = {name.lower(): key for key, (name, _, _) in rates.SORTS.items()}


def _finite(value: float) -> float:
    """NaN is within every range: each comparison with it is false."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a number of seconds, found {value}")
    return value


def top(
    interval: Annotated[
        float,
        typer.Option("--interval", "-d", help="Seconds between two looks.", min=0.1, max=3600, callback=_finite),
    ] = 2.0,
    sort: Annotated[str, typer.Option("--sort", "-s", help=f"First order: {', '.join(_SORTS)}.")] = "bits",
    peers: Annotated[bool, typer.Option("--peers", "-p", help="Begin with peers, not SAs.")] = False,
    once: Annotated[bool, typer.Option("--once", help="For scripts: one view as text, over one interval.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object an interval.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", help="With --json: end after so many; 0: never.", min=0)] = 0,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file (TOML).", envvar="IPSECQ_CONFIG", dir_okay=False)
    ] = configuration.DEFAULT_PATH,
) -> None:
    """Watch rates of SAs and peers, drops by reason and the load of workers.

    Keys: q quits, p and s show peers and SAs, b k d t a n sort by bits, packets, drops, total, peer and SPI, r reverses,
    space holds the picture.
    """
    if sort.lower() not in _SORTS:
        raise typer.BadParameter(f"expected one of {', '.join(_SORTS)}, found {sort!r}", param_hint="--sort")
    source = _Source(configuration.load(config).control_socket)
    choices = Choices(sort=_SORTS[sort.lower()], peers=peers)
    if as_json:
        _print_json(source, interval, count)
    elif once:
        source.look()
        time.sleep(interval)
        for _, text in top_screen.lines(source.look(), choices):
            print(text.rstrip())
    elif not sys.stdout.isatty():
        raise IpsecqError("top: the output is no terminal: use --once or --json")
    else:
        # A locale that is not installed, or a terminal that nobody knows, is no reason for a traceback.
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, "")
        try:
            curses.setupterm()
        except curses.error:
            name = os.environ.get("TERM", "")
            raise IpsecqError(f"top: the terminal {name!r} (TERM) is not known here: use --once or --json") from None
        curses.wrapper(_live, source, choices, interval)


class _Source:
    """Samples, and views over the time since the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before: dict[str, Any] | None = None

    def look(self) -> rates.View:
        sample = ask(self._path, "sample", timeout=10.0)
        before, self._before = self._before or sample, sample
        return rates.view(before, sample)


def _print_json(source: _Source, interval: float, count: int) -> None:
    source.look()
    done = 0
    while not count or done < count:
        time.sleep(interval)
        print(json.dumps(source.look().as_data()), flush=True)
        done += 1


def _live(window: Any, source: _Source, choices: Choices, interval: float) -> None:
    """Until q."""
    with contextlib.suppress(curses.error):  # a terminal that cannot hide its cursor shows it
        curses.curs_set(0)
    styles = _styles()
    view = source.look()
    due = time.monotonic() + min(interval, 0.5)  # the first rates come soon
    while True:
        _paint(window, top_screen.lines(view, choices, *window.getmaxyx()[::-1]), styles)
        window.timeout(max(1, int((due - time.monotonic()) * 1000)))
        if not _press(window.getch(), choices):
            return
        if time.monotonic() >= due:
            due = time.monotonic() + interval
            if not choices.held:
                try:
                    view, choices.message = source.look(), ""
                except DaemonError as error:
                    choices.message = f"{error}; q quits"


def _press(key: int, choices: Choices) -> bool:
    """Take one key; False: quit."""
    pressed = chr(key) if 0 < key < 256 else ""
    if pressed == "q":
        return False
    if pressed in rates.SORTS:
        choices.sort = pressed
    elif pressed == "r":
        choices.reverse = not choices.reverse
    elif pressed in ("p", "s"):
        choices.peers = pressed == "p"
    elif pressed == " ":
        choices.held = not choices.held
    return True


def _styles() -> dict[str, int]:
    styles = {
        "title": curses.A_BOLD, "head": curses.A_REVERSE, "alarm": curses.A_BOLD, "warn": curses.A_BOLD,
        "dim": curses.A_DIM, "": curses.A_NORMAL,
    }  # fmt: skip
    if curses.has_colors():
        curses.use_default_colors()
        curses.init_pair(_BOLD_RED, curses.COLOR_RED, -1)
        curses.init_pair(_YELLOW, curses.COLOR_YELLOW, -1)
        styles["alarm"] = curses.color_pair(_BOLD_RED) | curses.A_BOLD
        styles["warn"] = curses.color_pair(_YELLOW)
    return styles


def _paint(window: Any, lines: list[top_screen.Line], styles: dict[str, int]) -> None:
    window.erase()
    height, width = window.getmaxyx()
    for row, (style, text) in enumerate(lines[:height]):
        shown = text.ljust(width) if style == "head" else text
        try:
            window.addnstr(row, 0, shown, width, styles[style])
        except curses.error:
            continue  # the last cell of the screen cannot be written without scrolling
    window.refresh()
