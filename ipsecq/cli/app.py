"""All commands of ``ipsecq``, in one list."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import ipsecq
from ipsecq.cli import report
from ipsecq.cli.explain import explain
from ipsecq.cli.monitor import monitor
from ipsecq.cli.pcap import app as pcap
from ipsecq.cli.setkey import importer, setkey
from ipsecq.cli.tap import tap
from ipsecq.cli.top import top
from ipsecq.daemon import config as configuration
from ipsecq.daemon.control import ask

app = typer.Typer(
    name="ipsecq",
    help="IPsec for Linux gateways in user space: ESP, AH and IPComp with the semantics of BSD's ipsec(4).",
    no_args_is_help=True,
    add_completion=True,
    # A traceback with local variables would print keys.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file (TOML).", envvar="IPSECQ_CONFIG", dir_okay=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: JSON.")]


def _ask(config: Path, command: str, **arguments: Any) -> Any:
    return ask(configuration.load(config).control_socket, command, **arguments)


@app.command()
def run(config: ConfigOption = configuration.DEFAULT_PATH) -> None:
    """Run the gateway in the foreground."""
    from ipsecq.daemon import supervisor  # noqa: PLC0415

    sys.exit(supervisor.run(config))


@app.command()
def status(config: ConfigOption = configuration.DEFAULT_PATH, as_json: JsonOption = False) -> None:
    """Show SAs, policies, counters, workers and offloads of the running daemon."""
    answer = _ask(config, "status")
    print(json.dumps(answer, indent=2) if as_json else report.status(answer))


@app.command()
def interface(config: ConfigOption = configuration.DEFAULT_PATH, as_json: JsonOption = False) -> None:
    """List the route-based tunnels: device, ends, reqid, MTU, state, and packets as the device counts them."""
    found = _ask(config, "interface")
    print(json.dumps(found, indent=2) if as_json else report.interfaces(found))


@app.command()
def stat(
    config: ConfigOption = configuration.DEFAULT_PATH,
    protocol: Annotated[str, typer.Option("-p", help="ipsec, esp, ah or ipcomp.")] = "",
) -> None:
    """Print the counters in the words of netstat -sp."""
    print(_ask(config, "stat", protocol=protocol))


@app.command()
def reload(config: ConfigOption = configuration.DEFAULT_PATH) -> None:
    """Read configuration and policy files again: all of it takes effect, or none."""
    print(_ask(config, "reload"))


def _variables(incomplete: str) -> list[str]:
    from ipsecq.sysctl import VARIABLES  # noqa: PLC0415

    return [name for name in VARIABLES if name.startswith(incomplete)]


@app.command()
def sysctl(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[=VALUE]]...",
            help="Names, or nodes of the tree such as net.inet.ipsec, to read; NAME=VALUE to set.",
            autocompletion=_variables,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("-a", help="All variables.")] = False,
    describe: Annotated[bool, typer.Option("-d", help="Their meaning instead of their values.")] = False,
    values_only: Annotated[bool, typer.Option("-n", help="Values without names.")] = False,
    config: ConfigOption = configuration.DEFAULT_PATH,
) -> None:
    """Read and set the variables of ipsec(4); a new value holds at once, in all workers."""
    from ipsecq import sysctl as variables  # noqa: PLC0415

    wanted = list(variables.VARIABLES) if every else []
    changes: dict[str, str] = {}
    for name in names or []:
        key, equals, value = name.partition("=")
        if equals:
            changes[key] = value
        else:
            wanted += variables.matching(key)
    if not wanted and not changes:
        raise typer.BadParameter("name a variable, or use -a for all of them")
    if describe:
        for name in [*wanted, *changes]:
            print(f"{name}: {variables.describe(name)}")
        return
    if changes:
        for name, (old, new) in _ask(config, "sysctl-set", values=changes).items():
            print(f"{name}: {old} -> {new}")
    if wanted:
        values = _ask(config, "sysctl-get", names=wanted)
        for name in wanted:
            print(values[name] if values_only else f"{name}: {values[name]}")


@app.command()
def nft(
    config: ConfigOption = configuration.DEFAULT_PATH,
    blocked: Annotated[bool, typer.Option("--blocked", help="No queue opened: what policies protect is dropped.")] = False,
) -> None:
    """Print the nftables ruleset that the configuration means.  Needs neither root nor a daemon."""
    from ipsecq.daemon import content as files  # noqa: PLC0415
    from ipsecq.netfilter.compile import compile_ruleset  # noqa: PLC0415
    from ipsecq.netfilter.inner import InnerTable, included  # noqa: PLC0415
    from ipsecq.netfilter.load import Loader  # noqa: PLC0415

    content = files.read(config)
    settings = content.config.netfilter()
    print(compile_ruleset(content.spd.dump(), settings, content.sysctl), end="")
    if not blocked:
        print(Loader(settings).queue_statements(), end="")
        print(InnerTable(settings).whole(content.spd.dump(), content.sysctl, included(settings)), end="")


@app.command()
def doctor(
    config: ConfigOption = configuration.DEFAULT_PATH,
    probe: Annotated[bool, typer.Option(help="Ping the tunnels' far ends, small and full-sized.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with this machine, its files and the running gateway, and how to mend it.

    Exit status 1 when something must be mended.
    """
    from ipsecq.cli import examination  # noqa: PLC0415

    found = examination.findings(config, probe=probe)
    print(json.dumps(report.findings_json(found), indent=2) if as_json else report.findings(found))
    sys.exit(1 if any(finding.grade == "fail" for finding in found) else 0)


