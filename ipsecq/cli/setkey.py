"""``ipsecq setkey``: setkey(8) on the running daemon."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import ipsecq
from ipsecq.daemon import config as configuration
from ipsecq.daemon.control import ask
from ipsecq.errors import ConfigError
from ipsecq.setkey.apply import check as find_refused
from ipsecq.setkey.commands import Command
from ipsecq.setkey.parser import parse
from ipsecq.setkey.values import format_address

_PART: Final = 16 << 10
"""Characters of a file in one request: far below the control socket's limit, however they are escaped."""


def setkey(
    messages: Annotated[list[Path] | None, typer.Argument(metavar="", hidden=True)] = None,
    file: Annotated[Path | None, typer.Option("-f", metavar="FILE", help="Carry out the sentences of a file.")] = None,
    stdin: Annotated[bool, typer.Option("-c", help="Carry out the sentences on standard input.")] = False,
    dump: Annotated[bool, typer.Option("-D", help="Show the SAs, with -P the policies.  Keys: to root alone.")] = False,
    flush: Annotated[bool, typer.Option("-F", help="Remove the SAs, with -P the policies.")] = False,
    policies: Annotated[bool, typer.Option("-P", help="With -D and -F: policies in place of SAs.")] = False,
    monitor: Annotated[
        int, typer.Option("-x", count=True, help="Show every PF_KEY message, until interrupted; twice: times as numbers.")
    ] = 0,
    hexadecimal: Annotated[bool, typer.Option("-h", "-H", help="With -x: the octets, without keys.")] = False,
    loop: Annotated[bool, typer.Option("-l", help="With -D: one line an SA, every second, until interrupted.")] = False,
    check: Annotated[bool, typer.Option("-n", help="Check the sentences and change nothing.")] = False,
    verbose: Annotated[bool, typer.Option("-v", help="Say how many sentences were carried out.")] = False,
    every: Annotated[bool, typer.Option("-a", help="Accepted: dead SAs are not kept, so none is hidden.")] = False,
    ports: Annotated[bool, typer.Option("-p", help="Accepted: ports of UDP encapsulation are always shown.")] = False,
    kernel: Annotated[bool, typer.Option("-k", help="Accepted: policies for forwarding are part of `in` here.")] = False,
    rfc: Annotated[bool, typer.Option("-r", help="Accepted: as -k.")] = False,
    scope: Annotated[bool, typer.Option("-g", help="Accepted: all policies have global scope.")] = False,
    no_sockets: Annotated[bool, typer.Option("-N", help="Accepted: -D -P shows no policies of sockets.")] = False,
    tied: Annotated[bool, typer.Option("-t", help="With -D -P: those of if_ipsec(4): there are none.")] = False,
    atomic: Annotated[bool, typer.Option("--atomic", help="All sentences take effect, or none.")] = False,
    version: Annotated[bool, typer.Option("-V", help="Print the version.")] = False,
    config: Annotated[
        Path, typer.Option("--config", help="Configuration file (TOML).", envvar="IPSECQ_CONFIG", dir_okay=False)
    ] = configuration.DEFAULT_PATH,
) -> None:
    """Add, show and remove SAs and policies by hand, in the words of setkey(8)."""
    if version:
        print(f"ipsecq {ipsecq.__version__} setkey")
        return
    if messages:
        raise typer.BadParameter(f"sentences are read by -f {messages[0]}; files of raw PF_KEY messages are not read here")
    if sum((file is not None, stdin, dump, flush, bool(monitor))) != 1:
        raise typer.BadParameter("give one of -c, -f FILE, -D, -F and -x")
    if file is not None or stdin:
        _carry_out(config, file, check=check, atomic=atomic, verbose=verbose)
        return
    settings = configuration.load(config)
    if dump and loop and not policies:
        _watch(settings.pfkey_socket)
    elif dump and policies and tied and not scope:
        print("No SPD entries.")
    elif dump:
        _show(settings.control_socket, what="spd" if policies else "sad")
    elif flush:
        _execute(settings.control_socket, "spdflush;" if policies else "flush;", "", atomic=False)
    else:
        _monitor(settings.pfkey_socket, numbers=monitor > 1, hexadecimal=hexadecimal)


def _carry_out(config: Path, file: Path | None, *, check: bool, atomic: bool, verbose: bool) -> None:
    name = str(file) if file is not None else "stdin"
    try:
        octets = file.read_bytes() if file is not None else sys.stdin.buffer.read()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=name) from error
    text = octets.decode("utf-8", "surrogateescape")
    commands = parse(text, name)  # a mistake is found before the daemon hears of anything
    if check:
        _check(config, commands, name)
        return
    errors = _execute(configuration.load(config).control_socket, text, name, atomic=atomic)
    if verbose:
        print(f"{name}: {len(commands) - len(errors)} of {len(commands)} sentences carried out")
    if errors:
        sys.exit(1)


