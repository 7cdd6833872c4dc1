"""What a configuration and its policy files say: read and checked as a whole, for a start, a reload or a command."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

from ipsecq.daemon import config as configuration
from ipsecq.daemon.config import Config
from ipsecq.daemon.options import SECTIONS
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
