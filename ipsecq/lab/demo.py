"""``make demo``: host, gateway, gateway, host in network namespaces; real daemons, real traffic, what the wire saw."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import ipsecq
from ipsecq.errors import IpsecqError
from ipsecq.lab.capture import Capture, Frame, in_clear, other_than_esp
from ipsecq.lab.gateway import Gateway, Tunnel
from ipsecq.lab.netns import Lab, LabError
from ipsecq.lab.topology import Network, build, firewall
from ipsecq.lab.traffic import MARKER, ping, tcp, udp_echo

PICTURE = """
   host A            gateway 1                       gateway 2            host B
  10.1.0.2 ─────── 10.1.0.1 │ 192.0.2.1 ═══════ 192.0.2.2 │ 10.2.0.1 ─────── 10.2.0.2
  fd00:1::2                  2001:db8:a::1   2001:db8:a::2                  fd00:2::2
                                       ESP, AES-GCM
"""
SHOWN_METRICS = ("ipsecq_sa_packets_total", "ipsecq_protocol_packets_total", "ipsecq_drops_total", "ipsecq_queue")
SIZES = (1, 100, 1000, 1400, 1472, 1473, 2000, 4000, 9000, 20000)
TCP_OCTETS = 50_000_000


class Screen:
    """Headings, lines, and verdicts that are counted: one failed verdict fails the demo."""

    def __init__(self) -> None:
        self.failed = 0
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def heading(self, text: str) -> None:
        """A new part."""
        print(f"\n\x1b[1m{text}\x1b[0m" if self._colour else f"\n{text}", flush=True)

    def verdict(self, good: bool, text: str) -> None:
        """One fact that must hold."""
        self.failed += not good
        word, code = ("ok", 32) if good else ("WRONG", 31)
        print("  " + (f"\x1b[{code}m{word:5}\x1b[0m" if self._colour else f"{word:5}") + f" {text}", flush=True)

    def lines(self, text: str, limit: int = 100) -> None:
        """Indented output of something else."""
        for line in text.rstrip().splitlines()[:limit]:
            print(f"  {line}")


@contextmanager
def tunnel() -> Iterator[tuple[Network, Gateway, Gateway]]:
    """The demo's network with both daemons ready."""
    with Lab() as lab:
        network = build(lab)
        for site in network.sites:
            firewall(site)
        plan = Tunnel(network)
        one, two = (Gateway(site.gateway, plan.setkey(site), workers=0) for site in network.sites)
        one.start()
        two.start()
        yield network, one, two


def traffic(screen: Screen, network: Network) -> None:
    """ICMP, TCP and UDP from host A to host B, IPv4 and IPv6."""
    a, b = network.one.host, network.two.host
    for version in (4, 6):
        address = network.two.host_address(version)
        answered = ping(a, address, count=5)
        screen.verdict(answered == 5, f"ICMP over IPv{version}: {answered} of 5 echo requests answered")
        transfer = tcp(a, b, address, TCP_OCTETS)
        equal = "equal" if transfer.digest_matches else "NOT equal"
        screen.verdict(
            transfer.digest_matches,
            f"TCP  over IPv{version}: {transfer.octets / 1e6:.0f} MB, SHA-256 {equal} at both ends,"
            f" {transfer.gigabits:.2f} Gbit/s",
        )
        echoes = udp_echo(a, b, address, SIZES)
        # What is longer than the tunnel's MTU teaches the sender (ICMP) and is lost; sent again, it arrives.
        again = udp_echo(a, b, address, echoes.lost)
        back = len(echoes.returned) + len(again.returned)
        learned = f", {len(again.returned)} of them once the sender had learned the MTU" if again.returned else ""
        screen.verdict(
            back == len(SIZES) and len(echoes.lost) <= 2,
            f"UDP  over IPv{version}: {back} of {len(SIZES)} datagrams of {SIZES[0]} to {SIZES[-1]} octets"
            f" came back{learned}",
        )


