"""ipsecq top without a terminal: a screen that 80 columns hold."""

import curses
import os
import pty
import select
import sys

import pytest
from live_samples import sa, sample, worker

from ipsecq.cli import top as command
from ipsecq.cli import top_screen
from ipsecq.cli.top_screen import Choices, amount, shorten
from ipsecq.errors import IpsecqError
from ipsecq.metrics import rates


def text(view, choices=None, **shape):
    return [line for _, line in top_screen.lines(view, choices or Choices(), **shape)]


def test_alarms_come_first():
    tunnel = {"local": "192.0.2.1", "peer": "198.51.100.1", "up": False, "missing": "no outbound ESP SA", "networks": []}
    now = sample(fail_open=2, success=False, tunnels=[tunnel], workers=[worker(0, 0, 0, up=False)])
    shown = "\n".join(text(rates.view(now, now)))
    for alarm in ("FAIL OPEN: 2 policies", "TUNNEL DOWN: 192.0.2.1 - 198.51.100.1: no outbound", "WORKER 0 DOWN", "refused"):
        assert alarm in shown


PEERS = ["198.51.100.1", "2001:db8:1234:5678:9abc:def0:1234:5678"]


@pytest.mark.parametrize("peers", [False, True])
@pytest.mark.parametrize("scale", [1, 10**4, 10**9, 10**13])
def test_no_line_is_longer_than_80_columns_and_no_column_runs_into_the_next(peers, scale):
    before = sample(sas=[sa(n, 0, 0) for n in range(30)], workers=[worker(n, 0, 0) for n in range(20)])
    now = sample(
        1001.0, packets=scale, drops=[("ipcomp_badkcr", scale)],
        sas=[sa(n, scale, 99 * scale, peer=PEERS[n % 2], bad=scale, problem="x" * n) for n in range(30)],
        workers=[worker(n, 0.99, scale, lost=scale) for n in range(20)],
    )  # fmt: skip
    lines = text(rates.view(before, now), Choices(peers=peers))
    assert max(map(len, lines)) <= 80
    table = lines[-1:] if peers else lines[-30:]
    assert {len(line.split()) for line in table} == ({7} if peers else {9})


@pytest.mark.parametrize("height", [1, 5, 24, 100])
def test_a_screen_is_as_high_as_the_terminal_and_ends_with_the_keys(height):
    now = sample(sas=[sa(n, 0, 0) for n in range(50)], workers=[worker(0, 0, 0)])
    lines = text(rates.view(now, now), height=height)
    assert len(lines) == height
    assert lines[-1].startswith("q quit")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.04, "0.0"), (0.25, "0.2"), (9.94, "9.9"), (12.6, "13"), (999, "999"), (1000, "1.0k"), (9960, "10k"),
     (999_400, "999k"), (999_600, "1.0M"), (1.5e9, "1.5G"), (1e15, "1000T")],
)  # fmt: skip
def test_amounts_are_short(value, shown):
    assert amount(value) == shown


def test_long_addresses_keep_both_ends():
    assert shorten("2001:db8:1234:5678:9abc:def0:1234:5678", 20) == "2001:db8:…:1234:5678"
    assert shorten("192.0.2.1", 20) == "192.0.2.1"


# -- terminals -------------------------------------------------------------------------------------------------------


class Always:
    """A source whose view never changes."""

    def look(self):
        return rates.view(sample(), sample(1001.0))


def on_a_terminal(function):
    """Run ``function`` in a child on a terminal of its own, press q until it ends; (exit status, output)."""
    child, terminal = pty.fork()
    if not child:
        status = 1
        try:
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # not pytest's
            function()
            status = 0
        finally:
            os._exit(status)
    output = b""
    while True:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                octets = os.read(terminal, 4096)
            except OSError:  # the child has closed it
                break
            if not octets:
                break
            output += octets
        else:
            os.write(terminal, b"q")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


@pytest.mark.parametrize("term", ["dumb", "vt100", "xterm"])
def test_a_terminal_that_can_do_little_is_enough(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    status, output = on_a_terminal(lambda: curses.wrapper(command._live, Always(), Choices(), 3600.0))
    assert status == 0, output
    assert b"ipsecq" in output


@pytest.mark.parametrize("term", ["", "no-such-terminal"])
def test_a_terminal_that_nobody_knows_is_one_line(monkeypatch, tmp_path, term):
    (tmp_path / "ipsecq.toml").write_text("")
    monkeypatch.setenv("TERM", term)

    def run():
        with pytest.raises(IpsecqError, match=r"the terminal '.*' \(TERM\) is not known here: use --once or --json"):
            command.top(config=tmp_path / "ipsecq.toml")

    status, output = on_a_terminal(run)
    assert status == 0, output
