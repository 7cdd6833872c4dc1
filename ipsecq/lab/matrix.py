"""The interoperability matrix: every chain of transforms, mode and pair of IP versions against the Linux kernel's IPsec.

    python -m ipsecq.lab.matrix                            run it all, print the table
    python -m ipsecq.lab.matrix --write docs/interop.md    … and write it down
    python -m ipsecq.lab.matrix --only 'nat-t' -v          cells whose name holds a text

One User-Mode Linux serves all cells.  They are loaded in lots, each cell with addresses of its own, and each is then
exercised by UDP datagrams of many sizes that the kernel's end must return unchanged: ipsecq seals and the kernel opens,
the kernel seals and ipsecq opens.
"""

from __future__ import annotations

import argparse
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipsecq.counters import Counter
from ipsecq.lab.bare import BareGateway, udp
from ipsecq.lab.cells import IPCOMP, Cell, Ends, setkey, xfrm_add
from ipsecq.lab.matrix_cells import NOT_RUN, cells
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.uml import UmlPeer
from ipsecq.numbers import IPPROTO_UDP
from ipsecq.packet.checksum import verify_transport
from ipsecq.packet.view import DESTINATION_OPTIONS, HOP_BY_HOP, PacketView

SIZES: Final = (1, 2, 3, 15, 16, 89, 100, 512, 1281, 1400, 1472, 3000, 9000)
"""Octets of UDP payload; the wire's MTU is 1500."""
LOT: Final = 36
"""Cells that the kernel's end holds at a time."""
PATIENCE: Final = (2.0, 4.0, 10.0)
"""Seconds until a datagram without an echo is sent again, and again, and counts as lost: the wire may lose one, and a
busy machine lets the other kernel wait.  Of what IPsec drops, one end or the other keeps count, and that is a failure."""
LATE_SECONDS: Final = 3.0
"""What was sent twice may be echoed twice, and the next cell doesn't know this one's SAs: quiet for so long ends it."""
LEAST_UDP6: Final = 40 + 48
"""The kernel (xfrm6_udp_encap_rcv, 6.1) drops ESP in UDP over IPv6 when less than this arrives: 40 is counted twice."""

_OUR_MAC: Final = bytes((2, 0, 0, 0, 0, 1))
_PEER_MAC: Final = bytes((2, 0, 0, 0, 0, 2))
_ECHO_END: Final = str(Path(__file__).with_name("echo_end.py"))
_OPTIONS: Final = {
    # Router alert, time stamp (mutable) with room for one, NOP, end of list; all that AH must tell apart.
    4: bytes.fromhex("94040000 440805000000000001000000"),
    # Hop-by-hop: next header UDP, PadN, an unknown option to skip whose data may change en route, PadN.
    6: bytes.fromhex("1101 01020000 3e04deadbeef 01020000"),
}
_DESTINATION: Final = bytes.fromhex("1100 3e04deadbeef")
"""Destination options: next header UDP, an unknown option to skip whose data may change en route."""


@dataclass(frozen=True)
class Outcome:
    """What became of one cell."""

    cell: Cell
    failures: tuple[str, ...] = ()
    missing: str = ""
    """Why the kernel's end could not be configured; the cell did not run then."""

    @property
    def passed(self) -> bool:
        """It ran, and everything came back."""
        return not self.failures and not self.missing