def wire_report(screen: Screen, network: Network, wire: Capture) -> None:
    """What the wire between the gateways saw."""
    frames = wire.frames()
    esp = [frame for frame in frames if frame.esp]
    for frame in _first_of_each_kind(esp):
        print(f"  {time.strftime('%H:%M:%S', time.localtime(frame.time))} {frame}")
    others = Counter(str(frame).split(",", 1)[0].split(": ")[-1] for frame in other_than_esp(frames))
    lans = [site.lan(version) for site in network.sites for version in (4, 6)]
    clear = in_clear(frames, *lans)
    print(f"  … {len(esp)} ESP packets; others: {dict(others) or 'none but address resolution'}")
    screen.verdict(len(esp) > 0 and not clear, f"clear packets of the tunnel on the wire: {len(clear)}")
    screen.verdict(not wire.contains(MARKER), "the payload's marker was looked for in every octet: not there")


def _first_of_each_kind(frames: list[Frame]) -> list[Frame]:
    shown: dict[int, list[Frame]] = {}
    for frame in frames:
        if frame.esp:
            shown.setdefault(frame.esp[0], []).append(frame)
    return sorted((frame for group in shown.values() for frame in group[:2]), key=lambda frame: frame.time)


def gateway_report(screen: Screen, gateway: Gateway) -> None:
    """Status and a few metrics of one gateway."""
    screen.heading(f"gateway {gateway.space.role}: ipsecq status")
    screen.lines(gateway.command("status").stdout)
    text = gateway.metrics_text()
    screen.heading(f"gateway {gateway.space.role}: some of http://127.0.0.1:9500/metrics")
    chosen = [
        line for line in text.splitlines() if line.startswith(SHOWN_METRICS) and not line.endswith((" 0.0", " 0"))
    ]
    screen.lines("\n".join(chosen), 12)
    drops = gateway.metric("ipsecq_drops_total")
    screen.verdict(bool(chosen), f"{len(text.splitlines())} lines of metrics, {drops:.0f} drops")


def main() -> int:
    """Command line of ``python -m ipsecq.lab.demo``; 0 when everything was as it must be."""
    parser = argparse.ArgumentParser(description="two ipsecq gateways in network namespaces, with real traffic")
    parser.add_argument("--keep", action="store_true", help="keep the networks up until Enter is pressed")
    options = parser.parse_args()
    screen = Screen()
    print(f"ipsecq {ipsecq.__version__}: two LANs, two gateways, one wire that nobody trusts")
    print(PICTURE, end="")
    started = time.monotonic()
    try:
        screen.heading("starting `ipsecq run` on both gateways")
        with tunnel() as (network, one, two):
            for gateway in (one, two):
                workers = ", ".join(str(pid) for pid in gateway.workers())
                screen.verdict(True, f"{gateway.space.role} is ready: daemon {gateway.pid}, workers {workers}")
            screen.heading("traffic between host A and host B")
            with Capture(one.space, "wan", bulk=True) as wire:
                traffic(screen, network)
                wire.settle()
            screen.heading("what crossed the wire")
            wire_report(screen, network, wire)
            gateway_report(screen, one)
            gateway_report(screen, two)
            if options.keep:
                keep(screen, network)
            for gateway in (one, two):
                gateway.stop()
    except (LabError, IpsecqError, OSError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; cleaned up", file=sys.stderr)
        return 130
    screen.heading(f"done in {time.monotonic() - started:.0f} s, everything cleaned up")
    if screen.failed:
        print(f"{screen.failed} things were WRONG, see above", file=sys.stderr)
    return 1 if screen.failed else 0


def keep(screen: Screen, network: Network) -> None:
    """Wait for Enter, and say how to look around meanwhile."""
    screen.heading("kept up; look around from another terminal, Enter ends it")
    for role, space in network.lab.namespaces.items():
        print(f"  {role:6} ip netns exec {space.name} bash")
    input()


if __name__ == "__main__":
    sys.exit(main())
