"""enc(4) on a live gateway: `ipsecq tap`, captures on enc0, and what the operator's filters see of inner packets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipsecq.daemon.tap import TapClient, is_captured
from ipsecq.errors import DaemonError
from ipsecq.lab.capture import Capture
from ipsecq.lab.netns import stop, wait_for
from ipsecq.lab.traffic import ping, tcp

pytestmark = pytest.mark.root


def start_tap(gateway, *arguments, out):
    """``ipsecq tap`` beside the gateway; it captures when this returns."""
    process = gateway.space.popen(
        sys.executable, "-m", "ipsecq", "tap", "--config", str(gateway.config), "--out", str(out), *arguments,
        log=out.with_suffix(".log"),
    )  # fmt: skip
    wait_for(lambda: out.exists() and out.stat().st_size >= 28, "the capture's first block")
    return process


@contextmanager
def tapped(gateway, out, *arguments):
    process = start_tap(gateway, *arguments, out=out)
    yield
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0, out.with_suffix(".log").read_text()


def tshark(file, *fields, display="", option=()):
    """The fields of each packet, as tuples of text."""
    command = ["tshark", "-n", "-r", str(file), *option, "-T", "fields", *[word for name in fields for word in ("-e", name)]]
    done = subprocess.run(
        [*command, *(["-Y", display] if display else [])], capture_output=True, text=True, check=True
    )
    return [tuple(line.split("\t")) for line in done.stdout.splitlines()]


def test_each_view_of_enc_is_what_the_manual_says_for_wireshark(tunnel_net, tmp_path, request):
    one, two = tunnel_net.network.sites
    gateway = tunnel_net.one
    spi_out, spi_in = (f"0x{tunnel_net.tunnel.spi_from(site, 4):08x}" for site in (one, two))
    gateway.command("sysctl", "net.enc.in.ipsec_bpf_mask=3")
    request.addfinalizer(lambda: gateway.command("sysctl", "net.enc.in.ipsec_bpf_mask=1"))
    views = [("before", "out"), ("after", "out"), ("before", "in"), ("after", "in")]
    files = [tmp_path / f"{view}-{way}.pcapng" for view, way in views]
    taps = [
        start_tap(gateway, "--view", view, "--dir", way, out=file)
        for (view, way), file in zip(views, files, strict=True)
    ]
    assert ping(one.host, two.host4, count=2) == 2
    for process in taps:
        process.send_signal(signal.SIGINT)
    for process, file in zip(taps, files, strict=True):
        assert process.wait(20) == 0
        assert "2 packets captured, 0 dropped" in file.with_suffix(".log").read_text()
    outer_out, outer_in = f"{one.wan4},{one.host4}", f"{two.wan4},{two.host4}"
    expected = [
        (spi_out, one.host4, "1", "8"), (spi_out, outer_out, "4,1", "8"),
        (spi_in, outer_in, "4,1", "0"), (spi_in, two.host4, "1", "0"),
    ]  # fmt: skip
    for file, (spi, src, protocols, kind) in zip(files, expected, strict=True):
        rows = tshark(file, "enc.spi", "enc.flags", "ip.src", "ip.proto", "icmp.type")
        assert rows == [(spi, "0x00000c00", src, protocols, kind)] * 2, file.name


def test_tshark_and_tcpdump_read_ipv6_from_the_tap(tunnel_net, tmp_path):
    one, two = tunnel_net.network.sites
    file = tmp_path / "six.pcapng"
    with tapped(tunnel_net.one, file, "--dir", "out"):
        assert ping(one.host, two.host6, count=2) == 2
    assert tshark(file, "frame.protocols", display="icmpv6") == [
        ("enc:ipv6:icmpv6:data",), ("enc:ipv6:ipv6:icmpv6:data",),
    ] * 2  # fmt: skip
    text = subprocess.run(["tcpdump", "-nr", str(file)], capture_output=True, text=True, check=True)
    assert text.stdout.count(f"IP6 {one.host6} > {two.host6}: ICMP6, echo request") == 4
    assert "ENC" in text.stderr


def test_a_tap_of_one_sa_sees_that_one_and_stops_after_the_packets_that_were_asked_for(tunnel_net, tmp_path):
    one, two = tunnel_net.network.sites
    file = tmp_path / "one.pcapng"
    spi = f"0x{tunnel_net.tunnel.spi_from(two, 4):08x}"
    process = start_tap(tunnel_net.one, "--spi", spi, "--count", "2", "-s", "20", out=file)
    assert ping(one.host, two.host6, count=1) == 1
    assert ping(one.host, two.host4, count=3) == 3
    assert process.wait(20) == 0
    assert tshark(file, "enc.spi", "frame.cap_len") == [(spi, "32")] * 2


def test_a_reader_that_does_not_read_loses_packets_and_nobody_else_does(tunnel_net, tmp_path):
    one, two = tunnel_net.network.sites
    gateway = tunnel_net.one
    file = tmp_path / "slow.pcapng"
    process = start_tap(gateway, "--dir", "out", "--view", "before", "--share", "100", out=file)
    process.send_signal(signal.SIGSTOP)
    assert tcp(one.host, two.host, two.host4, 60_000_000).digest_matches
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    said = file.with_suffix(".log").read_text().split()
    captured, dropped = int(said[0]), int(said[3])
    assert captured > 100
    assert dropped > 100
    assert gateway.status()["counters"]["tap_dropped"] >= dropped
    statistics = subprocess.run(["capinfos", "-c", str(file)], capture_output=True, text=True, check=True).stdout
    assert str(captured) in statistics.replace(",", "")


def test_a_worker_that_dies_comes_back_into_the_capture(tunnel_net, tmp_path):
    one, two = tunnel_net.network.sites
    gateway = tunnel_net.one
    file = tmp_path / "again.pcapng"
    with tapped(gateway, file, "--view", "before", "--dir", "out"):
        before = gateway.workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not set(gateway.workers()) & {0, *before}, "new workers")
        wait_for(lambda: ping(one.host, two.host4, count=1, wait=1), "a reply", 20)
    assert ("8",) in tshark(file, "icmp.type")


def test_inner_traffic_is_for_root_alone(tunnel_net):
    path = tunnel_net.one.directory / "run" / "tap"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.chdir(path.parent)
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        try:
            TapClient(Path("tap"))
            os.write(writer, b"let in")
        except DaemonError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    path.chmod(0o600)
    assert os.read(reader, 1000) == b"tap: only root may"


@pytest.mark.parametrize(("request_", "message"), [
    ({"view": "after", "dir": "in"}, "net.enc.in.ipsec_bpf_mask=1 hides"),
    ({"view": "sideways"}, "expected before or after"),
    ({"snaplen": 0}, "expected 1 to 262144"),
    ({"spi": ["0x1"]}, "expected a list of numbers"),
])  # fmt: skip
def test_a_capture_that_would_be_empty_is_refused_with_the_reason(tunnel_net, request_, message):
    with pytest.raises(DaemonError, match=message):
        TapClient(tunnel_net.one.directory / "run" / "tap", **request_)


def test_tcpdump_on_enc0_sees_inner_packets_both_ways_under_the_mask(tunnel_net):
    one, two = tunnel_net.network.sites
    gateway = tunnel_net.one
    seen = {}
    with Capture(one.gateway, "enc0", expression="icmp or icmp6") as capture:

        def rows():
            capture.settle()
            return tshark(capture.path, "ip.src", "ipv6.src")

        def mirrored():
            return ping(one.host, two.host4, count=1, wait=1) and (one.host4, "") in rows()

        gateway.command("sysctl", "net.enc.out.ipsec_bpf_mask=3")
        wait_for(mirrored, "the gateway to notice the capture", 20)
        for mask in (3, 2):
            gateway.command("sysctl", f"net.enc.out.ipsec_bpf_mask={mask}")
            before = len(rows())
            for version in (4, 6):
                assert ping(one.host, two.host_address(version), count=5) == 5
            seen[mask] = rows()[before:]
    gateway.command("sysctl", "net.enc.out.ipsec_bpf_mask=3")
    for mask, ways in ((3, {one.host4, two.host4, one.host6, two.host6}), (2, {two.host4, two.host6})):
        assert {source for row in seen[mask] for source in row if source} == ways
    assert seen[2] == [(two.host4, "")] * 5 + [("", two.host6)] * 5


def test_what_is_shown_on_enc0_stays_there(tunnel_net):
    """No loop: what the mirror sends into enc0 is read and dropped, and is not another packet of the flow."""
    one, two = tunnel_net.network.sites
    device = Path("/sys/class/net/enc0/statistics/tx_packets")
    before = int(one.gateway.run("cat", str(device)).stdout)
    with open(os.devnull, "wb") as sink:
        process = subprocess.Popen(one.gateway.argv(["tcpdump", "-i", "enc0", "-w", "-"]), stdout=sink, stderr=sink)
        wait_for(lambda: one.gateway.call(lambda: is_captured("enc0")), "a packet socket on enc0")
        wait_for(
            lambda: ping(one.host, two.host4, count=1, wait=1)
            and int(one.gateway.run("cat", str(device)).stdout) > before, "a packet sent into enc0",
        )  # fmt: skip
        sent = tunnel_net.one.metric("ipsecq_protocol_packets_total", protocol="esp", direction="out")
        assert ping(one.host, two.host4, count=5) == 5
        assert tunnel_net.one.metric("ipsecq_protocol_packets_total", protocol="esp", direction="out") == sent + 5
        stop(process)
    assert tunnel_net.one.status()["counters"].get("inject_failed", 0) == 0
