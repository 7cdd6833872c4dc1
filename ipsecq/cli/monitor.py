"""``ipsecq monitor``: what happens in the running daemon, a line each."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ipsecq.daemon import config as configuration
from ipsecq.daemon.control import follow

_WIDTH = 16


def monitor(
    only: Annotated[
        list[str] | None,
        typer.Option("--event", "-e", help="Only events whose name begins so (sa, drops, …); may be repeated."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="End after so many events; 0: never.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object a line.")] = False,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file (TOML).", envvar="IPSECQ_CONFIG", dir_okay=False)
    ] = configuration.DEFAULT_PATH,
) -> None:
    """Print events of the running daemon as they happen, until interrupted.

    SAs and policies that come, go and expire; ACQUIREs; drops by reason, summed up over a second; workers that end;
    reloads; tunnels that go down and up; peers that move behind their NAT; policies that fail open.
    """
    left = count
    for event in follow(configuration.load(config).control_socket, "monitor", writing_to=_output()):
        if only and not any(str(event["event"]).startswith(name) for name in only):
            continue
        print(json.dumps(event) if as_json else line(event), flush=True)
        left -= 1
        if not left:
            return


def _output() -> int:
    """Descriptor of the standard output; -1 when it has none."""
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError):
        return -1


def line(event: dict[str, Any]) -> str:
    """One event for people."""
    moment = event["time"]
    stamp = time.strftime("%H:%M:%S", time.localtime(moment)) + f".{int(moment % 1 * 1000):03}"
    name = str(event["event"])
    return f"{stamp} {name:{_WIDTH}} {_words(name, event)}".rstrip()


def _words(name: str, event: dict[str, Any]) -> str:
    rest = {key: value for key, value in event.items() if key not in ("time", "event")}
    if name.startswith("sa_"):
        limit = f"{rest.pop('limit')} limit: " if "limit" in rest else ""
        kind = f"{rest.pop('direction'):3} {rest.pop('protocol')}/{rest.pop('mode')} {rest.pop('spi')}"
        return f"{limit}{kind} {rest.pop('src')} > {rest.pop('dst')}, {_plain(rest)}"
    if name == "drops":
        return f"{rest['count']} {rest['reason']}: {rest['meaning']}"
    if name.startswith("policy_"):
        return f"{rest['id']} {rest['policy']}{' FAIL OPEN' if rest['fail_open'] else ''}"
    if name == "acquire":
        kind = f"{rest.pop('protocol')}/{rest.pop('mode')} {rest.pop('src')} > {rest.pop('dst')}"
        return f"{kind}, {_plain(rest)}"
    if name.startswith("tunnel_"):
        return f"{rest['local']} - {rest['peer']}{': ' + rest['missing'] if 'missing' in rest else ''}"
    return _plain(rest)


def _plain(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {', '.join(map(str, value)) or 'none' if isinstance(value, list) else value}"
        for key, value in values.items() if value != ""
    )  # fmt: skip
