"""The route-based tunnels of the running daemon: their devices, the kernel's rules and the workers kept in step.

Adding: the device, then the rules that leave it alone, then the workers, who are the only way out of it.  Removing: the
other way round.  A stop that blocks leaves the devices: their routes then lead nowhere, and not past the tunnel.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.log import LOGGER
from ipsecq.daemon.pool import WorkerPool
from ipsecq.datapath import tun
from ipsecq.datapath.ipsecdev import create_interface
from ipsecq.errors import DaemonError, IpsecqError
from ipsecq.metrics.source import InterfaceSample
from ipsecq.netfilter.links import Link, LinkEvent
from ipsecq.numbers import Mode, Protocol
from ipsecq.policy.interface import Interface
from ipsecq.policy.model import Policy
from ipsecq.setkey import values

log: Final = logging.getLogger(f"{LOGGER}.interfaces")

SetRules = Callable[[tuple[str, ...]], Awaitable[None]]
"""Makes nftables leave devices of these names alone."""


class Interfaces:
    """Owner of the devices.  ``record`` is a file that says which ones we made, for the next daemon."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self.current: tuple[Interface, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The devices."""
        return tuple(interface.name for interface in self.current)

    def policies(self) -> dict[int, Policy]:
        """Their policies by id, which the SPD doesn't have."""
        return {policy.id: policy for interface in self.current for policy in interface.policies()}

    def start(self, interfaces: Iterable[Interface]) -> None:
        """Make the devices, and remove those of a former life that are not named any more.  DaemonError."""
        wanted = tuple(interfaces)
        for name in self._recorded() - {interface.name for interface in wanted}:
            tun.remove(name)
        for interface in wanted:
            create_interface(interface.name, interface.mtu)
        self._become(wanted)

    def remove(self) -> None:
        """Take all devices away; no worker lives."""
        for name in self.names:
            with contextlib.suppress(IpsecqError):
                tun.remove(name)
        self._become(())

    async def change(self, interfaces: Iterable[Interface], pool: WorkerPool, set_rules: SetRules) -> None:
        """Serve these from now on; when a step fails everything is as it was.  DaemonError, NetfilterError."""
        before, wanted = self.current, tuple(interfaces)
        if wanted == before:
            return
        old = {interface.name for interface in before}
        try:
            for interface in wanted:
                create_interface(interface.name, interface.mtu)
            await set_rules(tuple(sorted(old | {interface.name for interface in wanted})))
            self._become(wanted)
            await pool.settled(pool.broadcast([self.operation()]))
        except IpsecqError:
            self._become(before)
            pool.broadcast([self.operation()])
            for interface in before:
                with contextlib.suppress(IpsecqError):
                    create_interface(interface.name, interface.mtu)  # its MTU
            await self._finish({interface.name for interface in wanted}, set_rules)
            raise
        await self._finish(old, set_rules)

    async def _finish(self, others: set[str], set_rules: SetRules) -> None:
        """Remove those of ``others`` that are not served."""
        for name in others - set(self.names):
            tun.remove(name)
        await set_rules(self.names)

    def operation(self) -> tuple[str, tuple[Interface, ...]]:
        """What workers are told."""
        return "interfaces", self.current

    def mend(self, events: Iterable[LinkEvent], pool: WorkerPool) -> None:
        """A device that somebody removed is made again, without the addresses and routes that it had."""
        gone = {event.link.name for event in events if event.gone}
        lost = [interface for interface in self.current if interface.name in gone]
        for interface in lost:
            log.error("%s: somebody has removed the device: made again; addresses and routes are gone", interface.name)
            try:
                create_interface(interface.name, interface.mtu)
            except DaemonError as error:
                log.error("%s", error)
        if lost:
            pool.broadcast([self.operation()])

    def _become(self, interfaces: tuple[Interface, ...]) -> None:
        self.current = interfaces
        try:
            self._record.write_text(json.dumps(self.names))
        except OSError as error:
            log.warning("%s: %s: devices that go while the daemon is down will stay", self._record, error.strerror)

    def _recorded(self) -> set[str]:
        try:
            return {str(name) for name in json.loads(self._record.read_text())}
        except (OSError, ValueError, TypeError):
            return set()


def samples(interfaces: Iterable[Interface], links: Mapping[int, Link], authority: Authority) -> list[InterfaceSample]:
    """What metrics and ``ipsecq interface`` show."""
    by_name = {link.name: link for link in list(links.values())}
    counted = kernel_counters()
    found = []
    for interface in interfaces:
        link = by_name.get(interface.name)
        received, sent = counted.get(interface.name, ((0, 0, 0), (0, 0, 0)))
        sad, ends = authority.sad, (interface.local, interface.remote)
        sa = sad.outbound(int(Protocol.ESP), int(Mode.TUNNEL), *ends, interface.reqid)
        back = sad.outbound(int(Protocol.ESP), int(Mode.TUNNEL), *ends[::-1], interface.reqid)
        missing = [word for word, each in (("outbound", sa), ("inbound", back)) if each is None]
        found.append(
            InterfaceSample(
                interface.name, values.format_address(interface.local), values.format_address(interface.remote),
                interface.reqid, link.mtu if link is not None else interface.mtu, link is not None and link.up,
                f"no {' and '.join(missing)} SA" if missing else "", received, sent,
            )
        )  # fmt: skip
    return found


def show(sample: InterfaceSample) -> dict[str, Any]:
    """One entry of ``interfaces`` in the answer to ``status``."""
    return {
        "name": sample.name,
        "local": sample.local,
        "remote": sample.remote,
        "reqid": sample.reqid,
        "mtu": sample.mtu,
        "up": sample.up,
        "problem": sample.problem,
        **dict(zip(("packets_in", "bytes_in", "drops_in"), sample.received, strict=True)),
        **dict(zip(("packets_out", "bytes_out", "drops_out"), sample.sent, strict=True)),
    }


def kernel_counters() -> dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """By device: (packets, octets, drops) received and sent, as the kernel counts: a super-packet is one."""
    try:
        text = Path("/proc/net/dev").read_text()
    except OSError:
        return {}
    found = {}
    for line in text.splitlines()[2:]:
        name, _, rest = line.rpartition(":")
        numbers = [int(word) for word in rest.split()]
        found[name.strip()] = (numbers[1], numbers[0], numbers[3]), (numbers[9], numbers[8], numbers[11])
    return found
