"""What goes wrong in the lab: two gateways, and everything that can be done to them, one method each."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from ipsecq.daemon.control import ask
from ipsecq.daemon.pool import START_SECONDS
from ipsecq.errors import IpsecqError
from ipsecq.lab.gateway import AES_CBC_SHA256, AES_GCM, Algorithm, Gateway, Tunnel
from ipsecq.lab.netns import Lab, LabError, wait_for
from ipsecq.lab.topology import Site, build, firewall, firewall_text
from ipsecq.lab.traffic import ping

RESTART_SECONDS: Final = 1.0
"""RestartSec= of the systemd unit."""
RECOVERY_SECONDS: Final = START_SECONDS + 15.0
"""A worker that is stopped while it starts is given its time to start before it is replaced."""
STATE_DISK: Final = "4m"
_CHACHA: Final = Algorithm("chacha20-poly1305", 36)


class Mayhem:
    """The network with its gateways.  ``actions`` maps names to what is done; each returns the gateway it befell.

    The daemon of the second gateway is never killed (its workers are): its memory shows the growth of a whole run.
    """

    def __init__(self, lab: Lab, rng: random.Random) -> None:
        self.killed = 0
        self._random = rng
        self.network = build(lab, router=True)
        self.fixed = Tunnel(self.network, AES_GCM, versions=(4,), spi=0x1000)
        self.moving = Tunnel(self.network, AES_GCM, versions=(6,), spi=0x2000)
        self.lines = [*self.fixed.lines, *self.moving.lines]
        """Every ``add`` line that was ever in force."""
        self._generation = 0
        self.gateways: list[Gateway] = []
        for site in self.network.sites:
            firewall(site)
            gateway = Gateway(site.gateway, self._setkey(site))
            state = gateway.directory / "state"
            state.mkdir(mode=0o700)
            lab.run("mount", "-t", "tmpfs", "-o", f"size={STATE_DISK},mode=700", "tmpfs", str(state))
            lab.on_close(partial(lab.run, "umount", "-l", str(state)))
            self.gateways.append(gateway)
        self.actions: dict[str, Callable[[], Gateway]] = {
            "kill a worker": self._kill_worker,
            "kill all workers": self._kill_workers,
            "kill the daemon": self._kill_daemon,
            "kill everything": self._kill_everything,
            "restart": self._restart,
            "stop a worker": self._stop_worker,
            "pause the daemon": self._pause_daemon,
            "reload": self._reload,
            "reload a mistake": self._bad_reload,
            "fill the disk": self._fill_disk,
            "overflow": self._overflow,
            "rekey": self._rekey,
            "same SA again": self._same_again,
            "flush ruleset": self._flush,
        }

    def recover(self, gateway: Gateway) -> None:
        """Wait until a gateway serves again, all of its workers, and packets pass it."""
        one, two = self.network.sites

        def serves() -> bool:
            with contextlib.suppress(IpsecqError):
                return all(worker["up"] for worker in gateway.status()["workers"])
            return False

        wait_for(serves, f"{gateway.space.role} to serve", RECOVERY_SECONDS, every=0.1)
        for version in (4, 6):
            wait_for(
                partial(ping, one.host, two.host_address(version), count=1, wait=0.5),
                f"an answer over IPv{version}", RECOVERY_SECONDS,
            )  # fmt: skip

    # -- what is done ------------------------------------------------------------------------------------------------

    def _any(self) -> Gateway:
        return self._random.choice(self.gateways)

    def _kill(self, *pids: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.killed += 1

    def _kill_worker(self) -> Gateway:
        gateway = self._any()
        self._kill(self._random.choice(pids_of_workers(gateway)))
        return gateway

    def _kill_workers(self) -> Gateway:
        gateway = self._any()
        self._kill(*pids_of_workers(gateway))
        return gateway

    def _kill_daemon(self) -> Gateway:
        gateway = self.gateways[0]
        self._kill(gateway.pid)
        return self._start_again(gateway)

    def _kill_everything(self) -> Gateway:
        """As the kernel does when memory is short: the whole service."""
        gateway = self.gateways[0]
        self._kill(gateway.pid, *pids_of_workers(gateway))
        return self._start_again(gateway)

    def _restart(self) -> Gateway:
        gateway = self.gateways[0]
        gateway.stop()
        return self._start_again(gateway, pause=0.0)

    def _start_again(self, gateway: Gateway, pause: float = RESTART_SECONDS) -> Gateway:
        """What systemd does by the unit: wait, ExecStartPre=, ExecStart=."""
        if gateway.process is not None:
            gateway.process.wait()
        time.sleep(pause)
        blocked = gateway.directory / "state" / "blocked.nft"
        if blocked.exists():
            gateway.space.run("nft", "-f", str(blocked))
        gateway.start()
        return gateway

    def _stop_worker(self) -> Gateway:
        gateway = self._any()
        os.kill(self._random.choice(pids_of_workers(gateway)), signal.SIGSTOP)
        return gateway

    def _pause_daemon(self) -> Gateway:
        gateway = self._any()
        os.kill(gateway.pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(gateway.pid, signal.SIGCONT)
        return gateway

    def _reload(self) -> Gateway:
        gateway = self._any()
        site = self.network.sites[self.gateways.index(gateway)]
        number = self._random.randrange(1, 200)
        extra = f"spdadd 198.18.{number}.0/24 198.19.{number}.0/24 any -P out discard;\n"
        gateway.policy.write_text(self._setkey(site) + extra)
        ask(gateway.directory / "run" / "control", "reload")
        return gateway

    def _bad_reload(self) -> Gateway:
        gateway = self._any()
        good = gateway.policy.read_text()
        gateway.policy.write_text(good.replace("spdflush;", "spdflush;\nspdadd nonsense;"))
        try:
            ask(gateway.directory / "run" / "control", "reload")
        except IpsecqError:
            return gateway
        finally:
            gateway.policy.write_text(good)
        raise LabError("a reload of a broken file was not refused")

    def _fill_disk(self) -> Gateway:
        """No octet left: running SAs go on, new ones are refused, a killed worker comes back."""
        gateway = self._any()
        ballast = gateway.directory / "state" / "ballast"
        good = gateway.policy.read_text()
        more = "".join(
            f"add 192.0.2.9 203.0.113.9 esp 0x{0x9000 + n:x} -E aes-gcm-16 0x{self._random.getrandbits(160):040x};\n"
            for n in range(600)
        )
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            gateway.policy.write_text(good + more)
            refused = False
            try:
                ask(gateway.directory / "run" / "control", "reload")
            except IpsecqError:
                refused = True
            self._kill(self._random.choice(pids_of_workers(gateway)))
            time.sleep(1.0)
        finally:
            ballast.unlink(missing_ok=True)
            gateway.policy.write_text(good)
        if not refused:
            raise LabError("600 new SAs found room on a full disk")
        return gateway

    def _overflow(self) -> Gateway:
        """More than any gateway can take."""
        one, two = self.network.sites
        near, far = self._random.choice(((one, two), (two, one)))
        argv = (sys.executable, "-m", "ipsecq.lab.blast", far.host4, "9", "1.5", "64")
        near.host.run(*argv)
        return self.gateways[near.number - 1]

    def _rekey(self) -> Gateway:
        """New SAs for IPv6 at both ends, then the old ones go; at one end through setkey, at the other by reload."""
        self._generation += 1
        algorithm = self._random.choice((AES_GCM, AES_CBC_SHA256, _CHACHA))
        old, new = self.moving, Tunnel(self.network, algorithm, versions=(6,), spi=0x2000 + 64 * self._generation)
        self.lines += new.lines
        for gateway in self.gateways:
            self._setkey_now(gateway, "\n".join(new.lines))
        self.moving = new
        gone = "".join(
            f"delete {near.wan6} {far.wan6} esp 0x{old.spi_from(near, 6):x};\n"
            for near, far in (self.network.sites, self.network.sites[::-1])
        )
        for gateway, site in zip(self.gateways, self.network.sites, strict=True):
            gateway.policy.write_text(self._setkey(site))
            if self._random.random() < 0.5:
                self._setkey_now(gateway, gone)
            else:
                ask(gateway.directory / "run" / "control", "reload")
                with contextlib.suppress(IpsecqError):
                    self._setkey_now(gateway, gone)
        return self.gateways[1]

    def _same_again(self) -> Gateway:
        """Delete an SA and add it with the same key: its numbers must go on."""
        gateway = self._any()
        site = self.network.sites[self.gateways.index(gateway)]
        far = self.network.sites[1 - self.gateways.index(gateway)]
        for tunnel, version in ((self.fixed, 4), (self.moving, 6)):
            spi = tunnel.spi_from(site, version)
            ends = f"{site.wan(version)} {far.wan(version)}"
            line = next(line for line in tunnel.lines if line.startswith(f"add {ends} "))
            self._setkey_now(gateway, f"delete {ends} esp 0x{spi:x};\n{line}")
        return gateway

    def _flush(self) -> Gateway:
        """The operator's firewall is loaded anew, as the distribution does: ``flush ruleset`` first, in one transaction."""
        gateway = self._any()
        site = self.network.sites[self.gateways.index(gateway)]
        repairs = gateway.metric("ipsecq_ruleset_repairs_total")
        site.gateway.nft("flush ruleset\n" + firewall_text(site))
        wait_for(lambda: gateway.metric("ipsecq_ruleset_repairs_total") > repairs, "the repair", 20.0)
        return gateway

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _setkey(self, site: Site) -> str:
        return self.fixed.setkey(site) + self.moving.setkey(site).replace("spdflush;\n", "").replace("flush;\n", "")

    def _setkey_now(self, gateway: Gateway, text: str) -> None:
        answer = ask(
            gateway.directory / "run" / "control", "setkey", token="", text=text, more=False, file="", atomic=True
        )
        if answer["errors"]:
            raise LabError(f"setkey: {answer['errors'][0]}")


def pids_of_workers(gateway: Gateway) -> list[int]:
    """Workers that live now; waits for one when all have just died."""
    return wait_for(lambda: [pid for pid in gateway.workers() if pid], "a worker", RECOVERY_SECONDS)
