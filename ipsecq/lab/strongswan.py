"""strongSwan's own user-space ESP (kernel-libipsec) as a path of the benchmark: two charons, a pre-shared key, AES-GCM.

Each charon gets its own /run (a mount namespace) and its own configuration; nothing of the system's strongSwan is read.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ipsecq.lab.netns import Lab, LabError, wait_for
from ipsecq.lab.topology import Network, Site, build

CHARONS: Final = ("/usr/sbin/charon-systemd", "/usr/lib/ipsec/charon")
"""Debian's charon-systemd (it runs without systemd as well), strongswan-charon."""
PLUGINS: Final = [Path(f"/usr/lib/ipsec/plugins/libstrongswan-{name}.so") for name in ("kernel-libipsec", "openssl")]
"""Of Debian's libcharon-extra-plugins and libstrongswan-standard-plugins.  A charon without openssl ends at once."""
# openssl stands before the plain-C plugins: with them in front, AES-GCM is five times slower.
_DAEMON: Final = """
{section} {{
  load = random nonce openssl kdf pem pkcs1 pubkey hmac kernel-libipsec kernel-netlink socket-default vici
  plugins {{ vici {{ socket = unix://{directory}/vici }} }}
  filelog {{ stderr {{ default = 1 }} }}
}}
"""
_CONNECTION: Final = """
connections {{ gw {{
  version = 2
  local_addrs = {near.wan4}
  remote_addrs = {far.wan4}
  proposals = aes128gcm16-prfsha256-ecp256
  local {{ auth = psk
           id = {near.wan4} }}
  remote {{ auth = psk
            id = {far.wan4} }}
  children {{ net {{
    local_ts = {near.lan4}
    remote_ts = {far.lan4}
    esp_proposals = aes128gcm16
  }} }}
}} }}
secrets {{ ike-1 {{ secret = {secret} }} }}
"""


class StrongswanLibipsec:
    """IKEv2 by charon, ESP by its libipsec over a TUN device."""

    name = "strongSwan kernel-libipsec"

    def __init__(self, lan_mtu: int) -> None:
        self._lan_mtu = lan_mtu

    def missing(self) -> str:
        """Needs Debian's charon-systemd, strongswan-swanctl and the packages of the plugins."""
        if charon() and all(plugin.exists() for plugin in PLUGINS) and shutil.which("swanctl"):
            return ""
        return (
            "needs Debian packages charon-systemd strongswan-swanctl libcharon-extra-plugins libstrongswan-standard-plugins"
        )

    def version(self) -> str:
        """Debian's package version."""
        with Lab() as lab:
            done = lab.run("dpkg-query", "-W", "-f=${Version}", "strongswan-libcharon", check=False)
        return f"{done.stdout.strip() or 'of unknown version'}, AES-GCM-16, openssl plugin first"

    @contextmanager
    def up(self) -> Iterator[Network]:
        """Both charons run and the child SA is installed."""
        with Lab() as lab:
            network = build(lab, lan_mtu=self._lan_mtu)
            secret = secrets.token_hex(16)
            for near, far in (network.sites, network.sites[::-1]):
                self._start(near, far, secret)
            one = lab.directory / "charon-1"
            network.one.gateway.run("swanctl", "--initiate", "--child", "net", "--uri", f"unix://{one}/vici")
            yield network

    def _start(self, near: Site, far: Site, secret: str) -> None:
        space = near.gateway
        directory = space.lab.directory / f"charon-{near.number}"
        directory.mkdir()
        program = charon()
        text = _DAEMON.format(section=Path(program).name, directory=directory)
        (directory / "strongswan.conf").write_text(text)
        (directory / "swanctl.conf").write_text(_CONNECTION.format(near=near, far=far, secret=secret))
        log = directory / "log"
        process = space.popen(
            "unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs /run && exec {program}",
            log=log, env={"STRONGSWAN_CONF": str(directory / "strongswan.conf")},
        )  # fmt: skip
        try:
            wait_for(lambda: _listens(directory / "vici", process), "charon's vici socket")
        except LabError as error:
            raise LabError(f"charon of {space.role}: {error}; its log:\n{log.read_text(errors='replace')}") from None
        # The tunnel device's default MTU of 1400 is what the LANs have.
        space.run(
            "swanctl", "--load-all", "--file", str(directory / "swanctl.conf"), "--uri", f"unix://{directory}/vici"
        )


def _listens(path: Path, charon: subprocess.Popen[bytes]) -> bool:
    """Whether somebody answers there: the file alone is there before charon listens, and after it has died."""
    if charon.poll() is not None:
        raise LabError(f"ended with status {charon.returncode}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return not probe.connect_ex(str(path))


def charon() -> str:
    """Path of the charon that is installed; empty when none is."""
    return next((path for path in CHARONS if Path(path).exists()), "")
