"""Ways from LAN to LAN that the benchmark compares.  A path sets itself up in a fresh network and says its version."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import metadata
from typing import Final, Protocol

import ipsecq
from ipsecq.lab.gateway import AES_GCM, Gateway, Tunnel, both_gateways
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.routed import RoutedTunnel
from ipsecq.lab.strongswan import StrongswanLibipsec
from ipsecq.lab.topology import Network, Site, build


class Path(Protocol):
    """One way to connect the LANs."""

    name: str

    def missing(self) -> str:
        """Why it cannot run here, or an empty string."""
        ...

    def version(self) -> str:
        """What exactly is measured."""
        ...

    def up(self) -> AbstractContextManager[Network]:
        """A fresh network whose hosts reach each other this way."""
        ...


LAN_MTU: Final = 1400
"""The same for all paths, so that no path has to fragment or to answer with ICMP."""


@contextmanager
def _network() -> Iterator[Network]:
    with Lab() as lab:
        yield build(lab, lan_mtu=LAN_MTU)


class Plain:
    """The kernel forwards; nothing is protected.  The ceiling."""

    name = "plain forwarding"

    def missing(self) -> str:
        """Never."""
        return ""

    def version(self) -> str:
        """The kernel's."""
        return f"Linux {platform.release()}"

    @contextmanager
    def up(self) -> Iterator[Network]:
        """Default routes already lead across."""
        with _network() as network:
            yield network


class Ipsecq:
    """Two ``ipsecq run`` daemons with an AES-GCM tunnel, plain ESP or ESP in UDP."""

    def __init__(self, workers: int = 2, *, udp: bool = False) -> None:
        self.workers, self.udp = workers, udp
        self.name = "ipsecq, ESP in UDP" if udp else "ipsecq"

    def missing(self) -> str:
        """Never."""
        return ""

    def version(self) -> str:
        """The package's."""
        return f"{ipsecq.__version__}, AES-GCM-16, {self.workers} workers a gateway"

    @contextmanager
    def up(self) -> Iterator[Network]:
        """Both daemons are ready."""
        with _network() as network:
            both_gateways(network, Tunnel(network, AES_GCM, udp=self.udp), workers=self.workers)
            yield network


class IpsecqRouted:
    """Two ``ipsecq run`` daemons with a route-based tunnel: the far LAN is routed into ``ipsec0``, ESP in UDP."""

    name = "ipsecq, ipsec0"

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers

    def missing(self) -> str:
        """Never."""
        return ""

    def version(self) -> str:
        """The package's."""
        return f"{ipsecq.__version__}, AES-GCM-16 in UDP, {self.workers} workers a gateway"

    @contextmanager
    def up(self) -> Iterator[Network]:
        """Both daemons are ready, and so are the routes."""
        with _network() as network:
            tunnel = RoutedTunnel(network, AES_GCM, udp=True, mtu=LAN_MTU)
            for site in network.sites:
                Gateway(site.gateway, tunnel.setkey(), workers=self.workers, settings=tunnel.settings(site)).start()
                tunnel.route(site)
            yield network


class Naive:
    """NetfilterQueue and scapy, see :mod:`ipsecq.lab.naive`."""

    name = "naive NFQUEUE + scapy"

    def missing(self) -> str:
        """Needs iptables for its NFQUEUE rule, and scapy."""
        return "" if shutil.which("iptables-nft") else "Debian package iptables is not installed"

    def version(self) -> str:
        """Those of its two libraries."""
        return f"NetfilterQueue {metadata.version('NetfilterQueue')}, scapy {metadata.version('scapy')}, AES-GCM"

    @contextmanager
    def up(self) -> Iterator[Network]:
        """Both processes have bound their queue."""
        with _network() as network:
            keys = [secrets.token_hex(20), secrets.token_hex(20)]
            for near, far, (out, back) in ((network.one, network.two, keys), (network.two, network.one, keys[::-1])):
                self._start(near, far, out, back)
            yield network

    def _start(self, near: Site, far: Site, out: str, back: str) -> None:
        log = near.gateway.lab.directory / f"naive-{near.number}"
        near.gateway.popen(
            sys.executable, "-m", "ipsecq.lab.naive", "--near", near.wan4, "--far", far.wan4, "--lan", far.lan4,
            "--out", out, "--in", back, log=log,
        )  # fmt: skip
        wait_for(lambda: log.exists() and "ready" in log.read_text(), "the naive gateway", 20)


class WireguardGo:
    """WireGuard in user space, in Go: the nearest thing that people run today."""

    name = "wireguard-go"

    def missing(self) -> str:
        """Needs Debian's wireguard-go and wireguard-tools."""
        found = shutil.which("wireguard-go") and shutil.which("wg")
        return "" if found else "needs Debian packages wireguard-go wireguard-tools"

    def version(self) -> str:
        """Debian's package version: the program does not say."""
        with Lab() as lab:
            done = lab.run("dpkg-query", "-W", "-f=${Version}", "wireguard-go", check=False)
        return f"{done.stdout.strip() or 'of unknown version'}, ChaCha20-Poly1305"

    @contextmanager
    def up(self) -> Iterator[Network]:
        """A tunnel device in each gateway, the far LAN routed into it."""
        with _network() as network:
            keys = {site: self._keys(site) for site in network.sites}
            for near, far in (network.sites, network.sites[::-1]):
                private = near.gateway.lab.directory / f"wg-{near.number}"
                private.write_text(keys[near][0])
                private.chmod(0o600)
                # wireguard-go's control socket lies in /run/wireguard, which namespaces share: names must differ.
                device = f"wg{near.number}p{os.getpid()}"
                near.gateway.popen("wireguard-go", "--foreground", device, log=private.with_suffix(".log"))
                show = partial(near.gateway.run, "wg", "show", device, check=False)
                wait_for(lambda show=show: not show().returncode, "wireguard-go")  # type: ignore[misc]
                near.gateway.run(
                    "wg", "set", device, "private-key", str(private), "listen-port", "51820", "peer", keys[far][1],
                    "allowed-ips", f"{far.lan4},{far.lan6}", "endpoint", f"{far.wan4}:51820",
                )  # fmt: skip
                near.gateway.run("ip", "link", "set", device, "up", "mtu", str(LAN_MTU))
                near.gateway.run("ip", "route", "add", far.lan4, "dev", device)
                near.gateway.run("ip", "-6", "route", "add", far.lan6, "dev", device)
            yield network

    def _keys(self, site: Site) -> tuple[str, str]:
        private = site.gateway.run("wg", "genkey").stdout
        return private, site.gateway.run("wg", "pubkey", stdin=private).stdout.strip()


def all_paths(workers: int = 2) -> list[Path]:
    """Every path, the yardsticks around ipsecq."""
    return [Plain(), Ipsecq(workers), Ipsecq(workers, udp=True), IpsecqRouted(workers), Naive(), WireguardGo(),
            StrongswanLibipsec(LAN_MTU)]  # fmt: skip
