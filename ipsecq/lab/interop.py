"""ipsecq on one side of a wire, the Linux kernel's own IPsec (User-Mode Linux) on the other; many cells, one boot.

    host A 10.1.0.2 ── lan gw1 wan (a tap device) 192.0.2.1 ──── 192.0.2.2 eth0, User-Mode Linux, lan0 10.2.0.2
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Final

from ipsecq.lab.capture import Capture
from ipsecq.lab.cells import Cell, Ends, setkey, xfrm
from ipsecq.lab.gateway import Gateway
from ipsecq.lab.netns import Lab, LabError, Namespace, wait_for
from ipsecq.lab.topology import address, default_route, forward
from ipsecq.lab.traffic import ping
from ipsecq.lab.uml import UmlPeer

TCP_END: Final = str(Path(__file__).with_name("tcp_end.py"))
NEAR_HOST: Final = {4: "10.1.0.2", 6: "fd00:1::2"}
FAR_HOST: Final = {4: "10.2.0.2", 6: "fd00:2::2"}
NEAR_OUTER: Final = {4: "192.0.2.1", 6: "2001:db8:a::1"}
FAR_OUTER: Final = {4: "192.0.2.2", 6: "2001:db8:a::2"}
NEAR_LAN: Final = {4: "10.1.0.0/24", 6: "fd00:1::/64"}
WAITS: Final = (1, 5)
"""Seconds to wait for an echo, first and second try."""
FAR_LAN: Final = {4: "10.2.0.0/24", 6: "fd00:2::/64"}


class Bench:
    """The wiring of all cells.  ``use(cell)`` switches both ends over to a cell."""

    def __init__(self, lab: Lab) -> None:
        self.host, self.gateway_space = lab.namespace("hosta"), lab.namespace("gw1")
        space = self.gateway_space
        forward(space)
        lab.link(self.host, "eth0", space, "lan")
        address(self.host, "eth0", f"{NEAR_HOST[4]}/24", f"{NEAR_HOST[6]}/64")
        address(space, "lan", "10.1.0.1/24", "fd00:1::1/64")
        default_route(self.host, "10.1.0.1", "fd00:1::1")
        space.run("ip", "tuntap", "add", "dev", "wan", "mode", "tap")
        space.run("ip", "link", "set", "wan", "up")
        address(space, "wan", f"{NEAR_OUTER[4]}/24", f"{NEAR_OUTER[6]}/64")
        default_route(space, FAR_OUTER[4], FAR_OUTER[6])
        self.peer = UmlPeer(space, "wan")
        self.peer.ip(
            "link add lan0 type dummy",
            "link set lan0 up",
            f"addr add {FAR_OUTER[4]}/24 dev eth0",
            f"addr add {FAR_OUTER[6]}/64 dev eth0 nodad",
            f"addr add {FAR_HOST[4]}/24 dev lan0",
            f"addr add {FAR_HOST[6]}/64 dev lan0 nodad",
            f"route add {NEAR_LAN[4]} via {NEAR_OUTER[4]} src {FAR_HOST[4]}",
            f"route add {NEAR_LAN[6]} via {NEAR_OUTER[6]} src {FAR_HOST[6]}",
        )
        self.gateway: Gateway | None = None

    def ends(self, cell: Cell) -> Ends:
        """The addresses of a cell: LANs in tunnel mode, the gateways themselves in transport mode."""
        outer, inner = cell.outer, cell.inner
        if cell.mode == "tunnel":
            return Ends(NEAR_OUTER[outer], FAR_OUTER[outer], NEAR_LAN[inner], FAR_LAN[inner])
        return Ends(NEAR_OUTER[outer], FAR_OUTER[outer], NEAR_OUTER[outer], FAR_OUTER[outer])

    def use(self, cell: Cell) -> None:
        """Fresh keys, both ends configured; the daemon is started for the first cell and reloaded for the next ones."""
        cell = cell.keyed()
        ends = self.ends(cell)
        self.peer.ip(*xfrm(cell, ends))
        if self.gateway is not None:
            self.gateway.stop()
        self.gateway = Gateway(self.gateway_space, setkey(cell, ends), workers=1)
        self.gateway.start()

    def near(self, cell: Cell) -> tuple[Namespace, str]:
        """(namespace, address) of the end on ipsecq's side."""
        if cell.mode == "tunnel":
            return self.host, NEAR_HOST[cell.inner]
        return self.gateway_space, NEAR_OUTER[cell.outer]

    def far(self, cell: Cell) -> str:
        """Address of the end on the kernel's side."""
        return (FAR_HOST if cell.mode == "tunnel" else FAR_OUTER)[cell.inner]

    def ping_from_here(self, cell: Cell, sizes: tuple[int, ...]) -> list[int]:
        """Sizes whose echo did not come back, asked from ipsecq's side.

        Each is asked twice: the first answer to a packet that is too long may be the tunnel's MTU.
        """
        space, _ = self.near(cell)
        far = self.far(cell)
        return [size for size in sizes if not any(ping(space, far, count=1, size=size, wait=wait) for wait in WAITS)]

    def ping_from_there(self, cell: Cell, sizes: tuple[int, ...]) -> list[int]:
        """Sizes whose echo did not come back, asked from the kernel's side."""
        _, target = self.near(cell)
        argv = ("ping", "-n", "-q", "-c", "1", "-I", self.far(cell))

        def lost(size: int, wait: int) -> bool:
            return self.peer.run(*argv, "-W", str(wait), "-s", str(size), target, check=False, timeout=20).rc != 0

        return [size for size in sizes if all(lost(size, wait) for wait in WAITS)]

    def tcp_to_there(self, cell: Cell, octets: int) -> bool:
        """Send to the kernel's side; True when both ends have the same digest."""
        space, _ = self.near(cell)
        far = self.far(cell)
        output = self.peer.root / "run" / "tcp"
        python = "/usr/bin/python3"
        pid = self.peer.spawn("sh", "-c", f"exec {python} {TCP_END} receive {far} 5001 >{output} 2>&1")
        wait_for(lambda: ":5001" in self.peer.run("ss", "-ltn").out, "the listener in the peer")
        sent = space.run(sys.executable, TCP_END, "send", far, "5001", str(octets), _seed(), timeout=60)
        wait_for(lambda: self.peer.run("cat", str(output)).out, "the digest of the peer")
        received = self.peer.run("cat", str(output)).out
        self.peer.kill(pid)
        return sent.stdout == received and sent.stdout.startswith(f"{octets} ")

    def tcp_from_there(self, cell: Cell, octets: int) -> bool:
        """Receive from the kernel's side; True when both ends have the same digest."""
        space, near = self.near(cell)
        log = space.lab.directory / f"tcp-{_seed()}"
        process = space.popen(sys.executable, TCP_END, "receive", near, "5001", log=log)
        wait_for(lambda: ":5001" in space.run("ss", "-ltn").stdout, "the listener here")
        python = "/usr/bin/python3"
        sent = self.peer.run(python, TCP_END, "send", near, "5001", str(octets), _seed(), timeout=60)
        if process.wait(30):
            raise LabError(log.read_text())
        return sent.out == log.read_text() and sent.out.startswith(f"{octets} ")

    def capture(self) -> Capture:
        """A capture of the wire."""
        return Capture(self.gateway_space, "wan")


def _seed() -> str:
    return str(random.randrange(1 << 30))  # noqa: S311 - test data
