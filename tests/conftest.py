"""What every test gets: a time limit, and a skip with its reason where root or User-Mode Linux is missing."""

from __future__ import annotations

import compileall
import os
import signal
import subprocess
import sys
from pathlib import Path

import late
import pytest
from hypothesis import settings

from ipsecq.lab import uml

DEFAULT_SECONDS = 120
STALLS = Path(__file__).parent / "helpers" / "stalls.py"
PACKAGE = Path(__file__).parents[1] / "ipsecq"

# How long an example takes says something about the machine's other work, not about us.
settings.register_profile("ipsecq", deadline=None)
settings.load_profile("ipsecq")


def pytest_addoption(parser):
    parser.addoption("--stalls", type=int, metavar="SEED", help="stop processes of the run, two seconds each: stalls.py")
    parser.addoption("--late", choices=late.SIDES, help="make one side of every test late: tests/helpers/late.py")


def pytest_configure(config):
    # A shell that starts us in the background has SIGINT ignored, and everything that we start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where PYTHONDONTWRITEBYTECODE is set, each of some thousand processes to come would compile all that it imports.
    compileall.compile_dir(PACKAGE, quiet=2)
    config.addinivalue_line("markers", "seconds(n): time limit of this test, fixtures included (default 120)")
    if side := config.getoption("--late"):
        late.begin(side)
    if (seed := config.getoption("--stalls")) is not None:
        argv = [sys.executable, STALLS, str(os.getpid()), str(seed), config.rootpath / "build" / "stalls.log"]
        config.add_cleanup(subprocess.Popen(argv).terminate)


def pytest_collection_modifyitems(items):
    no_root = "" if os.geteuid() == 0 else "needs root: namespaces and netfilter"
    no_uml = uml.missing()
    for item in items:
        if no_root and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason=no_root))
        if no_uml and item.get_closest_marker("uml"):
            item.add_marker(pytest.mark.skip(reason=no_uml))


def pytest_ignore_collect(collection_path, config):
    """tests/system is `make test-system`: minutes, and a machine in QEMU; it runs when it is asked for."""
    wanted = any("tests/system" in argument for argument in config.invocation_params.args)
    return True if collection_path.name == "system" and collection_path.is_dir() and not wanted else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that hangs is a test that fails, and its fixtures still clean up."""
    marker = item.get_closest_marker("seconds")
    seconds = marker.args[0] if marker else DEFAULT_SECONDS

    def expire(number, frame):
        raise TimeoutError(f"{item.nodeid} took longer than {seconds} s")

    old = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
