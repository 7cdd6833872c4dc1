"""Debian's ``iked``, unmodified, on gateways of the lab: ``ipsecq exec -- iked -d`` beside ``ipsecq run``."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ipsecq.lab.certificates import Authority
from ipsecq.lab.gateway import Gateway, start_all
from ipsecq.lab.netns import LabError, stop, wait_for
from ipsecq.lab.topology import Network, Site
from ipsecq.numbers import SaState
from ipsecq.pfkey.client import PfkeyClient
from ipsecq.pfkey.constants import MessageType
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import LifetimeExt

SECRET: Final = "mekmitasdigoat"  # noqa: S105  # the lab's, known to all
CERTIFICATES: Final = "rfc7427"
"""Authentication by certificates, signed as RFC 7427 says."""
CHILD: Final = "childsa enc aes-256 auth hmac-sha2-512"
"""What openiked has on Linux: neither HMAC-SHA2-256 (old kernels cut it to 96 bits) nor AES-GCM (af_key has none)."""


def missing() -> str:
    """Why iked cannot run here; empty when it can."""
    return "" if shutil.which("iked") else "needs iked (Debian's openiked)"


def configuration(
    near: Site, far: Site, *, active: bool, version: int = 4, lifetime: int = 0, child: str = CHILD, extra: str = "",
    prefix: str = "", peer: str = "", authentication: str = f'psk "{SECRET}"',
) -> str:  # fmt: skip
    """An ``iked.conf`` for one end: everything between the two LANs, named by host.

    ``lifetime``: seconds after which child SAs are replaced (0: iked's default); ``prefix``: global lines before;
    ``peer``: what stands for the other end's address (``any`` where a NAT hides it); ``authentication``: a pre-shared
    key, or :data:`CERTIFICATES`.
    """
    text = (
        f'ikev2 "lans" {"active" if active else "passive"} esp from {near.lan(version)} to {far.lan(version)} '
        f"local {near.wan(version)} peer {peer or far.wan(version)} {child} srcid gw{near.number} dstid gw{far.number} "
    )
    if lifetime:
        text += f"lifetime {lifetime} bytes 100G "
    return f"{prefix}\n{text}{authentication} {extra}\n"


def identity(directory: Path, authority: Authority, name: str) -> Path:
    """A directory that can stand for iked's /etc/iked: the CA, and the key pair of host ``name``."""
    for below in ("ca", "certs", "crls", "private", "pubkeys/fqdn"):
        (directory / below).mkdir(parents=True, exist_ok=True)
    authority.write(directory / "ca" / "ca.crt")
    authority.issue(name, directory / "certs" / f"{name}.crt", directory / "private" / "local.key")
    return directory


@dataclass
class Iked:
    """One iked on a gateway."""

    gateway: Gateway
    config: str
    identity: Path | None = None
    """What it sees as /etc/iked; None: the machine's own."""
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.file = self.gateway.directory / "iked.conf"
        self.log = self.gateway.directory / "iked.log"
        self.control = self.gateway.directory / "iked.sock"

    def start(self, *options: str) -> Iked:
        """Start it under ``ipsecq exec``; it ends with the lab at the latest."""
        self.file.write_text(self.config)
        self.file.chmod(0o600)
        before = []
        if self.identity is not None:
            # Its paths are built in: a mount of its own puts the lab's keys there.
            mount = f'mount --bind {self.identity} /etc/iked && exec "$@"'
            before = ["unshare", "--mount", "sh", "-c", mount, "sh"]
        self.process = self.gateway.space.popen(
            *before, sys.executable, "-m", "ipsecq", "exec", "--config", str(self.gateway.config), "--",
            "iked", "-dvv", "-s", str(self.control), "-f", str(self.file), *options,
            log=self.log,
        )  # fmt: skip
        return self

    def stop(self) -> int:
        """SIGTERM: iked deletes its SAs and policies, and tells the peer."""
        if self.process is None:
            raise LabError("iked was not started")
        return stop(self.process)

    def processes(self) -> list[int]:
        """Pids of iked itself: the program's parent and its children, without ``ipsecq exec``."""
        if self.process is None:
            return []
        done = self.gateway.space.lab.run("ps", "-eo", "pid=,ppid=", check=True)
        children: dict[int, list[int]] = {}
        for line in done.stdout.splitlines():
            pid, parent = map(int, line.split())
            children.setdefault(parent, []).append(pid)
        found: list[int] = []
        waiting = [self.process.pid]
        while waiting:
            below = children.get(waiting.pop(), [])
            found += below
            waiting += below
        return found

    def ctl(self, *words: str) -> str:
        """``ikectl``: what it prints."""
        return self.gateway.space.run("ikectl", "-s", str(self.control), *words, check=False).stdout

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def sas(gateway: Gateway, state: Sequence[str] = ("mature",)) -> list[Any]:
    """The SAs of a gateway in these states, from its status."""
    return [sa for sa in gateway.status()["sas"] if sa["state"] in state]


def hasten(gateway: Gateway) -> None:
    """Bring the soft limit of every SA of a gateway to now, as SADB_UPDATE may: iked is asked to replace them."""
    with PfkeyClient.connect(gateway.directory / "run" / "pfkey") as client:
        for record in list(client.dump()):
            if record.sa is None or record.sa.state != SaState.MATURE:
                continue
            record.type, record.seq, record.pid = MessageType.UPDATE, 0, 0
            record.lifetime_soft = LifetimeExt(0, 0, 1, 0)
            record.lifetime_hard = LifetimeExt(0, 0, 3600, 0)
            record.lifetime_current = None
            try:
                client.request(record)
            except PfkeyError as error:
                if error.errno != errno.ESRCH:  # it has gone meanwhile
                    raise


def start_pair(
    network: Network, *, workers: int = 2, daemon: str = "", wait: bool = True, nat: bool = False, **words: Any
) -> tuple[tuple[Gateway, Gateway], tuple[Iked, Iked]]:
    """Both gateways without a word about IPsec in their files, an iked on each; one is active, two waits.

    ``daemon``: more lines of this table, for both gateways.  ``nat``: site one is behind a NAT, so that two does not
    know its address.  With ``wait`` it returns when an SA each way is there at both ends.
    """
    gateways = [Gateway(site.gateway, "", workers=workers, daemon=daemon) for site in network.sites]
    start_all(gateways)
    one, two = network.sites
    identities: list[Path | None] = [None, None]
    if words.get("authentication") == CERTIFICATES:
        authority = Authority()
        identities = [identity(each.directory / "iked", authority, f"gw{n}") for n, each in enumerate(gateways, 1)]
    daemons = [
        Iked(
            gateways[1], configuration(two, one, active=False, peer="any" if nat else "", **words), identities[1]
        ).start(),
        Iked(gateways[0], configuration(one, two, active=True, **words), identities[0]).start(),
    ][::-1]
    if wait:
        wait_for(lambda: all(len(sas(gateway)) >= 2 for gateway in gateways), "SAs at both ends", 20)
    return (gateways[0], gateways[1]), (daemons[0], daemons[1])
