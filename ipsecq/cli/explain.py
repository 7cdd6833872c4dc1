"""``ipsecq explain``: why a packet is treated as it is, by the running daemon or by files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ipsecq.daemon import config as configuration
from ipsecq.daemon.control import ask
from ipsecq.errors import DaemonError


def explain(
    context: typer.Context,
    src: Annotated[str, typer.Argument(metavar="SRC", help="Source address, as the policies see it.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Destination address.")],
    protocol: Annotated[str, typer.Argument(metavar="PROTO", help="tcp, udp, icmp, a number; any.")] = "any",
    sport: Annotated[int, typer.Argument(metavar="SPORT", help="Source port; ICMP: type.", min=0, max=65535)] = 0,
    dport: Annotated[int, typer.Argument(metavar="DPORT", help="Destination port; ICMP: code.", min=0, max=65535)] = 0,
    inbound: Annotated[bool, typer.Option("--in", help="A packet that arrives, not one that leaves.")] = False,
    mtu: Annotated[
        int, typer.Option(help="Path MTU towards the outermost destination; by default as the kernel knows it.")
    ] = 0,
    live: Annotated[bool, typer.Option("--live", help="Ask the daemon of --config, not its files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: JSON.")] = False,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Files to go by.", envvar="IPSECQ_CONFIG", dir_okay=False)
    ] = configuration.DEFAULT_PATH,
) -> None:
    """Say what happens to a packet and why: policy, SAs, layout, MTU, kernel rule, variables.

    Asks the running daemon, so SAs that IKE negotiated and variables set since the start are in it.  With --config on the
    command line, or when no daemon answers, it goes by what the files say.
    """
    from ipsecq.daemon import content as files  # noqa: PLC0415
    from ipsecq.daemon import explain as daemon  # noqa: PLC0415

    try:
        question = daemon.Question.parse(src, dst, protocol, sport, dport, inbound=inbound, mtu=mtu)
    except DaemonError as error:
        raise typer.BadParameter(str(error)) from None
    named = getattr(context.get_parameter_source("config"), "name", "") == "COMMANDLINE"
    answer = None
    if live or not named:
        try:
            answer = ask(
                configuration.load(config).control_socket, "explain",
                src=src, dst=dst, protocol=protocol, sport=sport, dport=dport, mtu=mtu, **{"in": inbound},
            )  # fmt: skip
        except DaemonError as error:
            if live:
                raise
            print(f"ipsecq: {error}; going by the files", file=sys.stderr)
    if answer is None:
        answer = daemon.offline(question, files.read(config))
    print(json.dumps(answer["data"], indent=2) if as_json else answer["text"])