def _check(config: Path, commands: list[Command], name: str) -> None:
    """Say what a load would refuse; without a configuration file, by the defaults."""
    legacy = config.exists() and configuration.load(config).daemon.allow_legacy
    refused = find_refused(commands, now=time.time(), file=name, allow_legacy=legacy)
    for error in refused:
        print(f"ipsecq: {error}", file=sys.stderr)
    if refused:
        sys.exit(1)
    print(f"{name}: {len(commands)} sentences, no mistake")


def _execute(socket: Path, text: str, name: str, *, atomic: bool) -> list[str]:
    """Send the text in parts; print what its sentences show; the lines about those that were refused."""
    token, at = "", 0
    answer: Any = None
    while answer is None or "token" in answer:
        part, at = text[at : at + _PART], at + _PART
        answer = ask(
            socket, "setkey", timeout=600.0, token=token, text=part, more=at < len(text), file=name, atomic=atomic
        )
        token = answer.get("token", "")
    for line in answer["errors"]:
        print(f"ipsecq: {line}", file=sys.stderr)
    if answer["shown"]:
        _show(socket, token=answer["shown"])
    return list(answer["errors"])


def _show(socket: Path, **request: Any) -> None:
    empty = f"No {'SPD' if request.get('what') == 'spd' else 'SAD'} entries."
    while True:
        answer = ask(socket, "setkey-dump", **request)
        if not answer["text"]:
            print(empty)
            return
        sys.stdout.write(answer["text"])
        if not answer["token"]:
            return
        request = {"token": answer["token"]}


def _monitor(socket: Path, *, numbers: bool, hexadecimal: bool) -> None:
    from ipsecq.pfkey.client import PfkeyClient  # noqa: PLC0415
    from ipsecq.pfkey.constants import MessageType  # noqa: PLC0415
    from ipsecq.pfkey.messages import Message, build  # noqa: PLC0415

    with PfkeyClient.connect(socket) as client:
        client.socket.settimeout(None)
        client.send(Message(MessageType.X_PROMISC, satype=1))
        while True:
            message = client.receive()
            spi = f" spi=0x{message.sa.spi:08x}" if message.sa is not None else ""
            error = f" errno={message.errno}" if message.errno else ""
            now = f"{time.time():.6f}" if numbers else time.strftime("%H:%M:%S")
            print(
                f"{now} SADB_{MessageType(message.type).name} satype={message.satype}"
                f" seq={message.seq} pid={message.pid}{spi}{error}",
                flush=True,
            )
            if hexadecimal:
                message.key_auth = message.key_encrypt = None
                octets = build(message, client.dialect)
                for at in range(0, len(octets), 16):
                    print("        " + octets[at : at + 16].hex(" ", 4), flush=True)


def _watch(socket: Path) -> None:
    """``setkey -D -l``: age and hard limit in seconds of every SA, again and again."""
    from ipsecq.pfkey.client import PfkeyClient  # noqa: PLC0415

    states = {0: "L", 1: "M", 2: "D", 3: "d"}
    names = {2: "ah", 3: "esp", 9: "ipc"}
    print("time p   s spi      ltime       src -> dst")
    with PfkeyClient.connect(socket) as client:
        while True:
            now = int(time.time())
            for message in client.dump():
                if message.sa is None or message.src is None or message.dst is None:
                    continue
                current, hard = message.lifetime_current, message.lifetime_hard
                age = now - current.addtime if current is not None else 0
                limit = hard.addtime if hard is not None else 0
                print(
                    f"{now % 10000:04} {names.get(message.satype, str(message.satype)):3} "
                    f"{states.get(message.sa.state, '?')} {message.sa.spi:08x} {age:5}/{limit:<5} "
                    f"{format_address(message.src.address)} -> {format_address(message.dst.address)}",
                    flush=True,
                )
            client.events.clear()
            time.sleep(1.0)


importer = typer.Typer(help="Other systems' configuration as sentences of setkey(8).", no_args_is_help=True)


@importer.callback()
def _import() -> None:
    """Other systems' configuration as sentences of setkey(8)."""


@importer.command("ip-xfrm")
def import_xfrm() -> None:
    """Read ``ip xfrm state; ip xfrm policy`` on standard input.  Exit status 1: something has no counterpart (comments)."""
    from ipsecq.setkey.xfrm import convert  # noqa: PLC0415

    sentences, refused = convert(sys.stdin.read())
    for sentence in sentences:
        print(sentence)
    sys.exit(1 if refused else 0)
