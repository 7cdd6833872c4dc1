"""strongSwan's charon with kernel-netlink inside User-Mode Linux: IKEv2 and the Linux kernel's own ESP as the other end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ipsecq.lab.certificates import Authority
from ipsecq.lab.iked import SECRET
from ipsecq.lab.interop import FAR_LAN, FAR_OUTER, NEAR_LAN, NEAR_OUTER, Bench
from ipsecq.lab.netns import LabError, wait_for
from ipsecq.lab.strongswan import charon

CHILD: Final = "aes256-sha512"
# Only plugins of Debian's libstrongswan: RSA, modp2048 and AES-CBC in plain C.
_DAEMON: Final = """
{section} {{
  load = random nonce aes sha1 sha2 hmac kdf gmp pem pkcs1 pkcs8 pubkey x509 constraints kernel-netlink socket-default vici
  install_routes = no
  retransmit_timeout = 1
  retransmit_tries = 2
  filelog {{ stderr {{ default = 1
                       ike = 2 }} }}
}}
"""
_CONNECTION: Final = """
connections {{ gw {{
  version = 2
  local_addrs = {local}
  remote_addrs = {remote}
  proposals = aes256-sha512-modp2048
  local {{ {ours}
           id = gw2 }}
  remote {{ {theirs}
            id = gw1 }}
  children {{ net {{
    local_ts = {local_lan}
    remote_ts = {remote_lan}
    esp_proposals = {child}
  }} }}
}} }}
{secrets}
"""


def missing() -> str:
    """Why charon cannot run here; empty when it can."""
    return "" if charon() and Path("/usr/sbin/swanctl").exists() else "needs charon-systemd and strongswan-swanctl"


class PeerCharon:
    """One charon in the peer of a bench, for the tunnel between its LANs.  ``authority``: certificates, else a key.

    It waits; :meth:`initiate` makes it begin.
    """

    def __init__(self, bench: Bench, version: int = 4, authority: Authority | None = None) -> None:
        self.bench, self.peer = bench, bench.peer
        self._pid = 0
        # A directory of its own: the peer's page cache does not see that a file has changed.
        self.directory = bench.peer.root / f"charon-{len(list(bench.peer.root.glob('charon-*')))}"
        for name in ("x509", "x509ca", "private"):
            (self.directory / name).mkdir(parents=True)
        ours = theirs = "auth = psk"
        secrets = f"secrets {{ ike-1 {{ secret = {SECRET} }} }}"
        if authority is not None:
            authority.write(self.directory / "x509ca" / "ca.pem")
            authority.issue("gw2", self.directory / "x509" / "gw2.pem", self.directory / "private" / "gw2.pem")
            ours, theirs, secrets = "auth = pubkey\n           certs = gw2.pem", "auth = pubkey", ""
        text = _CONNECTION.format(
            local=FAR_OUTER[version], remote=NEAR_OUTER[version], local_lan=FAR_LAN[version],
            remote_lan=NEAR_LAN[version], ours=ours, theirs=theirs, secrets=secrets, child=CHILD,
        )  # fmt: skip
        (self.directory / "swanctl.conf").write_text(text)
        (self.directory / "strongswan.conf").write_text(_DAEMON.format(section=Path(charon()).name))

    def start(self) -> PeerCharon:
        """Start it and load its connection."""
        directory, vici = self.directory, "/run/charon.vici"
        self.peer.run("rm", "-f", vici)
        script = f"export STRONGSWAN_CONF={directory}/strongswan.conf; exec {charon()} >{directory}/log 2>&1"
        self._pid = self.peer.spawn("sh", "-c", script)
        wait_for(lambda: not self.peer.run("test", "-S", vici, check=False).rc, "charon's vici socket", every=0.1)
        self.swanctl("--load-all", "--file", f"{directory}/swanctl.conf")
        return self

    def stop(self) -> None:
        """SIGTERM: it deletes its SAs and tells its peers."""
        if self._pid:
            self.peer.kill(self._pid)
            self._pid = 0

    def swanctl(self, *words: str, timeout: float = 30.0) -> str:
        """``swanctl``: what it prints; LabError with charon's log when it fails."""
        conf = f"STRONGSWAN_CONF={self.directory}/strongswan.conf"
        done = self.peer.run("env", f"SWANCTL_DIR={self.directory}", conf, "swanctl", *words, check=False, timeout=timeout)
        if done.rc:
            raise LabError(f"swanctl {' '.join(words)}: {done.out}{done.err}\n{self.text()[-3000:]}")
        return done.out

    def initiate(self) -> None:
        """Begin, and return when the child SA is there."""
        self.swanctl("--initiate", "--child", "net", "--timeout", "20")

    def rekey(self) -> None:
        """Replace the child SA."""
        self.swanctl("--rekey", "--child", "net")

    def states(self) -> set[int]:
        """SPIs of the peer kernel's SAs."""
        words = self.peer.run("ip", "xfrm", "state").out.split()
        return {int(words[at + 1], 16) for at, word in enumerate(words) if word == "spi"}

    def text(self) -> str:
        """Its log."""
        return self.peer.run("cat", os.fspath(self.directory / "log"), check=False).out