@dataclass
class Matrix:
    """All outcomes of one run."""

    kernel: str
    seconds: float = 0.0
    datagrams: int = 0
    resent: int = 0
    """Those of them that vanished without a trace, or were late, and were sent again."""
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ran(self) -> list[Outcome]:
        """Those that the kernel's end accepted."""
        return [outcome for outcome in self.outcomes if not outcome.missing]

    @property
    def failed(self) -> list[Outcome]:
        """Those that ran and in which something was wrong."""
        return [outcome for outcome in self.outcomes if outcome.failures]

    @property
    def left_out(self) -> list[Outcome]:
        """Those that the kernel's end refused."""
        return [outcome for outcome in self.outcomes if outcome.missing]

    def summary(self) -> str:
        """One line, and one for each cell that was left out or failed."""
        passed = len(self.ran) - len(self.failed)
        lines = [
            f"{len(self.ran)} cells ran against Linux {self.kernel}, {passed} passed, {len(self.failed)} failed,"
            f" {len(self.left_out)} left out; {self.datagrams} datagrams each way ({self.resent} sent twice),"
            f" {self.seconds:.0f} s"
        ]
        lines += [f"left out: {each.cell.name}: {each.missing}" for each in self.left_out]
        lines += [f"left out: {what}: {why}" for what, why in NOT_RUN.items()]
        lines += [f"FAILED: {each.cell.name}: {'; '.join(each.failures)}" for each in self.failed]
        return "\n".join(lines)


def _place(number: int) -> dict[str, dict[int, str]]:
    """The four addresses of place ``number`` in a lot."""
    return {
        "near_outer": {4: f"192.0.2.{number}", 6: f"2001:db8:a::{number:x}"},
        "far_outer": {4: f"198.51.100.{number}", 6: f"2001:db8:b::{number:x}"},
        "near_inner": {4: f"10.1.0.{number}", 6: f"fd00:1::{number:x}"},
        "far_inner": {4: f"10.2.0.{number}", 6: f"fd00:2::{number:x}"},
    }


