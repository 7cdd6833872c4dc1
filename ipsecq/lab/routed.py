"""A route-based tunnel between the two gateways of a network: an ``ipsec0`` at each end, and the far LAN routed into it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipsecq.lab.gateway import AES_GCM, Algorithm
from ipsecq.lab.topology import Network, Site

DEVICE = "ipsec0"


@dataclass
class RoutedTunnel:
    """Configuration, SAs and routes of both ends.  The SPI of what site *n* sends is ``spi + n``.

    ``outer`` is the IP version of the ends; ``udp``: ESP in UDP on port 4500.
    """

    network: Network
    algorithm: Algorithm = AES_GCM
    outer: int = 4
    reqid: int = 100
    spi: int = 0x2000
    mtu: int = 1400
    udp: bool = False
    lines: list[str] = field(default_factory=list)
    """The ``add`` lines, equal at both ends."""

    def __post_init__(self) -> None:
        for near, far in (self.network.sites, self.network.sites[::-1]):
            protocol = "esp-udp" if self.udp else "esp"
            self.lines.append(
                f"add {near.wan(self.outer)} {far.wan(self.outer)} {protocol} 0x{self.spi + near.number:x} -m tunnel"
                f" -u {self.reqid} -r 32 {self.algorithm.keys()};"
            )

    def setkey(self) -> str:
        """The setkey.conf of both ends: SAs, and no policy."""
        return "\n".join(["flush;", "spdflush;", *self.lines]) + "\n"

    def far(self, near: Site) -> Site:
        """The other end."""
        return self.network.two if near is self.network.one else self.network.one

    def settings(self, near: Site, name: str = DEVICE) -> str:
        """The table of one end's configuration file."""
        return (
            f'[[interface]]\nname = "{name}"\nlocal = "{near.wan(self.outer)}"\n'
            f'remote = "{self.far(near).wan(self.outer)}"\nreqid = {self.reqid}\nmtu = {self.mtu}\n'
        )

    def route(self, near: Site, name: str = DEVICE) -> None:
        """Lead the far LAN into the device."""
        far = self.far(near)
        near.gateway.run("ip", "route", "replace", far.lan4, "dev", name)
        near.gateway.run("ip", "-6", "route", "replace", far.lan6, "dev", name)
