"""The lab leaves nothing behind: no namespace, no process, no file, whatever ends it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ipsecq.lab.netns import Lab, LabError, sweep, wait_for

pytestmark = pytest.mark.root

PROGRAM = """
import sys, time
from ipsecq.lab.netns import Lab
with Lab() as lab:
    space = lab.namespace("one")
    process = space.popen("sleep", "1000")
    print(space.name, process.pid, lab.directory, flush=True)
    if sys.argv[1] == "raise":
        raise ValueError("on purpose")
    if sys.argv[1] == "return":
        sys.exit(0)
    time.sleep(1000)
"""


def start(how):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    name, pid, directory = process.stdout.readline().split()
    return process, Path("/run/netns") / name, Path("/proc") / pid, Path(directory)


@pytest.mark.parametrize(
    ("how", "number", "status"),
    [
        ("return", None, 0),
        ("raise", None, 1),
        ("wait", signal.SIGINT, -signal.SIGINT),
        ("wait", signal.SIGTERM, 128 + signal.SIGTERM),
    ],
    ids=["return", "exception", "ctrl-c", "sigterm"],
)
def test_the_lab_cleans_up_after(how, number, status):
    process, *traces = start(how)
    if number is not None:
        process.send_signal(number)
    assert process.wait(20) in (status, 130 if number == signal.SIGINT else status)
    assert [str(trace) for trace in traces if trace.exists()] == []


STUBBORN = """
import sys
from ipsecq.lab.netns import Lab
with Lab() as lab:
    space = lab.namespace("one")
    process = space.popen("sleep", "1000")
    def closer():
        print("closing", flush=True)
        sys.stdin.readline()
    lab.on_close(closer)
    print(space.name, process.pid, lab.directory, flush=True)
    sys.stdin.readline()
"""


def test_ctrl_c_again_while_the_lab_cleans_up_does_not_break_it_off():
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    name, pid, directory = process.stdout.readline().split()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "closing\n"
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(60) in (-signal.SIGINT, 130)
    traces = Path("/run/netns") / name, Path("/proc") / pid, Path(directory)
    assert [str(trace) for trace in traces if trace.exists()] == []


def test_a_killed_labs_processes_end_and_the_next_lab_sweeps_its_namespaces():
    process, namespace, child, directory = start("wait")
    # Until setpriv has run, the kernel has not been asked to end the child with its parent.
    wait_for(lambda: (child / "cmdline").read_bytes().startswith(b"sleep"), "the child to be itself", 5)
    process.kill()
    process.wait()
    wait_for(lambda: not child.exists(), "the child to end with its lab", 5)
    sweep()
    assert not namespace.exists()
    assert not directory.exists()


def test_a_failing_command_is_an_error_with_its_output():
    with Lab() as lab, pytest.raises(LabError, match="No such file"):
        lab.namespace("one").run("cat", "/nonexistent")
