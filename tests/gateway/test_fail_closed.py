"""Stop and crash leave protected traffic blocked, never clear; a worker's death costs packets, not safety."""

import threading
import time

import pytest

from ipsecq.lab.capture import Capture, in_clear, other_than_esp, repeated_sequence_numbers
from ipsecq.lab.gateway import kill_process
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping, tcp

pytestmark = pytest.mark.root


def nothing_leaks(world, outward):
    """Both hosts try to reach each other; gateway 1 lets nothing of theirs onto the wire or into its LAN."""
    one, two = world.network.sites
    with Capture(one.gateway, "wan") as wire, Capture(one.host, "eth0") as inside:
        for version in (4, 6):
            assert ping(one.host, two.host_address(version), count=2, wait=0.3) == 0
            assert ping(two.host, one.host_address(version), count=2, wait=0.3) == 0
        if outward:
            wait_for(lambda: any(frame.esp for frame in wire.frames()), "ESP of the other gateway", 5)
        wire.settle()
    lans = [site.lan(version) for site in world.network.sites for version in (4, 6)]
    assert in_clear(wire.frames(), *lans) == []
    assert [frame for frame in inside.frames() if frame.version and frame.src in (two.host4, two.host6)] == []


def test_stop_leaves_protected_traffic_blocked_and_a_start_takes_over(make_world):
    world = make_world()
    one, two = world.network.sites
    assert ping(one.host, two.host4) == 3
    assert world.one.stop() == 0
    nothing_leaks(world, 1)
    assert ping(one.host, two.wan4) == 3  # other traffic goes on
    world.one.start()
    for version in (4, 6):
        assert ping(one.host, two.host_address(version)) == 3


def test_on_stop_remove_lets_traffic_pass_in_clear(make_world):
    world = make_world(daemon='on_stop = "remove"')
    assert ping(world.network.one.host, world.network.two.host4) == 3
    assert world.one.stop() == 0
    assert world.two.stop() == 0
    assert "ipsecq" not in world.network.one.gateway.run("nft", "list", "ruleset").stdout


def test_a_crash_of_the_supervisor_leaves_protected_traffic_blocked_and_a_start_takes_over(make_world):
    world = make_world()
    one, two = world.network.sites
    with Capture(one.gateway, "wan", snaplen=160) as wire:
        assert ping(one.host, two.host4) == 3
        workers = world.one.workers()
        world.one.kill()
        space = one.gateway
        wait_for(lambda: not set(workers) & set(space.pids()), "the orphaned workers to end", 5)
        nothing_leaks(world, 1)
        world.one.start()
        for version in (4, 6):
            assert ping(one.host, two.host_address(version)) == 3
        wire.settle()
    assert repeated_sequence_numbers(wire.frames()) == []


def test_a_start_with_a_broken_policy_file_starts_nothing_and_says_where(make_world):
    world = make_world()
    world.one.stop()
    world.one.policy.write_text(world.one.policy.read_text() + "spdadd 10.1.0.0/24 nonsense any -P out none;\n")
    world.one.log.write_text("")
    world.one.start(wait=False)
    assert world.one.process.wait(20) == 2
    lines = [line for line in world.one.log.read_text().splitlines() if line]
    assert len(lines) == 1
    number = world.one.policy.read_text().count("\n")
    assert f"{world.one.policy}:{number}:" in lines[0]
    nothing_leaks(world, 1)


def test_killed_workers_come_back_and_no_sequence_number_is_used_twice(make_world):
    world = make_world()
    one, two = world.network.sites
    with Capture(one.gateway, "wan", snaplen=160, bulk=True) as wire:
        victims = []

        def massacre():
            for _ in range(3):
                time.sleep(0.7)
                workers = world.one.workers()
                victims.extend(workers)
                for pid in workers:
                    kill_process(pid)
                wait_for(
                    lambda: all(each["up"] and each["pid"] not in victims for each in world.one.status()["workers"]),
                    "new workers", 15,
                )  # fmt: skip

        killer = threading.Thread(target=massacre)
        killer.start()
        rounds = 0
        while killer.is_alive() or rounds == 0:
            assert tcp(one.host, two.host, two.host4, 20_000_000, timeout=60).digest_matches
            rounds += 1
        killer.join()
        assert ping(one.host, two.host6) == 3
        wire.settle()
    assert len(victims) >= 6
    assert wire.lost == 0
    frames = wire.frames()
    assert other_than_esp(frames) == []
    assert repeated_sequence_numbers(frames) == []
    assert len({frame.esp for frame in frames if frame.esp}) > 1000
