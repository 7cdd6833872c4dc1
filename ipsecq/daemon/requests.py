"""The commands that the control socket takes, one method each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import ipsecq
from ipsecq.daemon import explain
from ipsecq.daemon.setkey import Setkey
from ipsecq.errors import DaemonError
from ipsecq.metrics import live, netstat
from ipsecq.sysctl import Sysctl

if TYPE_CHECKING:
    from ipsecq.daemon.supervisor import Supervisor

Answer = Callable[[dict[str, Any]], Awaitable[object]]


class Requests:
    """``handle`` is the handler of :class:`ipsecq.daemon.control.ControlServer`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        setkey = Setkey(supervisor)
        self._commands: dict[str, Answer] = {
            "version": self._version,
            "status": self._status,
            "interface": self._interface,
            "stat": self._stat,
            "monitor": self._monitor,
            "sample": self._sample,
            "reload": self._reload,
            "sysctl-get": self._sysctl_get,
            "sysctl-set": self._sysctl_set,
            "state-reset": self._state_reset,
            "explain": self._explain,
            "setkey": setkey.execute,
            "setkey-dump": setkey.dump,
        }

    async def handle(self, command: str, request: dict[str, Any]) -> object:
        """The answer to one request.  IpsecqError for the client's eyes."""
        answer = self._commands.get(command)
        if answer is None:
            raise DaemonError(f"unknown command {command!r}; known: {', '.join(self._commands)}")
        return await answer(request)

    async def _version(self, request: dict[str, Any]) -> object:
        return ipsecq.__version__

    async def _status(self, request: dict[str, Any]) -> object:
        return self._supervisor.sampler.status(
            limit=_number(request, "limit", 10_000), offset=_number(request, "offset", 0)
        )

    async def _interface(self, request: dict[str, Any]) -> object:
        return self._supervisor.sampler.interfaces()

    async def _stat(self, request: dict[str, Any]) -> object:
        return netstat.report(self._supervisor.sampler.counters(), str(request.get("protocol") or "") or None)

    async def _sample(self, request: dict[str, Any]) -> object:
        limit = _number(request, "limit", 10_000)
        # Ten thousand SAs take a tenth of a second: not on the event loop.
        return await asyncio.to_thread(lambda: live.data(self._supervisor.sampler.snapshot(limit)))

    async def _monitor(self, request: dict[str, Any]) -> object:
        return self._supervisor.watch.bus.subscribe()

    async def _reload(self, request: dict[str, Any]) -> object:
        return await self._supervisor.reloads.reload()

    async def _sysctl_get(self, request: dict[str, Any]) -> object:
        names = request.get("names")
        if not isinstance(names, list):
            raise DaemonError('sysctl-get: expected "names": a list')
        return {str(name): self._supervisor.authority.sysctl.get(str(name)) for name in names}

    async def _sysctl_set(self, request: dict[str, Any]) -> object:
        values = request.get("values")
        if not isinstance(values, dict):
            raise DaemonError('sysctl-set: expected "values": {name: value}')
        authority = self._supervisor.authority
        scratch = Sysctl(authority.sysctl.all())
        for name, value in values.items():
            scratch.set(str(name), str(value))  # all of them are right, or none is set
        scratch.check(values)
        changed = {str(name): authority.set_sysctl(str(name), str(value)) for name, value in values.items()}
        await self._supervisor.publish()
        return changed

    async def _explain(self, request: dict[str, Any]) -> object:
        words = [str(request.get(name) or default) for name, default in (("src", ""), ("dst", ""), ("protocol", "any"))]
        question = explain.Question.parse(
            words[0], words[1], words[2], _number(request, "sport", 0), _number(request, "dport", 0),
            inbound=bool(request.get("in")), mtu=_number(request, "mtu", 0),
        )  # fmt: skip
        supervisor = self._supervisor
        return explain.answer(
            question, supervisor.tables(), supervisor.ruleset.loader.settings, "daemon", supervisor.mtu_of,
            supervisor.ruleset.loader.where,
        )

    async def _state_reset(self, request: dict[str, Any]) -> object:
        """The operator's word that an SA, or with ``all`` every one now and later, has keys that were never used before."""
        supervisor = self._supervisor
        there = [sa for sa in supervisor.authority.sad if sa.slot >= 0]
        if request.get("all"):
            found = [sa for sa in there if supervisor.table.refused(sa.slot)]
        else:
            spi = _number(request, "spi", 0)
            found = [sa for sa in there if sa.spi == spi]
            if not found:
                raise DaemonError(f"no SA with SPI 0x{spi:08x}")
        supervisor.book.reset(*(sa.slot for sa in found))
        for sa in found:
            supervisor.authority.problems.pop(sa.key, None)
        if request.get("all"):
            supervisor.book.trust()
        return len(found)


def _number(request: dict[str, Any], name: str, default: int) -> int:
    value = request.get(name, default)
    if type(value) is not int or value < 0:
        raise DaemonError(f"{name}: expected a number, found {value!r}")
    return value
