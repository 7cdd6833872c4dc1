"""The lab's networks: host A, gateway 1, wire, gateway 2, host B, on IPv4 and IPv6, with an operator's firewall.

Without a router::

    hosta 10.1.0.2 ── lan 10.1.0.1 gw1 wan 192.0.2.1 ──── 192.0.2.2 wan gw2 lan 10.2.0.1 ── 10.2.0.2 hostb

with one, gateway 2 is at 198.51.100.1 and the router (.254 on both links) stands between the gateways.  IPv6 is the
same with ``fd00:1::/64``, ``fd00:2::/64`` and ``2001:db8:a::/64``, ``2001:db8:b::/64``.  Like the Internet, the router
knows no way to the LANs: what crosses it went through a tunnel or was masqueraded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ipsecq.lab.netns import Lab, Namespace


@dataclass(frozen=True)
class Site:
    """One end: a LAN with a host behind a gateway.  Networks as text, addresses without prefix length."""

    number: int
    host: Namespace
    gateway: Namespace
    wan4: str
    wan6: str

    @property
    def lan4(self) -> str:
        """The protected IPv4 network."""
        return f"10.{self.number}.0.0/24"

    @property
    def lan6(self) -> str:
        """The protected IPv6 network."""
        return f"fd00:{self.number}::/64"

    @property
    def host4(self) -> str:
        """The host's IPv4 address."""
        return f"10.{self.number}.0.2"

    @property
    def host6(self) -> str:
        """The host's IPv6 address."""
        return f"fd00:{self.number}::2"

    @property
    def gateway4(self) -> str:
        """The gateway's address on the LAN, IPv4."""
        return f"10.{self.number}.0.1"

    @property
    def gateway6(self) -> str:
        """The gateway's address on the LAN, IPv6."""
        return f"fd00:{self.number}::1"

    def host_address(self, version: int) -> str:
        """The host's address of IP version 4 or 6."""
        return self.host4 if version == 4 else self.host6

    def wan(self, version: int) -> str:
        """The gateway's outer address of IP version 4 or 6."""
        return self.wan4 if version == 4 else self.wan6

    def lan(self, version: int) -> str:
        """The protected network of IP version 4 or 6."""
        return self.lan4 if version == 4 else self.lan6


@dataclass(frozen=True)
class Network:
    """Two sites and what is between them."""

    lab: Lab
    one: Site
    two: Site
    router: Namespace | None

    @property
    def sites(self) -> tuple[Site, Site]:
        """Both sites."""
        return self.one, self.two


@contextmanager
def two_sites(*, router: bool = False, lan_mtu: int = 1500, wire_mtu: int = 1500) -> Iterator[Network]:
    """Bring up both sites, without firewall and tunnel; see :func:`build`."""
    with Lab() as lab:
        yield build(lab, router=router, lan_mtu=lan_mtu, wire_mtu=wire_mtu)


def build(lab: Lab, *, router: bool = False, lan_mtu: int = 1500, wire_mtu: int = 1500) -> Network:
    """Make the namespaces, links, addresses and routes of both sites in ``lab``.

    With a router, the link of gateway 1 keeps the LAN's MTU and only the link of gateway 2 has ``wire_mtu``: gateway 1
    learns of the smaller MTU from ICMP alone.
    """
    far = "b" if router else "a"
    one = Site(1, lab.namespace("hosta"), lab.namespace("gw1"), "192.0.2.1", "2001:db8:a::1")
    two = Site(
        2, lab.namespace("hostb"), lab.namespace("gw2"),
        "198.51.100.1" if router else "192.0.2.2", f"2001:db8:{far}::{1 if router else 2}",
    )  # fmt: skip
    middle = lab.namespace("router") if router else None
    for site in (one, two):
        forward(site.gateway)
        lab.link(site.host, "eth0", site.gateway, "lan", lan_mtu)
        address(site.host, "eth0", f"{site.host4}/24", f"{site.host6}/64")
        address(site.gateway, "lan", f"{site.gateway4}/24", f"{site.gateway6}/64")
        default_route(site.host, site.gateway4, site.gateway6)
    if middle is None:
        lab.link(one.gateway, "wan", two.gateway, "wan", wire_mtu)
        default_route_after_address = {one: (two.wan4, two.wan6), two: (one.wan4, one.wan6)}
    else:
        forward(middle)
        lab.link(one.gateway, "wan", middle, "left", max(lan_mtu, 1500))
        lab.link(two.gateway, "wan", middle, "right", wire_mtu)
        address(middle, "left", "192.0.2.254/24", "2001:db8:a::fe/64")
        address(middle, "right", "198.51.100.254/24", "2001:db8:b::fe/64")
        default_route_after_address = {
            one: ("192.0.2.254", "2001:db8:a::fe"), two: ("198.51.100.254", "2001:db8:b::fe"),
        }  # fmt: skip
    for site, (via4, via6) in default_route_after_address.items():
        address(site.gateway, "wan", f"{site.wan4}/24", f"{site.wan6}/64")
        default_route(site.gateway, via4, via6)
    return Network(lab, one, two, middle)


def forward(space: Namespace) -> None:
    """Make a router of a namespace."""
    space.sysctl("net.ipv4.ip_forward", 1)
    space.sysctl("net.ipv6.conf.all.forwarding", 1)


def address(space: Namespace, device: str, *addresses: str) -> None:
    """Give a device its addresses, usable at once (no duplicate address detection)."""
    with_ipv6 = space.mtu(device) >= 1280  # Linux has no IPv6 on a device with less
    space.ip(*(
        f"addr add {text} dev {device}{' nodad' if ':' in text else ''}"
        for text in addresses if with_ipv6 or ":" not in text
    ))  # fmt: skip


def default_route(space: Namespace, via4: str, via6: str) -> None:
    """Default routes of both families; IPv6's only where the device has IPv6."""
    space.ip(f"route add default via {via4}")
    space.run("ip", "-6", "route", "add", "default", "via", via6, check=False)


def firewall(site: Site, *, masquerade_inner: str | None = None) -> None:
    """Load an operator's ruleset on a gateway: stateful forward chain with policy drop, masquerading of other traffic.

    ``masquerade_inner``: a source address that hides the LAN *inside* the tunnel too, by source NAT before ESP.  The
    table is called ``operator``; nothing else may ever touch it.
    """
    site.gateway.nft(firewall_text(site, masquerade_inner=masquerade_inner))


def firewall_text(site: Site, *, masquerade_inner: str | None = None) -> str:
    """The ruleset of :func:`firewall`, to be loaded with nft."""
    far = 3 - site.number
    inner = ""
    if masquerade_inner:
        inner = f"oifname wan ip saddr {site.lan4} ip daddr 10.{far}.0.0/24 counter snat ip to {masquerade_inner}"
    return f"""
        table inet operator {{
            chain forward {{
                type filter hook forward priority filter; policy drop;
                ct state established,related accept
                iifname "lan" oifname "wan" ct state new counter accept
                iifname "enc0" oifname "lan" ct state new counter accept
            }}
            chain input {{
                type filter hook input priority filter; policy drop;
                ct state established,related accept
                iifname {{ "lo", "lan", "enc0" }} accept
                meta l4proto {{ esp, ah, icmp, ipv6-icmp, 108 }} accept
                udp dport {{ 500, 4500 }} accept
            }}
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                {inner}
                oifname "wan" ip saddr {site.lan4} ip daddr != 10.{far}.0.0/24 counter masquerade
                oifname "wan" ip6 saddr {site.lan6} ip6 daddr != fd00:{far}::/64 counter masquerade
            }}
        }}
    """
