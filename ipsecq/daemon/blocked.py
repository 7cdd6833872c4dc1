"""The rules of the last good start or reload, blocked, as a file: for a boot in which the daemon does not come up.

``ipsecq.service`` loads it before each start of the daemon, ``ipsecq-nft.service`` after a start that failed, before
networks come up.  A daemon that finds a mistake in its files starts nothing, and after a boot nothing would hold back
what its policies protect.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ipsecq.daemon.log import LOGGER
from ipsecq.netfilter.compile import compile_ruleset
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.policy.model import Policy
from ipsecq.sysctl import Sysctl

log: Final = logging.getLogger(f"{LOGGER}.blocked")

NAME: Final = "blocked.nft"


def save(directory: Path, policies: Iterable[Policy], settings: NetfilterSettings, sysctl: Sysctl) -> None:
    """Put ``blocked.nft`` in the place of the old one.  A full disk is logged: the old rules are better than none.

    No device is trusted in it and no queue is open, so all that an outbound policy protects is dropped, and so is what
    an inbound policy wants protected.  It names no key.
    """
    path = directory / NAME
    fresh = path.with_name(NAME + ".new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(compile_ruleset(policies, settings, sysctl))
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
    except OSError as error:
        log.warning("%s: %s: the next boot blocks by older rules until the daemon is up", path, error.strerror)
