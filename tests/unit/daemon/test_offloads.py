"""Which offloads are in use, and why the others are not."""

import pytest

from ipsecq.cli import report
from ipsecq.counters import COUNTERS_WORDS, Counter, Offload
from ipsecq.daemon import offloads
from ipsecq.daemon.options import OffloadConfig
from ipsecq.metrics import live
from ipsecq.metrics.source import WorkerSample

ALL = Offload.GSO | Offload.COALESCE | Offload.COALESCE_UDP | Offload.UDP_SEGMENT | Offload.COMPILED | Offload.RING


def worker(index, has, *, up=True):
    words = [0] * COUNTERS_WORDS
    words[Counter.OFFLOADS] = has
    return WorkerSample(index, up, 0, words)


def shown(config, *workers, **more):
    return {each.name: each for each in offloads.samples(config, workers, **more)}


def test_what_all_workers_have_needs_no_reason():
    found = shown(OffloadConfig(), worker(0, ALL), worker(1, ALL))
    assert set(found) == {"gso", "coalesce", "coalesce_udp", "udp_segment", "compiled", "ring"}
    assert all(each.active and each.workers == (0, 1) and not each.why for each in found.values())


@pytest.mark.parametrize(
    ("switch", "gone"),
    [("gso", ["gso"]), ("coalesce", ["coalesce", "coalesce_udp"]), ("udp_segment", ["udp_segment"]),
     ("ring", ["ring"])],
)
def test_a_switch_names_itself(switch, gone):
    has = ALL
    for name in gone:
        has &= ~Offload[name.upper()]
    found = shown(OffloadConfig(**{switch: False}), worker(0, has))
    assert [name for name, each in found.items() if not each.active] == gone
    assert {found[name].why for name in gone} == {f"switched off: [offload] {switch} = false"}


def test_without_compiled_code_there_are_no_rings():
    found = shown(OffloadConfig(compiled=False), worker(0, ALL & ~Offload.COMPILED & ~Offload.RING))
    assert [name for name, each in found.items() if not each.active] == ["compiled", "ring"]
    assert all("[offload] compiled = false" in found[name].why for name in ("compiled", "ring"))


@pytest.mark.parametrize(
    ("offload", "says"),
    [("GSO", "NFQA_CFG_F_GSO"), ("COALESCE_UDP", "TUN_F_USO"), ("UDP_SEGMENT", "(Protocol not available)"),
     ("RING", "(Cannot allocate memory)")],
)
def test_what_the_kernel_refuses_is_named(offload, says):
    problems = {"udp_problem": "Protocol not available", "ring_problem": "Cannot allocate memory"}
    found = shown(OffloadConfig(), worker(0, ALL & ~Offload[offload]), **problems)
    refused = found.pop(offload.lower())
    assert not refused.active
    assert says in refused.why
    assert all(each.active for each in found.values())


def test_a_dead_worker_does_not_count_and_without_any_that_is_the_reason():
    found = shown(OffloadConfig(), worker(0, ALL), worker(1, ALL, up=False))
    assert all(each.active and each.workers == (0,) for each in found.values())
    found = shown(OffloadConfig(), worker(0, ALL, up=False))
    assert {(each.active, each.why) for each in found.values()} == {(False, "no worker is up")}


def test_status_has_a_line_for_each_with_the_reason():
    workers = worker(0, ALL), worker(1, ALL & ~Offload.GSO)
    samples = offloads.samples(OffloadConfig(coalesce=False), workers)
    lines = report.offloads([live.offload(each) for each in samples]).splitlines()
    assert lines[0].split() == ["offload", "state", "why", "not"]
    assert [line.split()[0] for line in lines[1:]] == ["gso", "coalesce", "udp_segment", "coalesce_udp", "compiled", "ring"]
    assert lines[1].startswith("gso           in worker 0  this kernel's queues give out no super-packets")
    assert lines[3].split() == ["udp_segment", "in", "use"]
