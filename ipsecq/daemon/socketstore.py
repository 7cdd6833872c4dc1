"""The policies of sockets on disk: sockets outlive the daemon, and their marks must mean the same to the next one.

The file is in the run directory, since no socket outlives the machine; a boot id in it is the proof.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from ipsecq.daemon.log import LOGGER
from ipsecq.errors import IpsecqError
from ipsecq.policy.setpolicy import parse
from ipsecq.policy.sockets import SocketPolicy, SocketRule

log: Final = logging.getLogger(f"{LOGGER}.sockets")

NAME: Final = "sockets.json"


def load(directory: Path, boot: bytes, mask: int) -> list[SocketPolicy]:
    """The policies that a daemon before us gave to sockets since the machine was started."""
    path = directory / NAME
    try:
        document = json.loads(path.read_text())
        if document["boot"] != boot.hex():
            return []
        found = [
            SocketPolicy(int(entry["mark"]), _rule(entry["in"]), _rule(entry["out"]), int(entry["number"]))
            for entry in document["policies"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, IpsecqError) as error:
        log.error("%s cannot be read: sockets of before have no policies of their own any more: %s", path, error)
        return []
    if any(policy.mark & ~mask for policy in found):
        log.error("mark_sockets was changed: sockets that were given policies before have none of their own any more")
        return []
    return found


def save(directory: Path, boot: bytes, policies: Iterable[SocketPolicy]) -> None:
    """Put the file in the place of the old one.  Raises OSError."""
    entries = [
        {
            "mark": policy.mark,
            "number": policy.number,
            "in": _entry(policy.inbound),
            "out": _entry(policy.outbound),
        }
        for policy in policies
    ]
    fresh = directory / (NAME + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"boot": boot.hex(), "policies": entries}, file)
    fresh.rename(directory / NAME)


def _entry(rule: SocketRule | None) -> dict[str, object] | None:
    return None if rule is None else {"policy": rule.text, "privileged": rule.privileged}


def _rule(entry: Any) -> SocketRule | None:
    return None if entry is None else SocketRule(parse(entry["policy"]), bool(entry["privileged"]))
