"""``ipsecq pcap decrypt`` and ``ipsecq pcap encrypt``: capture files through the engine, without root or daemon."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from ipsecq.errors import CaptureError, ConfigError

if TYPE_CHECKING:
    from ipsecq.pcap import tool
    from ipsecq.setkey.apply import Applied

app = typer.Typer(
    help="Decrypt and encrypt capture files (pcap, pcapng) with the gateway's own engine. Needs no root.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="SAs and policies in the syntax of setkey(8).", dir_okay=False)
]
InArgument = Annotated[str, typer.Argument(metavar="IN", help="Capture file; - is standard input.")]
OutArgument = Annotated[
    str, typer.Argument(metavar="[OUT]", help="Capture file of the same kind; - is standard output; may be left out.")
]
KeepOption = Annotated[bool, typer.Option("--keep-others", help="Copy packets that are not for IPsec, too.")]
TextOption = Annotated[bool, typer.Option("--text", help="A line for every packet of IN.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="A line with the reason for every dropped packet.")]

STATUS = "Exit status: 0 if any packet was {0}, 1 if none was, 2 if a file is wrong."


@app.command(epilog=STATUS.format("decrypted"))
def decrypt(
    config: ConfigOption,
    source: InArgument,
    target: OutArgument = "",
    keep_others: KeepOption = False,
    text: TextOption = False,
    verbose: VerboseOption = False,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help='Decrypt ESP whose authentication key is missing (-A hmac-sha1 "").')
    ] = False,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="Take repeated packets as well.")] = False,
) -> None:
    """Write the inner packets of IN to OUT, and say per SA what could not be opened.  Both directions at once."""
    from ipsecq.pcap import tool  # noqa: PLC0415

    content = _content(config, allow_legacy=True, unauthenticated=no_auth)
    worker = tool.Decryptor(content.sad, os.urandom, unauthenticated=no_auth, replay=not no_replay)
    _run(worker, source, target, keep_others, text, verbose)


@app.command(epilog=STATUS.format("encrypted"))
def encrypt(
    config: ConfigOption,
    source: InArgument,
    target: OutArgument = "",
    keep_others: KeepOption = False,
    text: TextOption = False,
    verbose: VerboseOption = False,
    mtu: Annotated[
        int, typer.Option("--mtu", min=0, max=65535, help="Fragment longer results as a link would; 0: no limit.")
    ] = 0,
    allow_legacy: Annotated[bool, typer.Option("--allow-legacy", help="Accept 3DES and MD5.")] = False,
) -> None:
    """Apply the outbound policies to the packets of IN.  Sequence numbers start at 1: never use a live gateway's keys."""
    from ipsecq.pcap import tool  # noqa: PLC0415

    content = _content(config, allow_legacy=allow_legacy, unauthenticated=False)
    worker = tool.Encryptor(content.sad, content.spd.dump(), os.urandom, mtu=mtu)
    _run(worker, source, target, keep_others, text, verbose)


def _content(config: Path, *, allow_legacy: bool, unauthenticated: bool) -> Applied:
    from ipsecq.policy.spd import Spd  # noqa: PLC0415
    from ipsecq.sa.sad import Sad  # noqa: PLC0415
    from ipsecq.setkey.apply import apply  # noqa: PLC0415
    from ipsecq.setkey.parser import parse  # noqa: PLC0415

    try:
        # A quoted key may hold any octets.
        written = config.read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(config)) from error
    return apply(
        parse(written, str(config)), Sad(), Spd(), now=time.time(), file=str(config), allow_legacy=allow_legacy,
        allow_unauthenticated=unauthenticated,
    )  # fmt: skip


def _run(worker: tool.Worker, source: str, target: str, keep_others: bool, text: bool, verbose: bool) -> None:
    from ipsecq.pcap import links, tool  # noqa: PLC0415
    from ipsecq.pcap.format import Reader, Writer  # noqa: PLC0415

    out = sys.stderr if target == "-" else sys.stdout

    def say(line: str) -> None:
        print(line, file=out)

    with ExitStack() as stack:
        stream, size = _input(source, stack)
        reader = Reader(stream, source)
        writer = None
        if target:
            writer = Writer.like(_output(source, target, stack), reader, links.written_as(reader.link))
        try:
            report = tool.run(
                reader, writer, worker, keep_others=keep_others, say=say if text or verbose else None,
                drops_only=not text, progress=_progress(size, worker.report) if sys.stderr.isatty() else None,
            )  # fmt: skip
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CaptureError(f"{source} to {target or 'nowhere'}: {error.strerror}") from error
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    for line in report.lines():
        say(line)
    if report.error is not None:
        raise report.error
    if not report.done:
        raise typer.Exit(1)


def _input(source: str, stack: ExitStack) -> tuple[BinaryIO, int]:
    """The stream, and its size in octets (0: not known)."""
    if source == "-":
        return sys.stdin.buffer, 0
    try:
        stream = Path(source).open("rb")  # noqa: SIM115
    except OSError as error:
        raise CaptureError(f"{source}: cannot be read: {error.strerror}") from error
    stack.enter_context(stream)
    return stream, os.fstat(stream.fileno()).st_size


def _output(source: str, target: str, stack: ExitStack) -> BinaryIO:
    if target == "-":
        return sys.stdout.buffer
    path = Path(target)
    try:
        if source != "-" and path.exists() and path.samefile(source):
            raise CaptureError(f"{target}: is the input, too: name another output")
        stream = path.open("wb")
    except OSError as error:
        raise CaptureError(f"{target}: cannot be written: {error.strerror}") from error
    return stack.enter_context(stream)


def _progress(size: int, report: tool.Report) -> Callable[[int, int], None]:
    """A line on the terminal, twice a second."""
    last = time.monotonic()

    def show(position: int, packets: int) -> None:
        nonlocal last
        if time.monotonic() - last < 0.5:
            return
        last = time.monotonic()
        share = f"{100 * position / size:.0f} %, " if size else ""
        print(f"\r\x1b[K{share}{packets} packets, {report.done} {report.verb}", end="", file=sys.stderr, flush=True)

    return show