@app.command("exec", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def exec_(context: typer.Context, config: ConfigOption = configuration.DEFAULT_PATH) -> None:
    """Run a program (iked, setkey, …) whose PF_KEY sockets are served by ipsecq: ipsecq exec -- iked -d."""
    from ipsecq.pfkey import exec as execution  # noqa: PLC0415

    if not context.args:
        raise typer.BadParameter("name a program: ipsecq exec -- PROGRAM ARGUMENTS")
    settings = configuration.load(config)
    marks = settings.nftables
    execution.run(
        context.args, settings.pfkey_socket,
        mark_done=marks.mark_done, mark_mask=marks.mark_done | marks.mark_stolen,
        sockets_path=settings.sockets_socket,
    )  # fmt: skip


state = typer.Typer(no_args_is_help=True, help="What the state directory knows about sequence numbers.")
app.add_typer(state, name="state")
app.add_typer(pcap, name="pcap")


@state.command()
def reset(
    spi: Annotated[str, typer.Argument(metavar="[SPI]", help="The SA's SPI, decimal or 0x hexadecimal.")] = "",
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="Every SA that refuses to send, and every key that will be loaded: none was ever used before."
        ),
    ] = False,
    config: ConfigOption = configuration.DEFAULT_PATH,
) -> None:
    """Say that an SA that refuses to send has keys that were never used: it may send from now on.

    With keys that were used before, this gives the cipher away.

    After a state file was refused, each new hand-made key refuses to send until it is reset, since it may be one that
    was used before the loss.  When no key from then is left, neither in the gateway nor in a file that may be loaded
    again, --all ends that.
    """
    if every == bool(spi):
        raise typer.BadParameter("give the SPI of one SA, such as 0x1001, or --all")
    try:
        number = int(spi or "0", 0)
    except ValueError:
        raise typer.BadParameter(f"expected an SPI such as 0x1001, found {spi!r}") from None
    count = _ask(config, "state-reset", **({"all": True} if every else {"spi": number}))
    print(f"{'all' if every else f'0x{number:08x}'}: {count} SA{'' if count == 1 else 's'} may send")


app.command()(top)
app.command()(monitor)
app.command()(explain)
app.command(context_settings={"help_option_names": ["-?", "--help"]})(setkey)
app.command()(tap)
app.add_typer(importer, name="import")


@app.command()
def version() -> None:
    """Print the version."""
    print(f"ipsecq {ipsecq.__version__}")
