"""``ipsecq explain``: why a packet is treated as it is, from the configuration alone; no daemon is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ipsecq.daemon import config as configuration

_PATH_MTU = 1500


def explain(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Source address, as the policies see it.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Destination address.")],
    protocol: Annotated[str, typer.Argument(metavar="PROTO", help="tcp, udp, icmp, a number; any.")] = "any",
    sport: Annotated[int, typer.Argument(metavar="SPORT", help="Source port; ICMP: type.", min=0, max=65535)] = 0,
    dport: Annotated[int, typer.Argument(metavar="DPORT", help="Destination port; ICMP: code.", min=0, max=65535)] = 0,
    inbound: Annotated[bool, typer.Option("--in", help="A packet that arrives, not one that leaves.")] = False,
    mtu: Annotated[int, typer.Option(help="Path MTU towards the outermost destination.", min=68, max=65535)] = _PATH_MTU,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: JSON.")] = False,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file (TOML).", envvar="IPSECQ_CONFIG", dir_okay=False)
    ] = configuration.DEFAULT_PATH,
) -> None:
    """Say what happens to a packet and why: policy, SAs, layout, MTU, kernel rule, variables.

    Reads the files, not the daemon: SAs that IKE negotiated and variables set since the start are not in it.
    """
    from ipsecq.cli import explain_report  # noqa: PLC0415
    from ipsecq.daemon import content as files  # noqa: PLC0415
    from ipsecq.engine import explain as engine  # noqa: PLC0415
    from ipsecq.engine import standalone  # noqa: PLC0415
    from ipsecq.netfilter import where  # noqa: PLC0415
    from ipsecq.numbers import Direction  # noqa: PLC0415
    from ipsecq.setkey import values  # noqa: PLC0415

    try:
        flow = engine.Flow(
            values.parse_address(src), values.parse_address(dst), values.parse_upper(protocol), sport, dport
        )
    except ValueError as error:
        raise typer.BadParameter(f"expected {error}") from None
    if len(flow.src) != len(flow.dst):
        raise typer.BadParameter(f"{src} and {dst} are of two families")
    content = files.read(config)
    tables = standalone.build(content.sad.dump(), content.spd.dump(), os.urandom, content.sysctl)
    answer = engine.inbound(tables, flow) if inbound else engine.outbound(tables, flow, mtu)
    settings = content.config.netfilter()
    direction = Direction.IN if inbound else Direction.OUT
    if where.exempt(settings, flow.protocol, flow.sport):
        chains = ["neighbour discovery on the link is accepted before any policy"]
    else:
        family = 4 if len(flow.src) == 4 else 6
        chains = where.chains(tables.spd.dump(), answer.policy, direction, family, settings, content.sysctl)
    if as_json:
        print(json.dumps(explain_report.as_data(answer, chains, mtu), indent=2))
    else:
        print(explain_report.as_text(answer, chains, mtu))