class Bench:
    """A bare gateway and a User-Mode Linux on one wire."""

    def __init__(self, lab: Lab, lot: int = LOT) -> None:
        self.lot = lot
        space = lab.namespace("gw1")
        space.run("ip", "tuntap", "add", "dev", "wan", "mode", "tap")
        space.run("ip", "link", "set", "wan", "up")
        self.gateway = BareGateway(space, "wan", _OUR_MAC, _PEER_MAC)
        self.peer = UmlPeer(space, "wan", mac=_PEER_MAC.hex(":"))
        mac = _OUR_MAC.hex(":")
        lines = ["link add lan0 type dummy", "link set lan0 up", "addr add 203.0.113.2/24 dev eth0"]
        lines += ["addr add 2001:db8:f::2/64 dev eth0 nodad"]
        for via in ("203.0.113.1", "2001:db8:f::1"):
            lines += [f"neigh add {via} lladdr {mac} dev eth0 nud permanent", f"route add default via {via} dev eth0"]
        for number in range(1, lot + 1):
            place = _place(number)
            for end, device in (("far_outer", "eth0"), ("far_inner", "lan0")):
                lines += [f"addr add {place[end][4]}/32 dev {device}", f"addr add {place[end][6]}/128 dev {device} nodad"]
        self.peer.ip(*lines)
        self.peer.spawn("/usr/bin/python3", _ECHO_END)
        wait_for(lambda: len(re.findall(r":7 ", self.peer.run("ss", "-lun").out)) == 2, "the echo server in the peer")
        self.datagrams = self.resent = 0

    def run(self, chosen: Sequence[Cell], report: Callable[[Outcome], None]) -> None:
        """Run cells in lots; each outcome is reported once."""
        for at in range(0, len(chosen), self.lot):
            lot = [cell.keyed() for cell in chosen[at : at + self.lot]]
            ends = [self._ends(cell, number) for number, cell in enumerate(lot, 1)]
            refused = self._configure(lot, ends)
            found = [
                [] if number in refused else self._exercise(cell, ends[number])
                for number, cell in enumerate(lot)
            ]  # fmt: skip
            states = self._states()
            for number, cell in enumerate(lot):
                if number in refused:
                    report(Outcome(cell, missing=refused[number]))
                else:
                    report(Outcome(cell, (*found[number], *_judge(cell, ends[number], states))))

    @staticmethod
    def _ends(cell: Cell, number: int) -> Ends:
        place = _place(number)
        outer, inner = cell.outer, cell.inner
        kind, bits = ("inner" if cell.mode == "tunnel" else "outer"), 32 if inner == 4 else 128
        return Ends(
            place["near_outer"][outer], place["far_outer"][outer],
            f"{place[f'near_{kind}'][inner]}/{bits}", f"{place[f'far_{kind}'][inner]}/{bits}",
        )  # fmt: skip

    def _configure(self, lot: Sequence[Cell], ends: Sequence[Ends]) -> dict[int, str]:
        """Load the kernel's end; by place in the lot: why it refused a cell."""
        lines = ["xfrm state flush", "xfrm policy flush"]
        owner = [-1, -1]
        for number, cell in enumerate(lot):
            more = xfrm_add(cell, ends[number])
            lines += more
            owner += [number] * len(more)
        return {
            owner[place]: f"{why} ({lines[place].split(' 0x')[0]})"
            for place, why in self.peer.ip_force(*lines).items()
        }

    def _exercise(self, cell: Cell, ends: Ends) -> list[str]:
        """Datagrams of all sizes to the kernel's end and back; what went wrong."""
        gateway = self.gateway
        gateway.load(setkey(cell, ends), cell.first)
        before = self.peer.read("/proc/net/xfrm_stat")
        near, far = (_packed(text.split("/")[0]) for text in (ends.near_inner, ends.far_inner))
        waiting: dict[int, _Sample] = {}
        excused = set()
        failures: list[str] = []
        late = False

        def send(port: int) -> None:
            payload, head, kind = waiting[port]
            if why := gateway.send(udp(near, far, port, 7, payload, head=head, kind=kind)):
                failures.append(f"{len(payload)} octets not sent: {why}")
            elif cell.natt and cell.outer == 6 and len(gateway.sent[0]) < LEAST_UDP6:
                excused.add(port)

        for port, sample in enumerate(_payloads(cell), 20000):
            waiting[port] = sample
            send(port)
        self.datagrams += len(waiting)
        for patience in PATIENCE:
            deadline = time.monotonic() + patience
            while waiting.keys() - excused and time.monotonic() < deadline:
                for packet in gateway.receive(0.5):
                    failures += _settle(packet, near, far, waiting)
            lost = waiting.keys() - excused
            if not lost or failures or gateway.refused or patience == PATIENCE[-1]:
                break
            self.resent += len(lost)
            late = True
            for port in lost:
                send(port)
        while late and gateway.receive(LATE_SECONDS):
            pass
        if lost:
            failures.append(f"no echo of {sorted(len(waiting[port][0]) for port in lost)} octets")
            failures += self.peer.read(str(self.peer.root / "run" / "spawned")).splitlines()[-1:]
        failures += [f"dropped here: {reason}" for reason, _ in gateway.refused]
        if cell.suites[0] is IPCOMP:
            for counter in (Counter.IPCOMP_INPUT, Counter.IPCOMP_OUTPUT):
                if not gateway.count(counter):
                    failures.append(f"{counter.name} is 0: nothing went compressed")
        after = self.peer.read("/proc/net/xfrm_stat")
        if before != after:
            old = dict(line.split() for line in before.splitlines())
            failures += [f"kernel: {name} + {int(n) - int(old[name])}" for name, n in map(str.split, after.splitlines())
                         if n != old[name]]  # fmt: skip
        return failures

    def _states(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(destination, SPI) -> (packets, replayed or failed ones) of the kernel's SAs."""
        text = self.peer.run("ip", "-s", "xfrm", "state").out
        pattern = re.compile(
            r"^src \S+ dst (\S+)\n\tproto \w+ spi (0x[0-9a-f]+).*?lifetime current:\n\s+\d+\(bytes\), (\d+)\(packets\)"
            r".*?replay-window \d+ replay (\d+) failed (\d+)", re.S | re.M,
        )  # fmt: skip
        return {
            (match[1], f"0x{int(match[2], 16):x}"): (int(match[3]), int(match[4]) + int(match[5]))
            for match in pattern.finditer(text)
        }


_Sample = tuple[bytes, bytes, int]
"""UDP payload; IPv4 options or an IPv6 extension header; and its type."""


def _payloads(cell: Cell) -> Iterator[_Sample]:
    """Each datagram: noise, text, and in transport mode options.

    The echo has destination options, too, if there were some.  The kernel puts its transforms behind them, we in front.
    """
    source = random.Random(cell.name)  # noqa: S311 - test data
    for size in SIZES:
        yield source.randbytes(size), b"", 0
        if size >= 100:
            yield (b"compressible " * (size // 13 + 1))[:size], b"", 0
    if cell.mode == "transport":
        heads = [(_OPTIONS[cell.inner], HOP_BY_HOP)]
        if cell.inner == 6:
            heads.append((_DESTINATION, DESTINATION_OPTIONS))
        for head, kind in heads:
            yield source.randbytes(200), head, kind
            yield b"options " * 40, head, kind


def _settle(packet: bytes, near: bytes, far: bytes, waiting: dict[int, _Sample]) -> list[str]:
    """Take an echo off the list, or say what is wrong with it; other traffic of the peer is ignored."""
    view = PacketView()
    if not view.load(packet):
        return [f"a malformed datagram: {packet[:48].hex()}"]
    if view.protocol != IPPROTO_UDP:
        return []
    if (view.src, view.dst, view.sport) != (far, near, 7):
        return [f"a datagram that nobody asked for: {packet[:48].hex()}"]
    wanted = waiting.pop(view.dport, None)
    if wanted is None:
        return []
    payload, head, kind = wanted
    if packet[view.offset + 8 : view.length] != payload:
        return [f"{len(payload)} octets came back altered"]
    if kind == DESTINATION_OPTIONS and packet[40 : view.offset] != head:
        return [f"destination options came back as {packet[40 : view.offset].hex()}"]
    if not verify_transport(packet, view):
        return [f"{len(payload)} octets came back with a wrong checksum"]
    return []


def _judge(cell: Cell, ends: Ends, states: dict[tuple[str, str], tuple[int, int]]) -> list[str]:
    """What the kernel's statistics say against a cell."""
    failures = []
    for _, spi, _, dst, suite, _, _ in cell.associations(ends):
        packets, wrong = states.get((dst, f"0x{spi:x}"), (0, 0))
        if not packets:
            failures.append(f"the kernel's {suite.name} SA to {dst} carried nothing")
        if wrong:
            failures.append(f"the kernel's {suite.name} SA to {dst} counts {wrong} replayed or failed packets")
    return failures


def _packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def run(chosen: Sequence[Cell], report: Callable[[Outcome], None] = lambda _: None) -> Matrix:
    """Boot a peer, run these cells."""
    with Lab() as lab:
        started = time.monotonic()
        bench = Bench(lab)
        matrix = Matrix(bench.peer.version)

        def keep(outcome: Outcome) -> None:
            matrix.outcomes.append(outcome)
            report(outcome)

        bench.run(chosen, keep)
        matrix.seconds = time.monotonic() - started
        matrix.datagrams, matrix.resent = bench.datagrams, bench.resent
    return matrix


def main() -> int:
    """Command line of ``python -m ipsecq.lab.matrix``."""
    parser = argparse.ArgumentParser(description="every transform against the Linux kernel's own IPsec")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name holds all of these words")
    parser.add_argument("--write", default="", metavar="FILE", help="write the table there")
    parser.add_argument("-v", "--verbose", action="store_true", help="one line for each cell")
    options = parser.parse_args()
    words = options.only.split()
    chosen = [cell for cell in cells() if all(word in cell.name for word in words)]

    def report(outcome: Outcome) -> None:
        if options.verbose:
            what = "passed" if outcome.passed else outcome.missing or "; ".join(outcome.failures)
            print(f"{outcome.cell.name}: {what}", flush=True)

    matrix = run(chosen, report)
    print(matrix.summary())
    if options.write:
        from ipsecq.lab.matrix_report import document  # noqa: PLC0415

        Path(options.write).write_text(document(matrix), encoding="utf-8")
    return 1 if matrix.failed else 0


if __name__ == "__main__":
    sys.exit(main())
