"""A reload: the files are read again, and all of it is taken over, or nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from ipsecq.daemon import content as files
from ipsecq.daemon.log import LOGGER, configure
from ipsecq.daemon.takeover import take_back, take_over
from ipsecq.daemon.undo import Undo
from ipsecq.errors import DaemonError, IpsecqError
from ipsecq.sysctl import Sysctl

if TYPE_CHECKING:
    from ipsecq.daemon.supervisor import Supervisor

log: Final = logging.getLogger(f"{LOGGER}.reload")


class Reloads:
    """Asked for by the control socket and by SIGHUP."""

    def __init__(self, supervisor: Supervisor, *, journal: bool) -> None:
        self._supervisor = supervisor
        self._journal = journal
        self._one = asyncio.Lock()

    async def reload(self) -> str:
        """Read the files again and take all of it over, or nothing.  ConfigError says why not.

        One at a time: a second one waits, and reads what the files say then.
        """
        async with self._one:
            return await self._reload()

    async def _reload(self) -> str:
        supervisor, history = self._supervisor, self._supervisor.history
        history.reloads += 1
        undo = Undo()
        try:
            content = await files.read_aside(supervisor.config.path)
            if supervisor.stopping:
                raise DaemonError("the daemon is stopping")
            files.check_reload(supervisor.config, content.config)
            await asyncio.to_thread(supervisor.ruleset.loader.check_inner, content.spd.dump(), content.sysctl)
            try:
                # A variable that the file no longer names has its default again; one that it never named stays as set.
                default = Sysctl()
                knobs = {name: default.get(name) for name in supervisor.config.sysctl} | content.config.sysctl
                was = {sa.key for sa in supervisor.content.sad}
                take_over(supervisor.authority, content.sad, content.spd, knobs, was=was, undo=undo)
                await supervisor.publish()
                await supervisor.ruleset.reload_inner()
                await supervisor.interfaces.change(
                    content.config.interfaces, supervisor.pool, supervisor.ruleset.set_interfaces
                )
            except IpsecqError:
                # A full disk, a table without room, an nft that refuses: back to what was in force.
                with supervisor.book.batch():
                    take_back(supervisor.authority, undo)
                await supervisor.publish()
                raise
        except IpsecqError as error:
            history.reload_failures += 1
            history.reload_success, history.reload_error = False, str(error)
            raise
        finally:
            history.reloads_done += 1
        supervisor.content, supervisor.config = content, content.config
        supervisor.ruleset.save_blocked()
        configure(content.config.log, journal=self._journal)
        history.reload_success, history.reload_time, history.reload_error = True, time.time(), ""
        return supervisor.summary()

    async def by_signal(self) -> None:
        """The same for SIGHUP: the service manager and the log hear of it."""
        notifier = self._supervisor.notifier
        notifier.reloading()
        try:
            log.info("reloaded: %s", await self.reload())
        except IpsecqError as error:
            log.error("reload refused, everything stays as it was: %s", error)
        notifier.ready(self._supervisor.summary())
