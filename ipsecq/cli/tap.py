"""``ipsecq tap``: inner packets of the running gateway, as pcapng with the header of enc(4)."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer

from ipsecq.daemon import config as configuration
from ipsecq.errors import CaptureError

if TYPE_CHECKING:
    from ipsecq.daemon.tap import TapClient

_LAST_SECONDS: Final = 5.0
"""After an interrupt workers send what they have and say what they dropped, a moment later; then the stream ends."""
_MESSAGE: Final = 1 << 19
_NICE: Final = 10
"""Who reads a capture must not take the processor from who makes the packets; what it is too late for is counted."""


def tap(
    view: Annotated[str, typer.Option(metavar="before|after", help="Of the outer header; both by default.")] = "",
    direction: Annotated[str, typer.Option("--dir", metavar="in|out", help="Both by default.")] = "",
    out: Annotated[str, typer.Option("--out", "-w", metavar="FILE", help="- is standard output.")] = "-",
    spi: Annotated[list[str] | None, typer.Option(metavar="SPI", help="This SA alone; may be repeated.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", metavar="N", help="End after N packets.", min=0)] = 0,
    snaplen: Annotated[int, typer.Option("-s", metavar="N", help="Octets of a packet to keep.", min=1)] = 262144,
    share: Annotated[
        int, typer.Option(metavar="PERCENT", help="Of a worker's time; what would take more is not captured.")
    ] = 5,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file (TOML).", envvar="IPSECQ_CONFIG", dir_okay=False)
    ] = configuration.DEFAULT_PATH,
) -> None:
    """Write what is inside the tunnels of the running gateway, in clear: ipsecq tap | wireshark -k -i -.

    The stream is pcapng, link type 109, with the header of enc(4).  It ends with an interrupt, and says what was seen
    and what was lost.  The variables net.enc.*.ipsec_bpf_mask say which views there are.
    """
    from ipsecq.daemon.tap import TapClient  # noqa: PLC0415

    try:
        spis = [int(text, 0) for text in spi or []]
    except ValueError:
        raise typer.BadParameter(f"--spi: expected numbers such as 0x1001, found {' '.join(spi or [])}") from None
    if out == "-" and sys.stdout.isatty():
        raise typer.BadParameter("packets are not for a terminal: give --out FILE, or a pipe to wireshark -k -i -")
    client = TapClient(
        configuration.load(config).tap_socket,
        view=view, dir=direction, spi=spis, snaplen=snaplen, share=share,
    )  # fmt: skip
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    try:
        stream = sys.stdout.buffer if out == "-" else Path(out).open("wb")  # noqa: SIM115  # closed by _copy
    except OSError as error:
        raise CaptureError(f"{out}: {error.strerror}") from None
    packets, dropped = _copy(client, stream, snaplen, count)
    print(f"{packets} packets captured, {dropped} dropped", file=sys.stderr)


def _copy(client: TapClient, stream: BinaryIO, snaplen: int, count: int) -> tuple[int, int]:
    """Until an interrupt, the end of the daemon, or ``count`` packets; (written, dropped)."""
    from ipsecq.pcap.enc import EncWriter, read_message  # noqa: PLC0415

    wake, woken = os.pipe()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.write(woken, b"x"))
    dropped = packets = 0
    deadline: float | None = None
    try:
        with stream:
            writer = EncWriter(stream, snaplen)
            stream.flush()
            while not count or writer.packets < count:
                patience = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                ready = select.select([client.packets.fileno(), wake], [], [], patience)[0]
                if wake in ready:
                    os.read(wake, 1)
                    client.close()
                    deadline = deadline or time.monotonic() + _LAST_SECONDS
                    continue
                if not ready:
                    break
                octets = client.packets.recv(_MESSAGE)
                if not octets:
                    break
                _, lost, records = read_message(octets)
                dropped += lost
                for record in records[: count - writer.packets if count else None]:
                    writer.write(record)
                stream.flush()
                packets = writer.packets
            writer.close(time.time_ns(), dropped)
    except BrokenPipeError:  # the reader of the stream has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        print(f"{packets} packets captured, {dropped} dropped", file=sys.stderr)
        name = "standard output" if stream is sys.stdout.buffer else stream.name
        raise CaptureError(f"{name}: {error.strerror}") from None
    finally:
        client.close()
    return packets, dropped
