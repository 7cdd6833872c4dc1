"""What a configuration and its policy files say: read and checked as a whole, for a start, a reload or a command."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

from ipsecq.daemon import config as configuration
from ipsecq.daemon.config import Config
from ipsecq.daemon.options import SECTIONS
from ipsecq.daemon.textfile import read_text
from ipsecq.errors import DaemonError
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse
from ipsecq.sysctl import Sysctl


@dataclass(slots=True)
class Content:
    """What a configuration says, without a daemon."""

    config: Config
    sad: Sad
    spd: Spd
    sysctl: Sysctl


def read(path: Path) -> Content:
    """Read everything.  Raises ConfigError with file, line and column of the first mistake."""
    config = configuration.load(path)
    sad, spd = Sad(), Spd()
    for file in config.policy_files:
        text = read_text(file)
        applied = apply(
            parse(text, str(file)), sad, spd, now=time.time(), file=str(file), allow_legacy=config.daemon.allow_legacy
        )
        sad, spd = applied.sad, applied.spd
    return Content(config, sad, spd, Sysctl(config.sysctl))


async def read_aside(path: Path) -> Content:
    """:func:`read` in a thread of its own: a hundred thousand SAs take seconds, a sick disk takes for ever.

    Not in a pool: nobody joins this thread, so a daemon that is told to stop does not wait for its files.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Content] = loop.create_future()

    def deliver(content: Content | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        elif content is not None:
            result.set_result(content)

    def body() -> None:
        content: Content | None = None
        failure: BaseException | None = None
        try:
            content = read(path)
        except BaseException as error:  # handed on to who awaits
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(deliver, content, failure)

    threading.Thread(target=body, name="files", daemon=True).start()
    return await result


def check_reload(old: Config, new: Config) -> None:
    """What cannot change while the daemon runs is refused, so that a reload never means half of what the file says."""
    for section, options in SECTIONS.items():
        for option in fields(options):
            if option.metadata["restart"] and _value(old, section, option.name) != _value(new, section, option.name):
                raise DaemonError(
                    f"{new.path}: [{section}] {option.name} cannot change in a reload: restart ipsecq for it"
                )


def _value(config: Config, section: str, key: str) -> object:
    """The value in force: numbers of workers counted, paths whole."""
    home = config if key in ("workers", "state_dir", "run_dir") else getattr(config, section)
    return getattr(home, key)
