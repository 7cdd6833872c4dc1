"""What ``ipsecq doctor`` looks at: the files, and the running daemon when there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ipsecq.daemon import content as files
from ipsecq.daemon.control import ask
from ipsecq.doctor.examination import examine
from ipsecq.doctor.finding import Finding, Grade
from ipsecq.errors import ConfigError, DaemonError

KNOBS: Final = [f"net.inet.{protocol}.{protocol}_enable" for protocol in ("esp", "ah", "ipcomp")]


def findings(config: Path, *, probe: bool) -> list[Finding]:
    """Everything that is found; without a configuration file, what can be said about the machine alone.

    Raises ConfigError when the files have a mistake: what they mean cannot be examined then.
    """
    try:
        content = files.read(config)
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError) and error.file == str(config):
            return examine(probe=probe)
        raise
    daemon: list[Finding] = []
    status, knobs = None, dict[str, int]()
    try:
        status = ask(content.config.control_socket, "status")
        knobs = {name: int(value) for name, value in ask(content.config.control_socket, "sysctl-get", names=KNOBS).items()}
    except DaemonError as error:
        daemon = [
            Finding(
                Grade.WARN, "daemon", f"no running daemon answers: {error}",
                "systemctl start ipsecq; without it, protected traffic stays blocked if rules are loaded",
            )
        ]  # fmt: skip
    found = examine(content.config.netfilter(), content.spd.dump(), content.sad.dump(), status, knobs, probe=probe)
    return found + daemon
