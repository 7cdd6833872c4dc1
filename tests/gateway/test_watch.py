"""Watching two live gateways: events, the terminal view, Prometheus with our dashboard, the status page in a browser."""

import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from fcntl import ioctl
from termios import TIOCSWINSZ

import pyte
import pytest
from dashboard import CONTRIB, filled, panels
from world import started

from ipsecq.lab.gateway import METRICS_PORT, Gateway, Tunnel, start_all
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.topology import build
from ipsecq.lab.traffic import ping

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def pair():
    """Two gateways, and an echo request from host to host ten times a second."""
    with Lab() as lab:
        network = build(lab)
        tunnel = Tunnel(network)
        tunnel.lines = [line.replace("-m tunnel", "-m tunnel -lh 86400 -ls 80000") for line in tunnel.lines]
        gateways = [Gateway(site.gateway, tunnel.setkey(site), listen="0.0.0.0") for site in network.sites]
        start_all(gateways)
        started[:] = gateways
        one, two = network.sites
        for version in (4, 6):
            one.host.popen("ping", "-n", "-q", "-i", "0.1", two.host_address(version), log=lab.directory / f"ping{version}")
        wait_for(lambda: gateways[0].metric("ipsecq_sa_packets_total") > 0, "traffic")
        yield network, gateways


def argv(gateway, *words):
    return gateway.space.argv((sys.executable, "-m", "ipsecq", *words, "--config", str(gateway.config)))


# -- ipsecq monitor --------------------------------------------------------------------------------------------------


class Monitor:
    """``ipsecq monitor --json`` with what it said so far."""

    def __init__(self, gateway, *options):
        self.process = subprocess.Popen(argv(gateway, "monitor", *options), stdout=subprocess.PIPE, text=True)
        self.lines = []
        threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True).start()

    def __enter__(self):
        wait_for(lambda: self.lines, "the greeting")
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()

    def saw(self, event, timeout=20.0, **fields):
        return wait_for(lambda: self.all(event, **fields), f"{event} {fields}", timeout)[0]

    def all(self, event, **fields):
        told = map(json.loads, list(self.lines))
        return [each for each in told if each["event"] == event and fields.items() <= each.items()]


def setkey(gateway, text):
    subprocess.run(argv(gateway, "setkey", "-c"), input=text, text=True, check=True, timeout=60)


def test_monitor_tells_of_sas_limits_acquires_drops_reloads_workers_and_tunnels(pair):
    network, (gateway, _) = pair
    one = network.one
    ends = f"{one.wan4} 203.0.113.9"
    with Monitor(gateway, "--json") as monitor:
        hello = json.loads(monitor.lines[0])
        assert (hello["event"], hello["workers"], hello["fail_open_policies"]) == ("hello", 2, 0)

        setkey(
            gateway, f"add {ends} esp 0x5001 -m tunnel -lh 6 -ls 1 -E aes-gcm-16 0x{'ab' * 20};"
            "spdadd 10.1.0.0/24 10.77.0.0/24 any -P out ipsec "
            f"esp/tunnel/{ends.replace(' ', '-')}/require;",
        )  # fmt: skip
        added = monitor.saw("sa_added", spi="0x00005001")
        assert (added["protocol"], added["mode"], added["direction"], added["dst"]) == (
            "esp", "tunnel", "out", "203.0.113.9",
        )  # fmt: skip
        assert monitor.saw("policy_added")["policy"].startswith("spdadd 10.1.0.0/24")
        monitor.saw("sa_expired", spi="0x00005001", limit="soft")
        monitor.saw("sa_expired", spi="0x00005001", limit="hard")
        monitor.saw("tunnel_down", peer="203.0.113.9", missing="no outbound ESP SA")
        ping(one.host, "10.77.0.1", count=1, wait=0.2)
        assert monitor.saw("acquire", dst="203.0.113.9")["protocol"] == "esp"

        # ESP with an SPI that nobody has.
        one.host.call(lambda: _send_esp(one.gateway4))
        assert monitor.saw("drops", reason="esp_notdb")["meaning"] == "ESP: no SA for its SPI"
        # They are one event, or two when the look at the counters fell between them.
        wait_for(lambda: sum(each["count"] for each in monitor.all("drops", reason="esp_notdb")) == 3, "three drops")

        gateway.command("reload")
        assert monitor.saw("reload", success=True)
        os.kill(gateway.workers()[1], signal.SIGKILL)
        assert monitor.saw("worker_restart", worker=1)["ended"] == "SIGKILL"
        setkey(gateway, "spddelete 10.1.0.0/24 10.77.0.0/24 any -P out; ")
        monitor.saw("policy_deleted")
        assert "abab" not in "".join(monitor.lines)
    with Monitor(gateway, "-e", "hello") as words:
        assert "hello" in words.lines[0]
        assert "version" in words.lines[0]


