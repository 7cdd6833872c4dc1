"""The supervisor's hand on the kernel's rules: loaded blocked at the start, kept in step, repaired, guarded links.

One lock (``busy``) orders everything that changes nf_tables: publishing a change, a link that comes, a repair, the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ipsecq import fastpath
from ipsecq.daemon import blocked
from ipsecq.daemon.config import Config
from ipsecq.daemon.log import LOGGER
from ipsecq.daemon.sampling import History
from ipsecq.datapath.ring import Rings
from ipsecq.datapath.udp import UdpSockets
from ipsecq.errors import DaemonError, NetfilterError
from ipsecq.netfilter.capabilities import detect
from ipsecq.netfilter.links import Link, LinkEvent, LinkWatcher
from ipsecq.netfilter.load import Loader
from ipsecq.netfilter.sentinel import Sentinel
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import SocketPolicy
from ipsecq.setkey import printer
from ipsecq.sysctl import Sysctl

log: Final = logging.getLogger(f"{LOGGER}.ruleset")

Wanted = Callable[[], tuple[list[Policy], Sysctl]]
"""The policies and knobs that are in force now."""
Sockets = Callable[[], dict[int, SocketPolicy]]
"""The policies of sockets, by mark."""


class Ruleset:
    """Our tables, the devices that they guard, and who else touches nf_tables."""

    def __init__(
        self,
        config: Config,
        history: History,
        wanted: Wanted,
        sockets: Sockets,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        links_changed: Callable[[list[LinkEvent]], None],
    ) -> None:
        self.busy = asyncio.Lock()
        self._config, self._history, self._wanted, self._spawn = config, history, wanted, spawn
        self._sockets, self._tell = sockets, links_changed
        self._repair_due = self._looking = False
        self._open = False
        """From the first queue statement to the stop: what is missing is loaded again."""
        self._known_open: set[str] = set()

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """A ruleset that blocks what the policies protect, before anything else is there.

        Raises DaemonError where packets cannot be queued, NetfilterError when nft refuses.
        """
        can = await asyncio.to_thread(detect)
        if can.mechanism is None:
            missing = "no 'queue' statement and no xt NFQUEUE" if can.net_admin else "CAP_NET_ADMIN is needed"
            raise DaemonError(f"netfilter: packets cannot be queued here: {missing}; see ipsecq doctor")
        settings = can.adapt(self._config.netfilter())
        # The rules name the ports of these sockets, and rely on these rings, so they come first.
        self.udp = UdpSockets(settings.mark_done, wanted=self._config.offload.udp_segment)
        stack.callback(self.udp.close)
        wanted = self._config.offload.ring and self._config.offload.compiled and fastpath.active
        self.rings = await asyncio.to_thread(Rings, settings.queues, wanted=wanted)
        stack.callback(self.rings.close)
        settings = replace(settings, udp_ports=self.udp.ports, direct=bool(self.rings.sockets))
        self.loader = Loader(settings, can.mechanism, Sentinel(settings) if can.owner else None)
        if not can.owner:
            log.warning("this kernel has no owned tables: a foreign 'nft flush ruleset' opens a gap until it is noticed")
        self.links = LinkWatcher()
        stack.callback(self.links.close)
        self._say_what_fails_open()
        await self._replace()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.links.fileno(), self._links_changed)
        stack.callback(loop.remove_reader, self.links.fileno())
        self._nft = self.loader.watch()
        loop.add_reader(self._nft.socket.fileno(), self._touched)
        stack.callback(loop.remove_reader, self._nft.socket.fileno())

    async def open(self) -> None:
        """Workers serve: put the queue statements in."""
        async with self.busy:
            await asyncio.to_thread(self.loader.open_queues)
            self._open = True

    async def close(self) -> None:
        """Block, or by ``on_stop`` take the tables away."""
        async with self.busy:
            self._open = False
            try:
                if self._config.daemon.on_stop == "remove":
                    await asyncio.to_thread(self.loader.remove)
                else:
                    await asyncio.to_thread(self.loader.block)
            except NetfilterError as error:
                log.error("stop: %s", error)  # queues without a listener drop, so nothing passes

    def save_blocked(self) -> None:
        """Leave rules for a boot in which the daemon does not come up."""
        policies, sysctl = self._wanted()
        directory: Path = self._config.state_dir
        copy = Sysctl(sysctl.all())  # read in another thread
        self._spawn(asyncio.to_thread(blocked.save, directory, policies, self.loader.settings, copy))

    async def _replace(self) -> None:
        await asyncio.to_thread(self.loader.replace, *self._wanted(), self._devices(), self._sockets())

    async def update(self, *, sockets_only: bool = False) -> None:
        """Follow SPD, knobs and the policies of sockets; the caller holds ``busy``.

        ``sockets_only``: nothing else has changed, and a hundred thousand policies need no look.
        """
        sockets = dict(self._sockets())
        if sockets_only and await asyncio.to_thread(self.loader.update_sockets, sockets):
            return
        self._say_what_fails_open()
        await asyncio.to_thread(self.loader.update, *self._wanted(), sockets)

    async def set_interfaces(self, names: tuple[str, ...]) -> None:
        """Devices of these names are route-based tunnels.  NetfilterError."""
        async with self.busy:
            await asyncio.to_thread(self.loader.set_interfaces, names)

    async def reload_inner(self) -> None:
        """Read the operator's inner rules again.  NetfilterError: they stay as they were."""
        async with self.busy:
            await asyncio.to_thread(self.loader.reload_inner, *self._wanted())

    def _say_what_fails_open(self) -> None:
        """A line for each policy that is new here and passes in clear when nobody serves it."""
        if self._config.nftables.queue_bypass and not hasattr(self, "links"):  # once, at the start
            log.warning("FAIL OPEN: queue_bypass is on: every policy passes in clear while no worker serves it")
        found = {printer.config_policy(policy) for policy in self._wanted()[0] if policy.fail_open}
        for text in sorted(found - self._known_open):
            log.warning("FAIL OPEN: passes in clear while no worker serves it: %s", text)
        self._known_open = found

    async def repair(self) -> None:
        """When somebody touched nf_tables since the last call: load what is missing of ours."""
        if not self._repair_due:
            return
        self._repair_due = False
        async with self.busy:
            if not self._open or await asyncio.to_thread(self.loader.is_loaded):
                return
            log.error("our nftables tables were changed or removed by somebody else: loaded again")
            self._history.ruleset_repairs += 1
            try:
                await self._replace()
                await asyncio.to_thread(self.loader.open_queues)
            except NetfilterError as error:
                log.error("%s", error)
                self._repair_due = True

    def _touched(self) -> None:
        """Somebody changed nf_tables, perhaps we: look at once, and if more comes meanwhile, again at the next tick."""
        self._nft.drain()
        self._repair_due = True
        if not self._looking:
            self._looking = True
            self._spawn(self._look())

    async def _look(self) -> None:
        try:
            await self.repair()
        finally:
            self._looking = False

    def _devices(self) -> dict[int, str]:
        """Devices that need an egress chain: all but loopback and our own."""
        return {
            link.index: link.name
            for link in self.links.links.values()
            if self._needs_guard(link)
        }

    def _needs_guard(self, link: Link) -> bool:
        return not link.loopback and link.name != self._config.nftables.enc_device

    def _links_changed(self) -> None:
        events = self.links.read()
        known = self.loader.guarded
        fresh = {
            event.link.index: event.link.name
            for event in events
            if not event.gone
            and self._needs_guard(event.link)
            and known.get(event.link.index) != event.link.name
        }
        gone = [event.link.index for event in events if event.gone and event.link.index in known]
        if fresh or gone:
            self._spawn(self._guard(fresh, gone))
        if events:
            self._tell(events)

    async def _guard(self, fresh: dict[int, str], gone: list[int]) -> None:
        async with self.busy:
            for index in gone:
                await asyncio.to_thread(self.loader.forget, index)
            if fresh:
                for device in await asyncio.to_thread(self.loader.guard, fresh):
                    log.warning("%s: no egress chain possible: protected traffic to it is dropped", device)
