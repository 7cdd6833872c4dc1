"""Workers that hang, a daemon that dies under traffic: replaced, blocked meanwhile, and no number is used twice."""

import contextlib
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
from flow import Flow

from ipsecq.lab.capture import Capture, in_clear, repeated_sequence_numbers
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping

pytestmark = pytest.mark.root


def lans(world):
    return [site.lan(version) for site in world.network.sites for version in (4, 6)]


def test_a_stopped_worker_is_replaced_within_ten_seconds(make_world):
    world = make_world()
    one, two = world.network.sites
    with Capture(one.gateway, "wan", snaplen=160) as wire, Flow(one.host, two.host4) as flow:
        stopped = world.one.workers()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        since = time.monotonic()
        wait_for(lambda: not set(stopped) & set(world.one.workers()), "other workers", 10)
        wait_for(lambda: all(worker["up"] for worker in world.one.status()["workers"]), "workers that serve", 30)
        assert time.monotonic() - since < 10
        flow.goes_on()
    assert ping(one.host, two.host6) == 3
    frames = wire.frames()
    assert in_clear(frames, *lans(world)) == []
    assert repeated_sequence_numbers(frames) == []
    assert [worker["restarts"] for worker in world.one.status()["workers"]] == [1, 1]
    assert flow.outage < 10


def test_a_daemon_killed_under_traffic_lets_nothing_out_and_goes_on_beyond_its_numbers(make_world):
    world = make_world()
    one, two = world.network.sites
    spi = world.tunnel.spi_from(one, 4)
    with Capture(one.gateway, "wan", snaplen=160) as wire, Flow(one.host, two.host4) as flow:
        workers = world.one.workers()
        world.one.kill()
        wait_for(lambda: not set(workers) & set(one.gateway.pids()), "the workers to end", 20)
        wire.settle()
        dead = time.time()
        last = max(frame.esp[1] for frame in wire.frames() if frame.esp and frame.esp[0] == spi)
        time.sleep(0.5)
        assert [frame for frame in wire.frames() if frame.time > dead and frame.src == one.wan4 and frame.esp] == []
        world.one.start()
        flow.goes_on()
    frames = wire.frames()
    assert in_clear(frames, *lans(world)) == []
    assert repeated_sequence_numbers(frames) == []
    fresh = [frame.esp[1] for frame in frames if frame.time > dead and frame.esp and frame.esp[0] == spi]
    assert fresh
    assert min(fresh) > last


def test_a_replay_of_what_was_recorded_before_a_kill_is_dropped_after_it(make_world):
    """The receiver's window lives in the run directory, not in the process."""
    from ipsecq.lab.capture import inject

    world = make_world(router=True)
    one, two = world.network.sites
    with Capture(world.network.router, "left") as wire:
        assert ping(one.host, two.host4) == 3
        wire.settle()
    recorded = [frame.data for frame in wire.frames() if frame.esp and frame.dst == one.wan4]
    assert len(recorded) >= 3
    world.one.kill()
    world.one.start()
    inject(world.network.router, "left", *recorded)
    wait_for(lambda: world.one.metric("ipsecq_drops_total", reason="esp_replay") == len(recorded), "replays", 20)
    assert ping(one.host, two.host4) == 3


def test_a_running_daemon_has_two_capabilities_in_every_thread_and_workers_one(make_world):
    world = make_world()
    net_admin, net_raw = 1 << 12, 1 << 13

    def held(pid):
        found = set()
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                text = (task / "status").read_text()
            except (FileNotFoundError, ProcessLookupError):  # threads come and go
                continue
            lines = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
            found.add(int(lines["CapEff"], 16) | int(lines["CapPrm"], 16))
        return found

    # The fork and exec of `ip netns exec` and `setpriv` end in the daemon: its pid is the process's.
    world.one.metrics_text()
    assert held(world.one.pid) == {net_admin | net_raw}
    assert [held(pid) for pid in world.one.workers()] == [{net_admin}, {net_admin}]


def test_the_watchdog_is_fed_only_while_every_worker_makes_progress(make_world):
    world = make_world()
    path = world.one.directory / "notify"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.setblocking(False)

        def fed():
            heard = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    heard.append(manager.recv(4096))
            return b"WATCHDOG=1" in heard

        wait_for(fed, "the first feeding", 20)
        old = world.one.workers()[0]
        os.kill(old, signal.SIGKILL)
        gone = {0, old}

        def caught():
            """A new worker, stopped before it was ready; one that was quicker goes, for the next."""
            worker = world.one.status()["workers"][0]
            if worker["pid"] in gone:
                return 0
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], signal.SIGSTOP)
                if not world.one.status()["workers"][0]["up"]:
                    return worker["pid"]
                gone.add(worker["pid"])
                os.kill(worker["pid"], signal.SIGKILL)
            return 0

        fresh = wait_for(caught, "a worker that is not ready", 30)
        fed()
        time.sleep(2.0)
        assert not fed()
        os.kill(fresh, signal.SIGCONT)
        wait_for(fed, "feeding again", 15)
    assert ping(world.network.one.host, world.network.two.host4) == 3


def test_daemon_and_workers_leave_no_core_and_stay_out_of_swap(make_world):
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        locked = True
    except (ValueError, OSError):  # a container without CAP_SYS_RESOURCE: then it must serve all the same
        locked = False
    try:
        world = make_world()
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    for pid in (world.one.pid, *world.one.workers()):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
        status = Path(f"/proc/{pid}/status").read_text()
        assert (int(re.search(r"VmLck:\s+(\d+)", status)[1]) > 10_000) == locked
    one, two = world.network.sites
    assert ping(one.host, two.host4) == 3


def test_no_key_is_in_status_metrics_log_or_the_rules_on_disk(make_world):
    world = make_world()
    one, two = world.network.sites
    assert ping(one.host, two.host4) == 3
    os.kill(world.one.workers()[0], signal.SIGKILL)
    wait_for(lambda: world.one.status()["workers"][0]["restarts"] == 1, "a restart", 10)
    keys = [word.removeprefix("0x").rstrip(";") for line in world.tunnel.lines for word in line.split() if len(word) > 34]
    assert len(keys) == 4
    shown = [
        world.one.command("status", "--json").stdout,
        world.one.command("status").stdout,
        world.one.command("stat").stdout,
        world.one.metrics_text(),
        world.one.log.read_text(),
        (world.one.directory / "state" / "blocked.nft").read_text(),
        one.gateway.run("nft", "list", "ruleset").stdout,
    ]
    for text in shown:
        assert text
        assert not [key for key in keys if key in text.lower() or key[:16] in text.lower()]


def test_the_rules_on_disk_block_what_the_daemon_protected(make_world):
    """For a boot in which the daemon does not come up: systemd loads them before it."""
    world = make_world()
    one, two = world.network.sites
    rules = world.one.directory / "state" / "blocked.nft"
    wait_for(rules.exists, "blocked.nft")
    assert world.one.stop() == 0
    one.gateway.run("nft", "flush", "ruleset")  # as after a boot
    one.gateway.run("nft", "-f", str(rules))
    with Capture(one.gateway, "wan") as wire:
        for version in (4, 6):
            assert ping(one.host, two.host_address(version), count=2, wait=0.3) == 0
        wire.settle()
    assert in_clear(wire.frames(), *lans(world)) == []
    assert ping(one.gateway, two.wan4, source=one.wan4) == 3
    world.one.start()
    assert ping(two.host, one.host4) == 3
