"""The supervisor: checks the files, blocks, starts the workers, opens the queues, and looks after all of it.

The order is what keeps protected traffic from passing in clear.  Start: files checked (an error starts nothing), a
ruleset that blocks, workers with the whole state, queue statements.  A change: workers first, then nftables.  Stop: the
ruleset blocks again (or goes, by ``on_stop``), then the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ipsecq.daemon import content as files
from ipsecq.daemon import offloads, privileges, socketstore
from ipsecq.daemon.authority import Authority
from ipsecq.daemon.config import Config
from ipsecq.daemon.content import Content
from ipsecq.daemon.control import ControlServer
from ipsecq.daemon.interfaces import Interfaces, samples
from ipsecq.daemon.keys import KeyService
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.log import LOGGER, configure
from ipsecq.daemon.messages import Operation, WorkerSetup
from ipsecq.daemon.nat import NatPeers
from ipsecq.daemon.notify import Notifier
from ipsecq.daemon.pool import WorkerPool
from ipsecq.daemon.reload import Reloads
from ipsecq.daemon.reports import Reports
from ipsecq.daemon.requests import Requests
from ipsecq.daemon.reservations import Reservations
from ipsecq.daemon.ruleset import Ruleset
from ipsecq.daemon.rundir import RunLock, make_directory
from ipsecq.daemon.sampling import History, Sampler
from ipsecq.daemon.socket_server import SocketServer
from ipsecq.daemon.sockets import SocketPolicies
from ipsecq.daemon.statefile import boot_identity, machine_identity
from ipsecq.daemon.table import CounterPages, SharedTable
from ipsecq.daemon.takeover import take_over
from ipsecq.daemon.tap import TapServer
from ipsecq.daemon.watch import Watch
from ipsecq.datapath import enc0, tun
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.output import RawOutput
from ipsecq.engine.tables import Tables
from ipsecq.errors import DaemonError, IpsecqError
from ipsecq.metrics.server import MetricsServer
from ipsecq.netfilter.links import LinkEvent
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import SocketPolicy
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sysctl import Sysctl

log: Final = logging.getLogger(f"{LOGGER}.supervisor")

_RULES: Final = frozenset({"spd_replace", "spd_put", "spd_delete", "sysctl"})
_SOCKET_RULES: Final = frozenset({"socket_put", "socket_drop"})
"""Operations that nftables has to follow."""

TICK: Final = 0.5
"""Seconds between two looks at workers, lifetimes and reservations."""


def run(path: Path) -> int:
    """``ipsecq run``: until SIGTERM or SIGINT; the exit status.  ConfigError before anything was started."""
    content = files.read(path)
    journal = "JOURNAL_STREAM" in os.environ
    configure(content.config.log, journal=journal)
    privileges.forbid_dumps()
    privileges.lock_memory()
    supervisor = Supervisor(content, journal=journal)
    try:
        return asyncio.run(supervisor.main())
    finally:
        gc.freeze()  # all of it goes with the process: the collector need not look at it once more


class Supervisor:
    """One running daemon."""

    def __init__(self, content: Content, *, journal: bool) -> None:
        self.content = content
        self.config: Config = content.config
        self.history = History()
        self._journal = journal
        self.notifier = Notifier()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rules_due = False
        """The SPD or a knob has changed and nftables does not know yet."""
        self._sockets_due = False
        """The same of the policies of sockets."""
        self._saved_sockets: dict[int, SocketPolicy] = {}
        self.reloads = Reloads(self, journal=journal)
        self.ruleset = Ruleset(
            self.config, self.history, self._wanted, self._wanted_sockets, self.spawn, self._links_changed
        )  # fmt: skip
        self.interfaces = Interfaces(self.config.run_dir / "interfaces")

    def _wanted(self) -> tuple[list[Policy], Sysctl]:
        """What the kernel's rules have to say: the authority's policies and knobs, before it is there the files'."""
        if hasattr(self, "authority"):
            return self.authority.spd.dump(), self.authority.sysctl
        return self.content.spd.dump(), self.content.sysctl

    def _wanted_sockets(self) -> dict[int, SocketPolicy]:
        """The policies of sockets; before the authority is there, what the daemon before us left."""
        return self.authority.spd.sockets if hasattr(self, "authority") else self._saved_sockets

    def _links_changed(self, events: list[LinkEvent]) -> None:
        if hasattr(self, "pool"):
            self.interfaces.mend(events, self.pool)
            self.pool.broadcast([("routes_changed",)])

    # -- life --------------------------------------------------------------------------------------------------------

    async def main(self) -> int:
        """Start, serve, stop."""
        loop = asyncio.get_running_loop()
        self._helpers = ThreadPoolExecutor(thread_name_prefix="start")
        loop.set_default_executor(self._helpers)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self.spawn(self.reloads.by_signal()))
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self.notifier.ready(self.summary())
            log.info("serving: %s", self.summary())
            await self._serve()
            self.watch.bus.publish("stopping", how=self._stop_words())
            self.notifier.stopping()
            log.info("stopping: %s", self._stop_words())
        return 0

    @property
    def stopping(self) -> bool:
        """Somebody has asked for the end."""
        return self._stop.is_set()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """Everything up, in order; ``stack`` undoes it in the opposite order, also when a later step fails."""
        config = self.config
        make_directory(config.run_dir, 0o755)
        make_directory(config.state_dir, 0o700)
        lock = stack.enter_context(RunLock(config.run_dir / "lock"))
        boot = boot_identity()
        for policy in socketstore.load(config.run_dir, boot, config.netfilter().mark_sockets):
            self._saved_sockets[policy.mark] = policy
        await self.ruleset.start(stack)
        self.table = SharedTable.open(config.run_dir / "table", boot)
        stack.callback(self.table.close)
        self.book = LeaseBook.open(config.state_dir, self.table, machine_identity())
        self.reservations = Reservations(self.table, self.book)
        for problem in self.reservations.notices():
            log.warning("state: %s", problem)
        self.authority = Authority(
            self.table, self.book, rekey_grace=config.daemon.rekey_grace, peer_limit=2 * config.metrics.peer_limit
        )
        take_over(self.authority, self.content.sad, self.content.spd, config.sysctl)
        for policy in self._saved_sockets.values():
            self.authority.put_socket(policy)
        for problem in self.authority.problems.values():
            log.warning("%s", problem)
        self.authority.take()  # workers get the whole state
        device = config.nftables.enc_device
        enc0.create(device, accept_local=True)
        stack.callback(tun.remove, device)
        self.interfaces.start(config.interfaces)
        if config.daemon.on_stop == "remove":
            stack.callback(self.interfaces.remove)
        pages = CounterPages.create(config.workers)
        self.pool = WorkerPool(
            pages,
            self._queues,
            {"table": self.table.descriptor, "counters": pages.descriptor, "state": self.book.state.descriptor},
            [lock.descriptor, *self.ruleset.udp.descriptors, *self.ruleset.rings.descriptors],
            self._first_state,
            Reports(self).take,
            {} if self.config.offload.compiled else {"IPSECQ_PURE": "1"},
        )
        stack.callback(self.reservations.settle, self.authority.sad)
        self.taps = TapServer(config.tap_socket, self.pool, self.authority.sysctl, self.spawn)
        stack.push_async_callback(self.pool.stop)
        self.pool.start()
        await self.pool.settled(self.pool.generation)
        self.sampler = Sampler(
            self.authority, self.pool, self.ruleset.loader, self.history,
            sa_limit=config.metrics.sa_limit, peer_limit=config.metrics.peer_limit, bypass=config.nftables.queue_bypass,
            interfaces=lambda: samples(self.interfaces.current, self.ruleset.links.links, self.authority),
            offloads=lambda workers: offloads.samples(
                self.config.offload, workers, udp_problem=self.ruleset.udp.problem,
                ring_problem=self.ruleset.rings.problem,
            ),
            notices=self.reservations.notices,
        )  # fmt: skip
        self.path_mtu = PathMtu(
            mark=self.ruleset.loader.settings.mark_done, floor=lambda: self.authority.sysctl.v4.min_pmtu
        )
        output = RawOutput(self.ruleset.loader.settings.mark_done)
        stack.callback(output.close)
        self.nat = NatPeers(self.authority, output, self.sampler.is_local, config.daemon.natt_keepalive)
        self.watch = Watch(self.sampler, self.pool, self.history)
        self.authority.observer = self.watch.changed
        self.requests = Requests(self)
        control = ControlServer(config.control_socket, config.daemon.group, self.requests.handle)
        await control.start()
        stack.push_async_callback(control.close)
        self.taps.start()
        stack.callback(self.taps.close)
        self.keys = KeyService(
            self.authority, config, self.publish, self.spawn, self._acquire_failed, self.interfaces.policies
        )
        stack.callback(self.keys.close)
        self.sockets = SocketPolicies(
            self.authority, self.ruleset.loader.settings, config.run_dir, boot, self.publish
        )  # fmt: skip
        stack.callback(self.sockets.close)
        self.sampler.sockets = self.sockets
        socket_server = SocketServer(config.sockets_socket, self.sockets)
        socket_server.start()
        stack.push_async_callback(socket_server.close)
        loop = asyncio.get_running_loop()
        loop.add_reader(self.keys.fileno(), self.keys.on_readable)
        stack.callback(loop.remove_reader, self.keys.fileno())
        metrics = None
        if config.metrics_address is not None:
            metrics = MetricsServer(*config.metrics_address, self.sampler)
            stack.callback(metrics.close)
        await self.ruleset.open()
        # From here on the first thing to undo: nothing may pass while workers end.
        stack.push_async_callback(self.ruleset.close)
        self._give_up_privileges()
        if metrics is not None:
            metrics.start()
        self.ruleset.save_blocked()

    def _give_up_privileges(self) -> None:
        """What was made is ours; what is to come (netlink, raw sockets of new workers, nft) asks for two capabilities.

        Capabilities belong to threads: those that helped with the start end here, others begin with what is left.
        """
        self._helpers.shutdown()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix="helper"))
        privileges.keep_capabilities([privileges.CAP_NET_ADMIN, privileges.CAP_NET_RAW])

    def _stop_words(self) -> str:
        if self.config.daemon.on_stop == "remove":
            return "rules removed, traffic passes in clear (on_stop)"
        return "protected traffic stays blocked"

    def summary(self) -> str:
        """What is served, in a line."""
        authority = self.authority
        text = (
            f"{len(authority.sad)} SAs, {len(authority.spd)} policies, {self.config.workers} workers, "
            f"queues by {self.ruleset.loader.mechanism}"
        )
        if self.config.nftables.queue_bypass or any(policy.fail_open for policy in authority.spd):
            text += "; FAIL OPEN is on"
        return text

    # -- serving -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while not self.stopping:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), TICK)
            if self.pool.check():
                self.notifier.feed()
            part = self.authority.sweep()
            self.reservations.top_up(part)
            self.expire(part)
            self._expire_rest()
            self.keys.tick()
            self.nat.keep_alive(time.time())
            self.taps.look(self.config.nftables.enc_device)
            await self._tick_sockets()
            await self.ruleset.repair()
            self.watch.tick()

    async def _tick_sockets(self) -> None:
        try:
            await self.sockets.tick()
        except (IpsecqError, OSError) as error:
            log.error("policies of sockets: %s", error)

    def expire(self, sas: Iterable[SecurityAssociation]) -> None:
        """Lifetimes of these SAs."""
        expired = self.authority.expire(time.time(), sas)
        for sa, hard in expired:
            log.info("SA 0x%08x reached its %s limit", sa.spi, "hard" if hard else "soft")
        self.keys.expired(expired)
        if self.authority.changed:
            self.spawn(self.publish())

    def _expire_rest(self) -> None:
        """Larval SAs that nobody completed, and policies with a lifetime."""
        now = time.time()
        self.authority.part(now)
        self.keys.expired(self.authority.expire_larval(now))
        self.keys.policies_expired(self.authority.expire_policies(now))
        if self.authority.changed:
            self.spawn(self.publish())

    def _acquire_failed(self, protocol: int, src: bytes, dst: bytes, reqid: int) -> None:
        """Key management gave up: what waits for the SA has no hope."""
        self.pool.broadcast([("acquire_failed", protocol, src, dst, reqid)])

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run beside the main loop; an error of ours is logged, not lost."""

        async def guarded() -> None:
            try:
                await coroutine
            except IpsecqError as error:
                log.error("%s", error)
            except Exception:
                log.exception("unexpected")

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def publish(self) -> None:
        """Bring what changed to all workers, then to nftables.  Raises DaemonError, NetfilterError."""
        async with self.ruleset.busy:
            while batch := self.authority.take():
                names = {operation[0] for operation in batch.operations}
                self._rules_due = self._rules_due or not names.isdisjoint(_RULES)
                self._sockets_due = self._sockets_due or not names.isdisjoint(_SOCKET_RULES)
                generation = self.pool.broadcast(batch.operations)
                try:
                    await self.pool.settled(generation)
                except DaemonError:
                    self.authority.undone(batch)
                    raise
                with self.book.batch():
                    self.authority.done(batch)
            if self._rules_due or self._sockets_due:
                await self.ruleset.update(sockets_only=not self._rules_due)
                self._rules_due = self._sockets_due = False

    # -- workers -----------------------------------------------------------------------------------------------------

    def _queues(self, index: int) -> tuple[int, ...]:
        """Numbers of a worker's queues: its lanes, then the plain one, if any."""
        settings = self.ruleset.loader.settings
        lanes = [lane * settings.workers for lane in range(settings.lanes + self.config.offload.gso)]
        return tuple(settings.queue_base + index + lane for lane in lanes)

    def _first_state(self, index: int) -> list[Operation]:
        settings = self.ruleset.loader.settings
        setup = WorkerSetup(
            self._queues(index)[: settings.lanes],
            settings.queue_base + settings.queues + index if self.config.offload.gso else -1,
            settings.workers, settings.mark_done, settings.mark_stolen, settings.mark_sockets,
            self.config.nftables.enc_device,
            self.config.offload.coalesce, self.config.daemon.parallel_sas, tuple(self.ruleset.udp.sockets),
            settings.natt_ports[0], frozenset(settings.natt_ports), tuple(self.ruleset.rings.sockets), self.config.log,
            self._journal,
        )  # fmt: skip
        return [("setup", setup), *self.authority.whole_state(), self.interfaces.operation(), *self.taps.operations()]

    def tables(self) -> Tables:
        """What workers decide by, to explain it; never to send with."""
        authority = self.authority
        return Tables(
            authority.sad, authority.spd, authority.sysctl, self.table.words, self.pool.workers[0].counters,
            lambda slot, limit: (0, 0), os.urandom, parallel_sas=self.config.daemon.parallel_sas,
            natt_ports=frozenset(self.config.nftables.natt_ports),
        )  # fmt: skip

    def mtu_of(self, dst: bytes) -> int:
        """The path MTU that workers know."""
        self.path_mtu.advance(time.time())
        return self.path_mtu.mtu_of(dst)
