"""What a process has given up, it cannot have again.  Each test runs in a process of its own."""

import os
import resource
import subprocess
import sys
import time

import pytest

from ipsecq.daemon import privileges

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def in_child(code):
    prelude = "from ipsecq.daemon import privileges as p; import os, subprocess, sys\n"
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


CAPS = "print(*[l.split()[1] for l in open('/proc/self/status') if l[:3] == 'Cap' or l[:10] == 'NoNewPrivs'])\n"
TWO = f"{1 << 12 | 1 << 13:016x}"


@root
def test_only_the_named_capabilities_stay():
    inheritable, permitted, effective, bounding, ambient, no_new = in_child("p.keep_capabilities([12, 13])\n" + CAPS)
    assert (inheritable, permitted, effective, bounding, ambient, no_new) == (TWO, TWO, TWO, TWO, TWO, "1")


@root
def test_programs_that_it_starts_have_no_more():
    show = "subprocess.run(['grep', 'CapEff', '/proc/self/status'], check=True)\n"
    assert in_child("p.keep_capabilities([12, 13])\n" + show)[1] == TWO


@root
def test_capabilities_cannot_come_back():
    code = "p.keep_capabilities([12, 13])\np.keep_capabilities([12])\np.keep_capabilities([12, 13, 21])\n"
    assert in_child(code + CAPS)[2] == f"{1 << 12:016x}"


@root
def test_another_user_keeps_them_for_nft():
    """As under systemd: ambient capabilities, no root."""
    code = (
        "import ctypes\n"
        "p._prctl(8, 1)\n"  # PR_SET_KEEPCAPS
        "os.setgid(65534); os.setuid(65534)\n"
        "p.keep_capabilities([12, 13])\n"
        "subprocess.run(['grep', 'CapEff', '/proc/self/status'], check=True)\n"
    )
    assert in_child(code)[1] == TWO


def test_memory_is_not_dumped():
    code = "p.forbid_dumps()\nimport resource; print(*resource.getrlimit(resource.RLIMIT_CORE), p._prctl(3))\n"
    assert in_child(code) == ["0", "0", "0"]


def test_a_child_dies_with_its_parent():
    child = "from ipsecq.daemon import privileges as p; import sys, time; p.die_with_parent(int(sys.argv[1])); "
    child += "print('up', flush=True); time.sleep(120)"
    code = (
        f"c = subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], stdout=subprocess.PIPE,"
        " stderr=subprocess.DEVNULL)\n"
        "c.stdout.readline(); print(c.pid)\n"
    )
    pid = int(in_child(code)[0])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    pytest.fail("the child lives on")


def test_an_orphan_does_not_start():
    code = (
        "from ipsecq.errors import DaemonError\n"
        "try:\n    p.die_with_parent(1 if os.getppid() != 1 else 2)\n"
        "except DaemonError as error:\n    print(error)\n"
    )
    assert in_child(code) == ["the", "supervisor", "is", "gone"]


def test_memory_is_locked_only_without_a_limit():
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        assert in_child("print(p.lock_memory())") == ["True"]
    else:
        assert privileges.lock_memory() is False