def _send_esp(address):
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ESP) as sock:
        for number in range(3):
            sock.sendto(struct.pack(">II", 0x7777, number + 1) + bytes(60), (address, 0))


# -- ipsecq top ------------------------------------------------------------------------------------------------------


class Terminal:
    """A terminal of 80 columns and 24 lines with a program in it."""

    def __init__(self, words):
        self.screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self.screen)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", LC_ALL="C.UTF-8")
            os.execvp(words[0], words)
        ioctl(self.fd, TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def shows(self, *texts):
        def seen():
            while select.select([self.fd], [], [], 0)[0]:
                self._stream.feed(os.read(self.fd, 65536))
            shown = "\n".join(self.screen.display)
            return all(text in shown for text in texts)

        wait_for(seen, f"{texts} in\n" + "\n".join(self.screen.display), 15)
        return self.screen.display

    def press(self, keys):
        os.write(self.fd, keys.encode())

    def status(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_top_shows_rates_in_80_columns_and_takes_keys(pair):
    network, (gateway, _) = pair
    terminal = Terminal(argv(gateway, "top", "-d", "0.5"))
    spi = f"0x{Tunnel.spi + 16 + 4:08x}"
    shown = terminal.shows("ipsecq", "pkt/s", spi, network.two.wan4, "mature", "q quit")
    row = next(line for line in shown if spi in line)
    assert row.split()[:4] == ["out", "esp", spi, network.two.wan4]
    wait_for(lambda: 8 <= float(next(line for line in terminal.shows(spi) if spi in line).split()[4]) <= 12, "10 a second")
    terminal.press("p")
    terminal.shows("s SAs")
    terminal.press("a")
    terminal.shows("sort: peer")
    shown = terminal.shows("sort: peer")
    below = shown[next(at for at, line in enumerate(shown) if line.startswith("peer")) + 1 :]
    assert below[0].split()[:2] == ["in", network.two.wan4]
    terminal.press(" ")
    terminal.shows("space go on")
    terminal.press("q")
    assert terminal.status() == 0


def test_top_for_scripts(pair):
    _, (gateway, _) = pair
    text = gateway.command("top", "--once", "-d", "0.5").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "bit/s" in text
    views = [json.loads(line) for line in gateway.command("top", "--json", "-n", "2", "-d", "3").stdout.splitlines()]
    assert len(views) == 2
    assert {flow["direction"] for flow in views[0]["sas"]} == {"in", "out"}
    assert all(flow["packets"] > 0 for flow in views[1]["sas"])
    assert [worker["up"] for worker in views[0]["workers"]] == [True, True]
    refused = gateway.command("top", check=False)
    assert (refused.returncode, refused.stderr) == (1, "ipsecq: top: the output is no terminal: use --once or --json\n")


# -- Prometheus, with what is in contrib/ ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus(pair):
    """Asks a real Prometheus in gateway 1 that scrapes both gateways once a second: ``prometheus(path) -> data``."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is missing: apt-get install prometheus")
    network, (gateway, _) = pair
    directory = network.lab.directory / "prometheus"
    shutil.copytree(CONTRIB / "prometheus", directory)
    config = directory / "prometheus.yml"
    targets = f"- 127.0.0.1:{METRICS_PORT}\n          - {network.two.wan4}:{METRICS_PORT}"
    text = config.read_text().replace("15s", "1s").replace("- 127.0.0.1:9814", targets)
    config.write_text(text)
    gateway.space.popen(
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory}/data",
        "--web.listen-address=127.0.0.1:9090", "--log.level=warn", log=directory / "log",
    )  # fmt: skip

    def ask(path, **parameters):
        def fetch():
            url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return json.load(answer)["data"]
            except (ConnectionError, urllib.error.URLError):
                return None

        return gateway.space.call(fetch)

    def value(query):
        data = ask("query", query=query)
        return data["result"] if data else []

    wait_for(lambda: len(value("up{job='ipsecq'} == 1")) == 2, "both gateways up", 20)
    return ask, value


def test_every_panel_of_the_dashboard_has_data(pair, prometheus):
    network, _ = pair
    _, value = prometheus
    wait_for(lambda: len(value("rate(ipsecq_bytes_total[5s])")) == 4, "rates", 10)
    left = {(title, filled(query)) for title, queries in panels() for query in queries}

    def all_answered():
        for each in sorted(left):
            if value(each[1]):
                left.discard(each)
        return not left

    wait_for(all_answered, f"data for {left}", 15, every=1.0)
    flows = value(filled('sum by (peer) (rate(ipsecq_peer_packets_total{job=~"$job",direction="out"}[$__rate_interval]))'))
    rates = {flow["metric"]["peer"]: float(flow["value"][1]) for flow in flows}
    assert rates[network.one.wan4] > 0
    assert rates[network.two.wan4] > 0


def test_a_missing_sa_is_an_alert_and_the_rules_record(pair, prometheus):
    network, (gateway, _) = pair
    ask, value = prometheus
    groups = ask("rules")["groups"]
    assert [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "err"] == []
    policy = "10.1.0.0/24 10.88.0.0/24 any -P out"
    setkey(gateway, f"spdadd {policy} ipsec esp/tunnel/{network.one.wan4}-203.0.113.8/require;")
    try:
        alert = 'ALERTS{alertname="IpsecqTunnelDown",peer="203.0.113.8"}'
        (found,) = wait_for(lambda: value(alert), "the alert", 10)
        assert found["metric"]["alertstate"] == "pending"
        assert value("ipsecq:worker_utilisation:ratio")
    finally:
        setkey(gateway, f"spddelete {policy};")
    wait_for(lambda: not value(f"{alert} offset 0s"), "its end", 10)


# -- the status page in a browser ------------------------------------------------------------------------------------

CHROMIUM = (
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--virtual-time-budget=4000", "--window-size=1280,1400",
)  # fmt: skip


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is missing: apt-get install chromium")
@pytest.mark.parametrize("output", ["--dump-dom", "--screenshot"])
def test_the_status_page_shows_the_gateway_in_a_browser(pair, tmp_path, output):
    network, (gateway, _) = pair
    picture = tmp_path / "page.png"
    done = gateway.space.run(
        *CHROMIUM, f"--user-data-dir={tmp_path}/profile", output if output == "--dump-dom" else f"{output}={picture}",
        f"http://127.0.0.1:{METRICS_PORT}/",
    )  # fmt: skip
    assert re.findall(r".*CONSOLE.*", done.stderr) == []
    if output == "--screenshot":
        octets = picture.read_bytes()
        assert octets.startswith(b"\x89PNG")
        assert struct.unpack(">II", octets[16:24]) == (1280, 1400)
        assert len(octets) > 50_000  # a page without text is a few thousand
        return
    shown = done.stdout
    text = re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", shown))
    assert "all 2 tunnels up" in text
    for each in (network.two.wan4, network.two.wan6, network.two.lan4, network.one.lan6, f"0x{Tunnel.spi + 16 + 4:08x}"):
        assert each in text
    assert shown.count('class="up"') == 2
    # Figures, not dashes: the page has asked again.  (Its clock is faster than ours, so they may be small.)
    assert len(re.findall(r"↓ [\d.]+ k?bit/s   ↑ [\d.]+ k?bit/s", text)) == 2
    assert "mature" in text
