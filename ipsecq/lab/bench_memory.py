"""What the processes of a gateway with many SAs and policies take: ``make bench BENCH='--only memory'``.

Two gateways with tunnels to as many peers as there are pairs of SAs, each with policies and keys of its own.  Datagrams
go through every tunnel, both ways and in several flows, so that all that is made when an SA is first used is there.
RSS counts pages that several processes share in each of them, PSS gives each its part (``smaps_rollup`` of proc(5)).
"""

from __future__ import annotations

import random
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipsecq.lab.gateway import AES_GCM, Gateway
from ipsecq.lab.netns import Lab, LabError
from ipsecq.lab.sink import Sink
from ipsecq.lab.topology import Network, Site, build

SAS: Final = 10_000
"""In one gateway: half of them send.  It has as many policies."""
FLOWS: Final = 2
"""Flows of each tunnel and direction."""
ENOUGH: Final = 0.98
_BEHIND: Final = "10.64.0.0"
_PEERS: Final = "100.64.0.0"
_IP_PKTINFO: Final = 8
"""ip(7); not in Python's socket."""
_PORT: Final = 5003
_PACE: Final = 32
"""Datagrams at once: no queue overflows."""


@dataclass(frozen=True)
class Usage:
    """Memory of one process in MB (10^6 octets)."""

    name: str
    rss: float
    pss: float
    private: float


@dataclass(frozen=True)
class Memory:
    """The processes of one gateway, and what went through it."""

    sas: int
    policies: int
    flows: int
    """Through each tunnel and in each direction."""
    sent: int
    received: int
    processes: tuple[Usage, ...]

    @property
    def workers(self) -> list[Usage]:
        """The workers alone."""
        return [each for each in self.processes if each.name != "daemon"]


def usage(name: str, pid: int) -> Usage:
    """Memory of a process now."""
    values = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, kibibytes, _ = line.split()
        values[key] = int(kibibytes) * 1024 / 1e6
    return Usage(name, values["Rss:"], values["Pss:"], values["Private_Dirty:"] + values["Private_Clean:"])


def _octets(network: str, number: int) -> bytes:
    return (int.from_bytes(socket.inet_aton(network), "big") + 1 + number).to_bytes(4, "big")


def _address(network: str, number: int) -> str:
    return socket.inet_ntoa(_octets(network, number))


class Crowd:
    """Both gateways and their many tunnels."""

    def __init__(self, lab: Lab, tunnels: int, workers: int) -> None:
        self.network: Network = build(lab)
        self.tunnels = tunnels
        two = self.network.two
        # Every address of these networks is the far gateway's, or the far host's.
        two.gateway.run("ip", "route", "add", "local", f"{_PEERS}/10", "dev", "lo")
        two.gateway.run("ip", "route", "add", f"{_BEHIND}/10", "via", two.host4)
        two.host.run("ip", "route", "add", "local", f"{_BEHIND}/10", "dev", "lo")
        numbers = random.sample(range(256, 1 << 32), 2 * tunnels)  # SPIs at random, as key management draws them
        self._sas = [f"0x{spi:x} -u {{}} -m tunnel -r 32 {AES_GCM.keys()};" for spi in numbers]
        self.gateways = [Gateway(site.gateway, self._setkey(site), workers=workers) for site in self.network.sites]

    def _setkey(self, site: Site) -> str:
        one, lan = self.network.one.wan4, self.network.one.lan4
        ways = ("out", "in") if site is self.network.one else ("in", "out")
        lines = []
        for number in range(self.tunnels):
            there, back = (text.format(number + 1) for text in self._sas[2 * number : 2 * number + 2])
            peer, target, reqid = _address(_PEERS, number), _address(_BEHIND, number), number + 1
            lines += [
                f"add {one} {peer} esp {there}",
                f"add {peer} {one} esp {back}",
                f"spdadd {lan} {target} any -P {ways[0]} ipsec esp/tunnel/{one}-{peer}/unique:{reqid};",
                f"spdadd {target} {lan} any -P {ways[1]} ipsec esp/tunnel/{peer}-{one}/unique:{reqid};",
            ]
        return "\n".join(lines) + "\n"

    def talk(self, flows: int) -> tuple[int, int]:
        """One datagram of each flow through each tunnel, both ways; (sent, received)."""
        one, two = self.network.sites
        sent = received = 0
        for near, far in ((one, two), (two, one)):
            with Sink(far.host, "", _PORT) as sink:
                for _ in range(flows):
                    with near.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
                        for number in range(self.tunnels):
                            self._send(source, number, near is one)
                            sent += 1
                            if not sent % _PACE:
                                time.sleep(0.005)
                received += self._all_of(sink)
        return sent, received

    @staticmethod
    def _all_of(sink: Sink) -> int:
        """What has arrived when nothing more comes: an SA's first packet waits for the disk."""
        count = -1
        while (more := sink.arrived()) != count:
            count = more
            time.sleep(1.0)
        return count

    def _send(self, source: socket.socket, number: int, outward: bool) -> None:
        if outward:
            source.sendto(bytes(64), (_address(_BEHIND, number), _PORT))
            return
        info = struct.pack("=i4s4s", 0, _octets(_BEHIND, number), bytes(4))
        source.sendmsg(
            [bytes(64)], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, (self.network.one.host4, _PORT)
        )


def measure(sas: int = SAS, workers: int = 2, flows: int = FLOWS) -> Memory:
    """Start both gateways, use every SA, and look at the first one's processes."""
    with Lab() as lab:
        crowd = Crowd(lab, sas // 2, workers)
        for gateway in crowd.gateways:
            gateway.start()
        sent, received = crowd.talk(flows)
        if received < ENOUGH * sent:
            raise LabError(f"only {received} of {sent} datagrams arrived: not every SA is in use")
        gateway = crowd.gateways[0]
        pids = [("daemon", gateway.pid), *((f"worker {n}", pid) for n, pid in enumerate(gateway.workers()))]
        found = Memory(sas, sas, flows, sent, received, tuple(usage(name, pid) for name, pid in pids))
        for gateway in crowd.gateways:
            gateway.stop()
    return found
