"""What each stage of a packet's way costs: ``python -m ipsecq.lab.stages`` (root).

Time of one thread in µs a packet (of a super-packet: a segment), the least of many rounds.  *read* and *verdict* are the
queue's, in batches of 64; *parse* is the header view; *look-up* the flow cache and its counts; *seal* and *open* the rest
of the engine, of which *cipher* is AES-128-GCM alone.  *fast out* and *fast in* are parsing, look-up, sealing or opening,
counting and putting together by the compiled fast path, where that is installed.  *send* hands ESP to the kernel,
*inject* decapsulated packets to enc0, both up to where the next namespace drops them.  A gateway's costs are higher:
here caches are warm.
"""

from __future__ import annotations

import argparse
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ipsecq import fastpath
from ipsecq.crypto import cipher
from ipsecq.datapath import enc0
from ipsecq.datapath.enc0 import Enc0
from ipsecq.datapath.fast import FastPath
from ipsecq.datapath.nfqueue import NF_DROP
from ipsecq.datapath.output import RawOutput
from ipsecq.datapath.queue import Queue
from ipsecq.datapath.udp import SOL_UDP, UDP_SEGMENT, UdpOutput, UdpSockets
from ipsecq.engine import standalone
from ipsecq.engine.emit import Burst, Emissions
from ipsecq.engine.inbound_run import InboundRuns
from ipsecq.engine.outbound_run import OutboundRuns
from ipsecq.engine.tables import Tables
from ipsecq.lab.netns import Lab, Namespace
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.packet import checksum, ipv4
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.segments import split
from ipsecq.packet.view import PacketView
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sa.association import NatTraversal, SecurityAssociation
from ipsecq.secret import Key

BATCH: Final = 64
SEGMENT: Final = 1348
SEGMENTS: Final = 44
"""Of one super-packet: its ESP in UDP fills one burst."""
NEAR, FAR = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))
HOSTS: Final = bytes((10, 1, 0, 2)), bytes((10, 2, 0, 2))
NOW: Final = 1000.0
_DONE: Final = 0x01000000
_QUEUE: Final = 77
_PORT: Final = 9


def best(action: Callable[[], object], packets: int, rounds: int, before: Callable[[], object] | None = None) -> float:
    """Time of ``action`` in µs a packet, the least of ``rounds``."""
    least = float("inf")
    for _ in range(rounds):
        if before is not None:
            before()
        start = time.perf_counter_ns()
        action()
        least = min(least, time.perf_counter_ns() - start)
    return least / packets / 1e3


@dataclass
class Engine:
    """A sending and a receiving gateway, plain ESP or ESP in UDP."""

    tables: Tables
    outbound: OutboundRuns
    inbound: InboundRuns
    emit: Emissions


def engine(*, udp: bool, action: Action = Action.IPSEC) -> Engine:
    """Both directions over the same SA; without replay window, so that the same datagrams can be opened again."""
    sa = SecurityAssociation(
        Protocol.ESP, 0x1001, NEAR, FAR, Mode.TUNNEL, encryption="aes-gcm-16", encryption_key=Key(bytes(range(20))),
        natt=NatTraversal() if udp else None,
    )  # fmt: skip
    selector = Selector(HOSTS[0], HOSTS[0], HOSTS[1], HOSTS[1])
    transforms = (Transform(Protocol.ESP, Mode.TUNNEL, NEAR, FAR, Level.REQUIRE),) if action is Action.IPSEC else ()
    policies = [Policy(direction, selector, action, transforms) for direction in (Direction.OUT, Direction.IN)]
    tables = standalone.build([sa], policies, bytes)
    tables.burst_ports = frozenset({4500})
    return Engine(
        tables, OutboundRuns(tables, lambda _: 1500, lambda _: NEAR), InboundRuns(tables, unite=True), Emissions()
    )


def datagram(octets: int) -> bytes:
    """An inner UDP datagram of so many octets in all."""
    body = (1000).to_bytes(2, "big") + (2000).to_bytes(2, "big") + (octets - 20).to_bytes(2, "big") + bytes(octets - 26)
    return checksum.complete(ipv4.header(*HOSTS, 17, len(body), df=True) + body)


