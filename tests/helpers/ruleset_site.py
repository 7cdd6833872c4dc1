"""A gateway between two hosts with the compiled ruleset, and listeners of its queues."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from typing import Any

from netfilterqueue import NetfilterQueue
from scapy.layers.inet6 import IPv6

from ipsecq.lab import topology
from ipsecq.lab.netns import Lab, Namespace, wait_for
from ipsecq.lab.traffic import ping
from ipsecq.netfilter.links import LinkWatcher
from ipsecq.netfilter.load import Loader
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sysctl import Sysctl

BASE = 700
SETTINGS = NetfilterSettings(table="ipsecq_t", queue_base=BASE, workers=3)
STOLEN = SETTINGS.mark_stolen
PEER = b"\xcb\0\x71\1"
A4, B4, A6, B6 = "10.1.0.0/24", "10.2.0.0/24", "fd00:1::/64", "fd00:2::/64"


def policy(number: int, src: str, dst: str, **more: Any) -> Policy:
    direction = more.pop("direction", Direction.OUT)
    action = more.pop("action", Action.IPSEC)
    level = more.pop("level", Level.REQUIRE)
    peer = more.pop("peer", PEER)
    chain: tuple[Transform, ...] = ()
    if action == Action.IPSEC:
        chain = (Transform(Protocol.ESP, Mode.TUNNEL, b"\xcb\0\x71\2", peer, level),)
    kept = {key: more.pop(key) for key in ("priority", "fail_open", "transforms") if key in more}
    kept.setdefault("transforms", chain)
    first, second = ip_network(src), ip_network(dst)
    selector = Selector(first[0].packed, first[-1].packed, second[0].packed, second[-1].packed, **more)
    return Policy(direction, selector, action, id=number, label=f"test:{number}", **kept)


class Queues:
    """Listeners in the gateway; what arrives is kept as (queue, packet) and answered by ``answer``."""

    def __init__(self, space: Namespace, workers: int = SETTINGS.workers) -> None:
        self.seen: list[tuple[int, bytes]] = []
        self.answer: Callable[[Any], None] = lambda packet: packet.drop()
        self.queues = [self._bind(space, BASE + number) for number in range(workers)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _bind(self, space: Namespace, number: int) -> NetfilterQueue:
        def take(packet: Any) -> None:
            payload = packet.get_payload()
            self.answer(packet)
            self.seen.append((number - BASE, payload))

        def bind() -> NetfilterQueue:
            queue = NetfilterQueue()  # opens its socket here and now, so in this namespace
            queue.bind(number, take)
            return queue

        return space.call(bind)

    def _loop(self) -> None:
        by_descriptor = {queue.get_fd(): queue for queue in self.queues}
        while not self._stop.is_set():
            for descriptor in select.select(list(by_descriptor), [], [], 0.05)[0]:
                by_descriptor[descriptor].run(block=False)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for queue in self.queues:
            queue.unbind()

    def take(self, count: int = 1) -> list[tuple[int, bytes]]:
        wait_for(lambda: len(self.seen) >= count, f"{count} queued packets, there are {len(self.seen)}", 10)
        time.sleep(0.05)
        found, self.seen = self.seen, []
        return found


class Site:
    def __init__(self, lab: Lab) -> None:
        self.left, self.gw, self.right = (lab.namespace(role) for role in ("left", "gw", "right"))
        lab.link(self.left, "eth0", self.gw, "lan")
        lab.link(self.gw, "wan", self.right, "eth0")
        for space, device, *addresses in (
            (self.left, "eth0", "10.1.0.2/24", "fd00:1::2/64"), (self.gw, "lan", "10.1.0.1/24", "fd00:1::1/64"),
            (self.gw, "wan", "10.2.0.1/24", "fd00:2::1/64"), (self.right, "eth0", "10.2.0.2/24", "fd00:2::2/64"),
        ):  # fmt: skip
            topology.address(space, device, *addresses)
        for space, number in ((self.left, 1), (self.right, 2)):
            topology.default_route(space, f"10.{number}.0.1", f"fd00:{number}::1")
        topology.forward(self.gw)
        self.loader = Loader(SETTINGS)
        self.queues: Queues | None = None

    def load(self, *policies: Policy, sysctl: Sysctl | None = None, listen: bool = True, guard: bool = True) -> None:
        def body() -> None:
            watcher = LinkWatcher()
            devices = {link.index: link.name for link in watcher.links.values() if not link.loopback}
            watcher.close()
            self.loader.replace(policies, sysctl or Sysctl(), devices if guard else {})
            self.loader.open_queues()

        self.gw.call(body)
        if listen:
            self.queues = Queues(self.gw)

    def counter(self, name: str) -> int:
        return self.gw.call(self.loader.counters)[name][0]

    def ping(self, source: Namespace, target: str) -> bool:
        """One echo, for which half a second is enough."""
        return ping(source, target, count=1, wait=0.5) == 1

    def answers(self, source: Namespace, target: str) -> bool:
        """The same where there must be an answer."""
        return ping(source, target, count=1) == 1

    def send(self, space: Namespace, packet: Any) -> None:
        """Send a whole IP packet through a raw socket of ``space``."""
        raw, v6 = bytes(packet), isinstance(packet, IPv6)
        with space.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            if v6:
                sock.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
            sock.sendto(raw, (packet.dst, 0))


def queues(site: Site) -> Queues:
    assert site.queues is not None
    return site.queues


def wire(site: Site) -> socket.socket:
    """Everything that reaches the right host, from the link layer on."""
    sock = site.right.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    sock.setblocking(False)
    return sock


def frames(sock: socket.socket) -> Iterator[bytes]:
    """What has come in since; what the right host sends itself (errors that quote a packet) is seen here as well."""
    with contextlib.suppress(BlockingIOError):
        while True:
            packet, address = sock.recvfrom(1 << 16)
            if address[2] != socket.PACKET_OUTGOING:
                yield packet


def arrived(sock: socket.socket, pattern: bytes) -> int:
    return sum(pattern in frame for frame in frames(sock))
