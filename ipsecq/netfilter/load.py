"""Loading: nft transactions, queue statements by the way that this kernel has, and noticing foreign changes.

Everything runs in the network namespace of the calling thread.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from ipsecq.errors import NetfilterError
from ipsecq.netfilter import compat, hooks
from ipsecq.netfilter import nftsocket as nft
from ipsecq.netfilter.compile import (
    NO_SOCKETS,
    compile_block,
    compile_commands,
    compile_guard,
    compile_remove,
    compile_ruleset,
    compile_unguard,
    egress_chain,
    worker_chains,
)
from ipsecq.netfilter.inner import InnerTable, included, inner_files
from ipsecq.netfilter.plan import Plan
from ipsecq.netfilter.sentinel import Sentinel
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.netfilter.socketmaps import SocketPlan
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import SocketPolicy
from ipsecq.sysctl import Sysctl

NATIVE: Final = "nft queue"
COMPAT: Final = "xt NFQUEUE"
_TIMEOUT: Final = 60.0


def run_nft(text: str, *arguments: str) -> str:
    """Give nft a script on standard input, or ``arguments``; its output.  NetfilterError on one line if it refuses.

    nft names the place and repeats the line with a marker below; the message keeps the reason and the line.
    """
    try:
        command = ["nft", *(arguments or ("-f", "-"))]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except FileNotFoundError:
        raise NetfilterError("nft is not installed: apt install nftables") from None
    except subprocess.TimeoutExpired:
        raise NetfilterError(f"nft did not end within {_TIMEOUT:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip(" ^~")]
        lines = [line for line in lines if not line.startswith("In file included from")]
        reason = ": ".join(lines[:2])[:300] or f"exit status {done.returncode}"
        raise NetfilterError(f"nft refused the ruleset: {reason}")
    return done.stdout


class Loader:
    """Owner of our two tables.

    The order for a start is ``replace`` (blocks), workers bind their queues, ``open_queues``.  For a stop, ``block``
    (or ``remove``).  Between them ``update`` with every change of SPD or knobs and ``guard`` with every new link.
    """

    def __init__(
        self, settings: NetfilterSettings, mechanism: str | None = None, sentinel: Sentinel | None = None
    ) -> None:
        self.settings = settings
        self.mechanism = mechanism
        """How packets are queued, NATIVE or COMPAT; None until it is known (the first ``open_queues`` tries)."""
        self.sentinel = sentinel
        """The second line of defence, kept in step; None where the kernel has no owned tables."""
        self.guarded: dict[int, str] = {}
        self._plan: Plan | None = None
        self._inner = InnerTable(settings)
        self._inner_rules: list[str] | None = None
        """The operator's rules as they were last read: a repair must not stumble over a file that has changed since."""
        self._open = False
        self._expected: dict[str, int] = {}
        self._called: dict[str, int] = {}

    def replace(
        self, policies: Iterable[Policy], sysctl: Sysctl, guarded: Mapping[int, str] | None = None,
        sockets: Mapping[int, SocketPolicy] = NO_SOCKETS,
    ) -> None:  # fmt: skip
        """Put the whole ruleset in place of whatever our tables hold, with worker chains that block.

        ``guarded`` (interface index → name) replaces the devices; None keeps them.  A device that has gone is left
        out.
        Raises NetfilterError, with the old state untouched.
        """
        if guarded is not None:
            self.guarded = dict(guarded)
        policies = list(policies)
        sockets = dict(sockets)
        try:
            self._load_all(policies, sysctl, self.guarded, sockets)
        except NetfilterError:
            if not self.guarded:
                raise
            # Perhaps a device went a moment ago: first everything else, then the devices one by one.
            devices = self.guarded
            self._load_all(policies, sysctl, {}, sockets)
            self.guarded = {}
            self.guard(devices)

    def _load_all(
        self, policies: list[Policy], sysctl: Sysctl, guarded: Mapping[int, str], sockets: Mapping[int, SocketPolicy]
    ) -> None:
        plan = Plan(self.settings.table, self.settings.workers, self.settings.lanes)
        # The sentinel first: from the first instant something drops, and while this replaces a flushed table
        # nothing gets around it.
        if self.sentinel is not None:
            commands = Plan(self.settings.table, self.settings.workers, self.settings.lanes).update(policies, sysctl)
            commands += SocketPlan(self.settings).update(sockets, sysctl)
            self.sentinel.load(commands, sysctl, guarded)
        rules = included(self.settings) if self._inner_rules is None else self._inner_rules
        inner = self._inner.whole(policies, sysctl, rules)
        run_nft(compile_ruleset(policies, self.settings, sysctl, guarded, plan, sockets) + inner)
        if self._inner_rules is None:
            self._remember_inner()
        self._plan, self._open = plan, False
        self._expect()

    def update(
        self, policies: Iterable[Policy], sysctl: Sysctl, sockets: Mapping[int, SocketPolicy] = NO_SOCKETS
    ) -> None:
        """Change to these policies and knobs in one transaction, without touching queues and devices.

        When nothing is loaded any more, or after a failure, it replaces the whole ruleset and opens the queues again
        if they were open.
        """
        plan, self._plan = self._plan, None
        sockets = dict(sockets)
        if plan is None:
            self._restore(policies, sysctl, sockets)
            return
        policies = list(policies)
        commands = plan.update(policies, sysctl)
        if plan.sockets is not None:
            commands += plan.sockets.update(sockets, sysctl)
        try:
            inner = "\n".join(self._inner.update(policies, sysctl))
            run_nft(compile_commands(commands, self.settings, sysctl) + inner + "\n")
        except NetfilterError:
            if self.is_loaded():
                raise
            self._restore(policies, sysctl, sockets)  # somebody flushed our tables, and this is how we learn it
            return
        if self.sentinel is not None:
            self.sentinel.update(commands, sysctl)
        self._plan = plan
        self._expect()

    def update_sockets(self, sockets: Mapping[int, SocketPolicy]) -> bool:
        """Change to these policies of sockets, with SPD and knobs as they are; False when all has to be loaded anew."""
        plan, self._plan = self._plan, None
        if plan is None or plan.sockets is None:
            return False
        commands = plan.sockets.update(sockets, plan.sysctl)
        if commands:
            try:
                run_nft("\n".join(commands) + "\n")
            except NetfilterError:
                return False
            if self.sentinel is not None:
                self.sentinel.run(commands)
            self._expect()
        self._plan = plan
        return True

    def check_inner(self, policies: Iterable[Policy], sysctl: Sysctl) -> None:
        """Would nft take the operator's inner rules as the files are now?  NetfilterError with file and line if not."""
        run_nft(InnerTable(self.settings).whole(policies, sysctl, included(self.settings)), "-c", "-f", "-")

    def reload_inner(self, policies: Iterable[Policy], sysctl: Sysctl) -> None:
        """Read the operator's inner rules again: one transaction, or NetfilterError and the old ones stay.

        Counters and dynamic sets in them begin anew.
        """
        inner = InnerTable(self.settings)
        run_nft(inner.whole(policies, sysctl, included(self.settings)))
        self._inner = inner
        self._remember_inner()
        self._expect()

    def _remember_inner(self) -> None:
        self._inner_rules = [Path(file).read_text("utf-8") for file in inner_files(self.settings)]

    def _restore(
        self, policies: Iterable[Policy], sysctl: Sysctl, sockets: Mapping[int, SocketPolicy]
    ) -> None:
        was_open = self._open
        self.replace(policies, sysctl, sockets=sockets)
        if was_open:
            self.open_queues()

    def where(self, policy: int) -> list[str]:
        """Names of the maps and chains that hold a policy, for ``explain``."""
        return self._plan.where(policy) if self._plan else []

    def open_queues(self) -> None:
        """Put the queue statements into the worker chains, in one transaction: native where the kernel has them."""
        if self.mechanism != COMPAT:
            try:
                run_nft(self.queue_statements())
                self.mechanism = NATIVE
            except NetfilterError:
                if self.mechanism == NATIVE:
                    raise
                self._open_compat()
                self.mechanism = COMPAT
        else:
            self._open_compat()
        self._open = True
        self._expect()

    def queue_statements(self) -> str:
        """The queue statements as nft text."""
        table = self.settings.table
        lines: list[str] = []
        for chain, (first, last, bypass) in worker_chains(self.settings).items():
            lines.append(f"flush chain inet {table} {chain}")
            flags = "flags bypass " if bypass else ""
            queues = f"{first}-{last}" if last > first else f"{first}"
            lines.append(f"add rule inet {table} {chain} queue {flags}to {queues}")
        return "\n".join(lines) + "\n"

    def _open_compat(self) -> None:
        table = self.settings.table
        requests: list[compat.Request] = []
        for chain, (first, last, bypass) in worker_chains(self.settings).items():
            requests.append(compat.flush_chain(table, chain))
            requests.append(compat.queue_rule(table, chain, first, last, bypass))
        with nft.NftSocket() as netlink:
            netlink.batch(requests)

    def block(self) -> None:
        """Protected traffic is dropped from here on, whatever becomes of the workers; fail-open policies pass."""
        run_nft(compile_block(self.settings))
        self._open = False
        self._expect()

    def remove(self) -> None:
        """Take our tables away: policies are enforced no more."""
        if self.sentinel is not None:
            self.sentinel.close()
            self.sentinel = None
        run_nft(compile_remove(self.settings))
        self._plan, self._open, self._expected, self._called, self.guarded = None, False, {}, {}, {}

    def set_interfaces(self, names: tuple[str, ...]) -> None:
        """Leave what passes through devices of these names to their own policies; no others.  NetfilterError."""
        settings = replace(self.settings, interfaces=names)
        if self._plan is not None:
            run_nft(hooks.compile_interfaces(settings))
        if self.sentinel is not None:
            self.sentinel.set_interfaces(names)
        self.settings = settings

    def guard(self, devices: Mapping[int, str]) -> list[str]:
        """Add devices: egress chain first, trusted after it.  Returns the names that could not be added.

        A device may be gone or renamed by now; the others must not suffer, so a refused transaction is tried one by
        one.
        """
        fresh = {index: name for index, name in devices.items() if self.guarded.get(index) != name}
        failed: list[str] = []
        if not fresh:
            return failed
        for index in fresh:
            self.forget(index)  # renamed: its chain may be bound to the old name
        try:
            self._guard(fresh)
        except NetfilterError:
            for index, name in fresh.items():
                try:
                    self._guard({index: name})
                except NetfilterError:
                    failed.append(name)
        self._expect()
        return failed

    def _guard(self, devices: dict[int, str]) -> None:
        if self.sentinel is not None:
            self.sentinel.forget(devices)
            self.sentinel.guard(devices)
        run_nft(compile_guard(devices, self.settings))
        self.guarded.update(devices)

    def forget(self, index: int) -> None:
        """A device is gone; the kernel took its egress chain along (or keeps it empty-handed)."""
        name = self.guarded.pop(index, None)
        if name is None:
            return
        # One command, one transaction: which of them are still there depends on the kernel's version.
        for command in compile_unguard({index: name}, self.settings).splitlines():
            with contextlib.suppress(NetfilterError):
                run_nft(command)
        if self.sentinel is not None:
            self.sentinel.forget({index: name})
        self._expect()

    def counters(self) -> dict[str, tuple[int, int]]:
        """The named counters: name → (packets, bytes).  ``stolen`` is the egress chains'."""
        found: dict[str, tuple[int, int]] = {}
        with nft.NftSocket() as netlink:
            for family in (nft.NFPROTO_INET, nft.NFPROTO_NETDEV):
                found.update(netlink.counters(family, self.settings.table))
        return found

    def is_loaded(self) -> bool:
        """True while our chains hold the rules that we put there; False after a foreign ``flush`` or ``delete``."""
        if not self._expected or self._rules(nft.NFPROTO_INET) != self._expected or self._inner_counts() != self._called:
            return False
        chains = self._rules(nft.NFPROTO_NETDEV)
        # The chain of a device that has just gone may have gone with it.
        present = [index for index, name in self.guarded.items() if _index(name) == index]
        return all(chains.get(egress_chain(index)) == 1 for index in present)

    def watch(self) -> nft.NftSocket:
        """A socket that becomes readable whenever somebody changes nf_tables: call :meth:`is_loaded` then.

        ``drain`` it first; ENOBUFS only says that there was too much news to tell.
        """
        netlink = nft.NftSocket(nft.NFNLGRP_NFTABLES)
        netlink.socket.setblocking(False)
        return netlink

    def _expect(self) -> None:
        self._expected, self._called = self._rules(nft.NFPROTO_INET), self._inner_counts()

    def _inner_counts(self) -> dict[str, int]:
        """Rules of our own chains of the inner table; what the operator does in the others is no damage."""
        with nft.NftSocket() as netlink:
            counts = netlink.rule_counts(nft.NFPROTO_INET, self._inner.name)
        return {chain: counts.get(chain, 0) for chain in ("prerouting", "call")}

    def _rules(self, family: int) -> dict[str, int]:
        with nft.NftSocket() as netlink:
            return netlink.rule_counts(family, self.settings.table)


def _index(device: str) -> int:
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return 0