def stream(segments: int) -> bytes:
    """A TCP super-packet with time stamps."""
    head = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 32 << 2, 0x18, 500, 0, 0) + b"\1\1\x08\n" + bytes(8)
    body = (head + bytes(range(256)) * (segments * SEGMENT // 256 + 1))[: len(head) + segments * SEGMENT]
    return checksum.complete(ipv4.header(*HOSTS, 6, len(body), df=True) + body)


class _Nowhere:
    """Stands for the way out, where what is made is measured and not sent."""

    coalescing = datagrams = True
    fd = -1
    version = 0

    def mtu_of(self, _dst: bytes) -> int:
        """That of an Ethernet."""
        return 1500

    def until(self, _dst: bytes) -> float:
        """For good."""
        return float("inf")

    def descriptor(self, _family: int) -> int:
        """No socket."""
        return -1

    def descriptors(self, _family: int) -> tuple[int, int]:
        """None without and none with DF."""
        return -1, -1


def fast(side: Engine) -> FastPath | None:
    """A fast path beside the engine, if there is one."""
    if not fastpath.active:
        return None
    nowhere: Any = _Nowhere()
    path = FastPath(
        side.tables, side.outbound, side.inbound, nowhere, nowhere, nowhere, nowhere, lambda _: None, None, mark_stolen=0,
        mark_sockets=0, collect=True,
    )  # fmt: skip
    path.ready()
    return path


def _fast_out(side: Engine, packet: bytes, size: int, packets: int, rounds: int) -> float | None:
    """A batch of packets, or one super-packet, of a flow that the engine has decided about."""
    path = fast(side)
    if path is None:
        return None
    side.outbound.process(split(packet, size)[0] if size else packet, NOW, side.emit)
    path.learn_out(0)
    sealer, batch = path.sealer, [packet] * (1 if size else packets)

    def work() -> None:
        for each in batch:
            sealer.seal(each, False, size != 0, size, 0, 0, NOW)
        sealer.finish()

    return best(work, packets, rounds, sealer.collected.clear)


def _fast_in(side: Engine, datagrams: Sequence[Buffer], packets: int, rounds: int, first: Buffer) -> float | None:
    """Datagrams, or one super-packet, of an SA and a flow inside it that the engine has decided about."""
    path = fast(side)
    if path is None:
        return None
    opener = path.opener
    for _ in range(2):
        opener.open(first, False, NOW)
        side.inbound.process(first, NOW, side.emit)
        path.learn_in()

    def work() -> None:
        for each in datagrams:
            opener.open(each, len(datagrams) == 1, NOW)
        opener.finish()

    return best(work, packets, rounds, opener.collected.clear)


def engine_rows(rounds: int) -> dict[str, dict[str, float]]:
    """The stages without I/O."""
    rows: dict[str, dict[str, float]] = {}
    view = PacketView()
    for octets in (64, 1400):
        side, clear = engine(udp=False), engine(udp=False, action=Action.NONE)
        packet = datagram(octets)
        row = rows[f"{octets} octets"] = {}
        row["parse"] = best(lambda p=packet: [view.load(p) for _ in range(BATCH)], BATCH, rounds)  # type: ignore[misc]
        passing = _each(clear.outbound.process, [packet] * BATCH, clear.emit, rounds)
        row["look-up"] = passing - row["parse"]
        row["seal"] = _each(side.outbound.process, [packet] * BATCH, side.emit, rounds) - passing
        wire = list(side.emit.wire)
        row["seal, in runs"] = _seal_run(side, [packet] * BATCH, rounds)
        row["open"] = _each(side.inbound.process, wire, side.emit, rounds) - row["parse"]
        views: list[Buffer] = [memoryview(each) for each in wire]
        row["open, in runs"] = _run(side, views, rounds)
        row["cipher"] = _cipher(octets, rounds)
        add(row, "fast out", _fast_out(side, packet, 0, BATCH, rounds))
        add(row, "fast in", _fast_in(side, wire, BATCH, rounds, wire[0]))
    for udp in (False, True):
        side = engine(udp=udp)
        whole = stream(SEGMENTS)
        pieces = split(whole, SEGMENT)
        row = rows["super-packet, " + ("ESP in UDP" if udp else "ESP")] = {}
        side.outbound.process(pieces[0], NOW, side.emit)
        side.emit.clear()
        run, emit = side.outbound.process_super, side.emit
        row["seal"] = best(lambda r=run, w=whole, e=emit: r(w, SEGMENT, NOW, e), SEGMENTS, rounds, emit.clear)  # type: ignore[misc]
        if udp:
            whole = _united(emit.bursts[0][1])
            row["open, in runs"] = _super(side, memoryview(whole), rounds)
        else:
            views = [memoryview(each) for each in emit.wire]
            row["open, in runs"] = _run(side, views, rounds)
        row["cipher"] = _cipher(len(pieces[0]), rounds)
        first = _first(side, pieces[0])
        add(row, "fast in", _fast_in(side, [whole] if udp else views, SEGMENTS, rounds, first))
        add(row, "fast out", _fast_out(side, stream(SEGMENTS), SEGMENT, SEGMENTS, rounds))
    return rows


def add(row: dict[str, float], stage: str, value: float | None) -> None:
    """A figure, where there is one."""
    if value is not None:
        row[stage] = value


def _first(side: Engine, packet: bytes) -> bytes:
    """The datagram that one packet becomes."""
    emit = Emissions()
    side.outbound.process(packet, NOW, emit)
    return emit.wire[0]


def _each(process: Callable[[Buffer, float, Emissions], int], packets: list[bytes], emit: Emissions, rounds: int) -> float:
    def work() -> None:
        for packet in packets:
            process(packet, NOW, emit)

    return best(work, len(packets), rounds, emit.clear)


def _seal_run(side: Engine, packets: list[Buffer], rounds: int) -> float:
    work = side.outbound.process_run
    return best(lambda: work(packets, False, NOW, side.emit), len(packets), rounds, side.emit.clear)


def _run(side: Engine, packets: list[Buffer], rounds: int) -> float:
    def work() -> None:
        left = packets
        while left:
            left = left[side.inbound.process_run(left, NOW, side.emit) or 1 :]

    return best(work, len(packets), rounds, side.emit.clear)


def _super(side: Engine, packet: Buffer, rounds: int) -> float:
    take = side.inbound.process_super
    return best(lambda: take(packet, NOW, side.emit), SEGMENTS, rounds, side.emit.clear)


def _united(burst: Burst) -> bytes:
    """The UDP super-packet that the far gateway's queue hands over."""
    length = 8 + len(burst.data)
    header = ipv4.header(burst.src, burst.dst, 17, length)
    return header + struct.pack(">HHHH", burst.sport, burst.dport, length, 0) + burst.data


def _cipher(octets: int, rounds: int) -> float:
    gcm = cipher.build("aes-gcm-16", Key(bytes(20)))
    packet, header = bytes(octets + 2), bytes(8)
    return best(lambda: [gcm.seal(b"", header, header, packet, b"") for _ in range(BATCH)], BATCH, rounds)


def io_rows(near: Namespace, far: Namespace, rounds: int) -> dict[str, dict[str, float]]:
    """The system calls, in namespace ``near``; ``far`` drops everything."""
    far.nft("table inet t { chain c { type filter hook prerouting priority -300; policy drop; }; }")
    near.nft('table inet t { chain c { type filter hook prerouting priority -300; iifname "enc0" drop; }; }')
    near.run(
        "iptables-nft", "-A", "OUTPUT", "-p", "udp", "--dport", str(_PORT), "-j", "NFQUEUE", "--queue-num", str(_QUEUE)
    )
    return near.call(lambda: _io_rows(rounds))


def _io_rows(rounds: int) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    enc0.create("enc0")
    sockets = UdpSockets(_DONE)
    with Queue(_QUEUE, gso=True) as queue, Enc0("enc0") as device, socket.socket(type=socket.SOCK_DGRAM) as source:
        source.connect(("192.0.2.2", _PORT))
        raw, udp = RawOutput(_DONE), UdpOutput(sockets.sockets)
        for octets in (64, 1400):
            row = rows[f"{octets} octets"] = {}
            data = bytes(octets - 28)
            row["read"], row["verdict"] = _queue(queue, lambda d=data: [source.send(d) for _ in range(BATCH)], BATCH, rounds)  # type: ignore[misc]
            side = engine(udp=False)
            _each(side.outbound.process, [datagram(octets)] * BATCH, side.emit, 1)
            row["send"] = best(lambda w=list(side.emit.wire): raw.send(w), BATCH, rounds)  # type: ignore[misc]
            inner = [datagram(octets)] * BATCH
            row["inject"] = best(lambda i=inner: [device.write([each]) for each in i], BATCH, rounds)  # type: ignore[misc]
        source.setsockopt(SOL_UDP, UDP_SEGMENT, SEGMENT)
        whole = bytes(SEGMENT * SEGMENTS)
        for kind in ("ESP", "ESP in UDP"):
            row = rows[f"super-packet, {kind}"] = {}
            row["read"], row["verdict"] = _queue(queue, lambda: source.send(whole), SEGMENTS, rounds)
            side = engine(udp=kind != "ESP")
            side.outbound.process(split(stream(1), SEGMENT)[0], NOW, side.emit)
            side.emit.clear()
            side.outbound.process_super(stream(SEGMENTS), SEGMENT, NOW, side.emit)
            emit = side.emit
            if kind == "ESP":
                row["send"] = best(lambda w=list(emit.wire): raw.send(w), SEGMENTS, rounds)  # type: ignore[misc]
            else:
                bursts = [burst for _, burst in emit.bursts]
                row["send"] = best(lambda b=bursts: [udp.send(each) for each in b], SEGMENTS, rounds)  # type: ignore[misc]
            views: list[Buffer] = [memoryview(each) for _, burst in emit.bursts for each in burst.datagrams()]
            views += [memoryview(each) for each in emit.wire]
            emit.clear()
            side.inbound.process_run(views, NOW, emit)
            row["inject"] = best(lambda r=list(emit.runs): device.write_all([], r), SEGMENTS, rounds)  # type: ignore[misc]
        raw.close()
        udp.close()
    return rows


def _queue(queue: Queue, fill: Callable[[], object], packets: int, rounds: int) -> tuple[float, float]:
    """µs a packet of reading a batch, and of its verdicts."""
    read = verdict = float("inf")
    for _ in range(rounds):
        fill()
        start = time.perf_counter_ns()
        batch = queue.read()
        middle = time.perf_counter_ns()
        for cookie, *_ in batch:
            queue.add_verdict(cookie, NF_DROP)
        queue.flush()
        read, verdict = min(read, middle - start), min(verdict, time.perf_counter_ns() - middle)
    return read / packets / 1e3, verdict / packets / 1e3


STAGES: Final = (
    "read", "parse", "look-up", "seal", "seal, in runs", "open", "open, in runs", "fast out", "fast in", "cipher", "send",
    "inject", "verdict",
)  # fmt: skip


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| µs a packet | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[stage]:.2f}" if stage in row else "" for stage in STAGES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """All rows."""
    rows = engine_rows(rounds)
    with Lab() as lab:
        near, far = lab.namespace("near"), lab.namespace("far")
        lab.link(near, "wan", far, "wan")
        near.run("ip", "address", "add", "192.0.2.1/24", "dev", "wan")
        far.run("ip", "address", "add", "192.0.2.2/24", "dev", "wan")
        for name, row in io_rows(near, far, rounds).items():
            rows[name].update(row)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="time of each stage of a packet's way")
    parser.add_argument("--rounds", type=int, default=200, help="measurements of each stage; the least counts")
    print(table(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
