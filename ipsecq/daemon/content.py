"""What a configuration and its policy files say: read and checked as a whole, for a start, a reload or a command."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ipsecq.daemon import config as configuration
from ipsecq.daemon.config import Config
from ipsecq.errors import ConfigError, DaemonError
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
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "expected UTF-8 text"
            raise ConfigError(f"cannot be read: {reason}", file=str(file)) from error
        applied = apply(
            parse(text, str(file)), sad, spd, now=time.time(), file=str(file), allow_legacy=config.daemon.allow_legacy
        )
        sad, spd = applied.sad, applied.spd
    return Content(config, sad, spd, Sysctl(config.sysctl))


def check_reload(old: Config, new: Config) -> None:
    """What cannot change while the daemon runs is refused, so that a reload never means half of what the file says."""
    fixed = (
        ("[daemon] workers", old.workers, new.workers),
        ("[daemon] queue_base", old.daemon.queue_base, new.daemon.queue_base),
        ("[daemon] state_dir", old.state_dir, new.state_dir),
        ("[daemon] run_dir", old.run_dir, new.run_dir),
        ("[daemon] group", old.daemon.group, new.daemon.group),
        ("[daemon] rekey_grace", old.daemon.rekey_grace, new.daemon.rekey_grace),
        ("[daemon] pfkey_freebsd", old.daemon.pfkey_freebsd, new.daemon.pfkey_freebsd),
        ("[nftables]", old.nftables, new.nftables),
        ("[offload]", old.offload, new.offload),
        ("[metrics]", old.metrics, new.metrics),
    )
    for name, before, after in fixed:
        if before != after:
            raise DaemonError(f"{new.path}: {name} cannot change in a reload: restart ipsecq for it")
