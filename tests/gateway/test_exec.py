"""``ipsecq exec`` with real programs: C, static and dynamic, threads, daemons, and Debian's iked."""

import collections
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from exec_program import PROBE, Server, command, run

from ipsecq.lab.netns import Lab, stop, wait_for
from ipsecq.numbers import Direction, Mode, SaState
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.seccomp import ARCHITECTURES, key_descriptors


@pytest.fixture(scope="module", params=["dynamic", "static"])
def probe(request, tmp_path_factory):
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text(PROBE)
    extra = ["-static"] if request.param == "static" else []
    subprocess.run(["gcc", "-w", "-pthread", *extra, "-o", folder / "probe", folder / "probe.c"], check=True)
    return folder / "probe"


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "pfkey.sock")
    yield made
    made.close()


GOOD = "type 7 errno 0 whole 1\ndump errno 2\n"


def test_a_program_speaks_pf_key_to_the_daemon(server, probe):
    done = run(server.path, probe, "speak")
    assert (done.returncode, done.stdout, done.stderr) == (0, GOOD, "")


def test_a_thread_and_child_processes_get_sockets_of_their_own(server, probe):
    assert run(server.path, probe, "thread").stdout == GOOD
    assert sorted(run(server.path, probe, "children").stdout.splitlines()) == sorted(GOOD.splitlines() * 4)


def test_a_shell_between_us_and_the_program_changes_nothing(server, probe):
    assert run(server.path, "sh", "-c", f"{probe} speak; {probe} speak").stdout == GOOD * 2


def test_flags_of_the_socket_are_what_was_asked_for_and_wrong_types_get_the_kernel_s_errno(server, probe):
    lines = run(server.path, probe, "flags").stdout.splitlines()
    assert lines == ["0 0 1 1", f"{errno.ESOCKTNOSUPPORT} {errno.EPROTONOSUPPORT}"]


def test_a_program_that_goes_to_the_background_is_served_there_and_its_status_comes_at_once(server, probe, tmp_path):
    out = tmp_path / "out"
    started = time.monotonic()
    assert run(server.path, probe, "daemon", out).returncode == 3
    assert time.monotonic() - started < 5
    deadline = time.monotonic() + 10
    while (not out.exists() or out.read_text() != GOOD) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert out.read_text() == GOOD
    while supervisors(server.path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert supervisors(server.path) == []


def supervisors(path):
    """Processes with our RUN and this path on their command line: the foreground and background supervisors."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(path).encode() in words and b"-c" in words:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("status", [0, 1, 77, 255])
def test_the_exit_status_is_the_program_s(server, probe, status):
    assert run(server.path, probe, "exit", status).returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT, signal.SIGPIPE])
def test_a_fatal_signal_of_the_program_is_ours_too(server, probe, number):
    assert run(server.path, probe, "die", int(number)).returncode == -number


def test_signals_that_are_sent_to_the_supervisor_reach_the_program(server, probe):
    with subprocess.Popen(command(server.path, probe, "catch"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
            assert process.stdout.readline() == f"{int(number)}\n"
        assert process.wait(10) == 5


def test_what_the_terminal_sends_reaches_the_program_once(server, probe):
    """A pseudo-terminal whose foreground group holds supervisor and program; its hang-up comes from the kernel."""
    import pty

    pid, terminal = pty.fork()
    if not pid:
        words = command(server.path, "sh", "-c", 'trap "echo got" INT; echo ready; read x; read y; echo end')
        os.execv(words[0], words)
    output = b""
    while b"ready" not in output:
        output += os.read(terminal, 1024)
    os.write(terminal, b"\x03")
    time.sleep(0.3)
    os.write(terminal, b"\n\n\n")
    while b"end" not in output:
        output += os.read(terminal, 1024)
    os.waitpid(pid, 0)
    os.close(terminal)
    assert output.count(b"got") == 1


def test_a_program_that_is_not_there_is_127_and_one_that_cannot_run_126(server, tmp_path):
    missing = run(server.path, tmp_path / "nothing")
    assert (missing.returncode, "No such file" in missing.stderr) == (127, True)
    (tmp_path / "plain").write_text("text")
    assert run(server.path, tmp_path / "plain").returncode == 126


def test_without_a_daemon_the_program_is_told_that_there_is_no_pf_key_and_the_operator_why(tmp_path, probe):
    done = run(tmp_path / "none.sock", probe, "speak")
    assert done.stdout == f"socket: {os.strerror(errno.EAFNOSUPPORT)}\n"
    assert "run 'ipsecq run' first" in done.stderr


def test_a_second_supervisor_says_who_has_the_listener(server, probe):
    done = run(server.path, *command(server.path, probe, "speak"))
    assert done.returncode == 100
    assert "another supervisor" in done.stderr


def test_a_filter_that_forbids_seccomp_is_named_in_the_error(server, probe, tmp_path):
    """As in a container whose profile has no seccomp: the system call itself fails with EPERM."""
    forbid = f"""
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
code = struct.pack("=HBBI", 0x20, 0, 0, 0)
code += struct.pack("=HBBI", 0x15, 0, 1, {ARCHITECTURES[os.uname().machine].seccomp})
code += struct.pack("=HBBI", 6, 0, 0, 0x00050001) + struct.pack("=HBBI", 6, 0, 0, 0x7fff0000)
buffer = ctypes.create_string_buffer(code, len(code))
header = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", forbid, *command(server.path, probe, "speak")],
                          capture_output=True, text=True, timeout=30, check=False)  # fmt: skip
    assert done.returncode == 100
    assert "forbids seccomp" in done.stderr


def test_socket_policies_reach_the_hook_with_the_program_s_own_socket(server, probe, tmp_path):
    log = tmp_path / "hook"
    value = PolicyExt(2, 2, requests=[Request(50, 1, 2)]).to_option()
    done = run(server.path, probe, "option", value.hex(), log=log, stdin=subprocess.DEVNULL)
    assert done.stdout.split() == [
        "0", str(errno.EPERM), str(errno.EFAULT), str(errno.EBADF), str(errno.ENOTSOCK), str(errno.EINVAL), "0"
    ]  # fmt: skip
    four, six = (json.loads(line) for line in log.read_text().splitlines())
    assert four[:4] == [0, 16, value.hex(), socket.AF_INET]
    assert four[4][0] == "127.0.0.1"
    assert four[5] is (os.geteuid() == 0)
    assert six[:4] == [41, 34, value.hex(), socket.AF_INET6]
    assert PolicyExt.from_option(bytes.fromhex(four[2])).requests == [Request(50, 1, 2)]


def test_without_a_daemon_s_hook_a_privileged_program_can_bypass_and_no_more(server, probe):
    bypass = PolicyExt(4, 2).to_option().hex()
    ipsec = PolicyExt(2, 2, requests=[Request(50, 1, 2)]).to_option().hex()
    allowed = 0 if os.geteuid() == 0 else errno.EACCES
    assert run(server.path, probe, "option", bypass).stdout.split()[:2] == [str(allowed)] * 2
    assert run(server.path, probe, "option", ipsec).stdout.split()[:2] == [str(errno.EOPNOTSUPP)] * 2


def test_a_program_that_waits_a_millisecond_for_its_reply_gets_it_from_a_daemon_that_takes_longer(probe, tmp_path):
    """As OpenBSD's iked does; the kernel's PF_KEY has replied when the request returns."""


    def later(release):
        threading.Timer(0.3, made.call, [lambda _: release()]).start()

    made = Server(tmp_path / "pfkey.sock", later)
    try:
        assert run(made.path, probe, "impatient").stdout.split() == ["1", "0"]
    finally:
        made.close()


@pytest.fixture
def slow_server(tmp_path):
    """One whose workers take their time, and have the changes in their order."""
    pending, timers = collections.deque(), []

    def later(release):
        pending.append(release)
        timers.append(threading.Timer(0.3, made.call, [lambda _: pending.popleft()()]))
        timers[-1].start()

    made = Server(tmp_path / "pfkey.sock", later)
    yield made
    for timer in timers:
        timer.join()
    made.close()


def test_a_program_that_never_waits_has_its_reply_whatever_it_sends_with(slow_server, probe):
    """As racoon does: its socket doesn't block, and what recv says at once is what it goes by."""
    assert run(slow_server.path, probe, "hasty").stdout.splitlines() == ["16 16 1 1"] * 4


def test_a_send_returns_though_somebody_else_has_read_the_reply(slow_server, probe):
    assert run(slow_server.path, probe, "reader").stdout == "16 7\n"


def test_a_send_returns_when_the_daemon_ends_meanwhile(probe, tmp_path):
    made = Server(tmp_path / "pfkey.sock", lambda release: asked.set())
    asked = threading.Event()
    with subprocess.Popen(command(made.path, probe, "hasty"), stdout=subprocess.PIPE, text=True) as process:
        assert asked.wait(60)
        made.close()
        # The supervisor tells the program, which has not asked for that, with SIGTERM.
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_other_files_may_have_the_numbers_of_pf_key_sockets_and_there_may_be_more_of_these(server, probe):
    numbers = key_descriptors()
    done = run(server.path, probe, "others", numbers[-1])
    assert done.stdout == f"1 1 1 {80 - len(numbers) + 1}\n{GOOD}"


def test_a_program_with_few_files_is_served_without_numbers_of_their_own(server, probe):
    assert run(server.path, probe, "speak", preexec_fn=lambda: limit_files(100)).stdout == GOOD
    # One that lowers its limit when the filter is there.
    assert run(server.path, "sh", "-c", f"ulimit -n 100; {probe} speak").stdout == GOOD


def limit_files(number):
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def test_short_polls_of_other_files_leave_nothing_open_in_the_supervisor(server, probe):
    words = command(server.path, probe, "polls")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "polled\n"
        left = len(os.listdir(f"/proc/{process.pid}/fd"))
        process.stdin.close()
    assert left < 50


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_user_without_privileges_is_served_with_no_new_privs(probe, tmp_path):
    for parent in (*Path(probe).parents[:3], *tmp_path.parents[:3], tmp_path):
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    made = Server(tmp_path / "pfkey.sock")
    try:
        # The file lets this user in, the credentials don't: its socket is closed at once, but it has one.
        os.chown(made.path, 65534, -1)
        user = ["setpriv", "--reuid", "65534", "--clear-groups", "--regid", "65534"]
        words = [*user, *command(made.path, "sh", "-c", f"grep NoNewPrivs /proc/self/status; {probe} flags")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, cwd="/",
                              env={**os.environ, "PYTHONPATH": os.getcwd()})  # fmt: skip
        assert done.stdout.splitlines()[:2] == ["NoNewPrivs:\t1", "0 0 1 1"], done.stderr
    finally:
        made.close()
    made = Server(tmp_path / "root.sock")
    try:
        assert run(made.path, "grep", "NoNewPrivs", "/proc/self/status").stdout.split()[1] == "0"
    finally:
        made.close()


@pytest.mark.slow
def test_other_system_calls_cost_next_to_nothing(server, probe):
    """200,000 socket() and close() of another family: the filter is a few instructions, no round trip to us."""

    def seconds(words):
        started = time.monotonic()
        subprocess.run(words, check=True)
        return time.monotonic() - started

    words = command(server.path, probe, "exit", "0"), [probe, "calls"], command(server.path, probe, "calls")
    # In turns, so that what slows the machine down for a while slows down all three.
    base, alone, served = map(min, zip(*(map(seconds, words) for _ in range(5)), strict=True))
    assert served - base < 2 * alone + 0.2


class IkePeer:
    """One host with iked under ``ipsecq exec``, and the databases that it fills."""

    def __init__(self, host, number, folder, child):
        other = 3 - number
        self.server = Server(folder / f"pfkey{number}.sock")
        self.log = folder / f"iked{number}.log"
        configuration = folder / f"iked{number}.conf"
        configuration.write_text(
            f'ikev2 "test" {"active" if number == 1 else "passive"} esp from 10.{number}.0.0/24 to 10.{other}.0.0/24 '
            f'local 192.0.2.{number} peer 192.0.2.{other} {child} '
            f'srcid host{number} dstid host{other} psk "mekmitasdig"\n'
        )
        configuration.chmod(0o600)
        control = folder / f"control{number}"
        words = ["iked", "-dvv", "-s", str(control), "-f", str(configuration)]
        self.process = host.popen(*command(self.server.path, *words), log=self.log)

    @property
    def sas(self):
        return {sa.spi: sa for sa in self.server.database.sad.dump() if sa.state is SaState.MATURE}

    @property
    def policies(self):
        return {(policy.direction, policy.selector.src_first[1]) for policy in self.server.database.spd.dump()}


@pytest.mark.root
@pytest.mark.skipif(not shutil.which("iked"), reason="needs Debian's openiked")
@pytest.mark.parametrize(
    ("encryption", "authentication"),
    # What Debian's iked has on Linux: neither HMAC-SHA2-256 (old kernels cut it to 96 bits) nor AES-GCM, which af_key
    # cannot carry.
    [("aes-256", "hmac-sha2-512"), ("aes-128", "hmac-sha1")],
)
def test_two_unmodified_ikeds_negotiate_rekey_and_delete_over_our_pf_key(tmp_path, encryption, authentication):
    with Lab() as lab:
        hosts = [lab.namespace("one"), lab.namespace("two")]
        lab.link(hosts[0], "wire", hosts[1], "wire")
        for number, host in enumerate(hosts, start=1):
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", "wire", "up")
            host.run("ip", "address", "add", f"192.0.2.{number}/24", "dev", "wire")
        child = f"childsa enc {encryption} auth {authentication}"
        peers = [IkePeer(host, number, tmp_path, child) for number, host in reversed(list(enumerate(hosts, start=1)))]
        try:
            wait_for(lambda: all(len(peer.sas) == 2 for peer in peers), "an SA each way at both ends", 20)
            one, two = (peer.sas for peer in peers)
            assert sorted(one) == sorted(two)
            for spi, sa in one.items():
                other = two[spi]
                assert (sa.src, sa.dst) == (other.src, other.dst)
                assert (sa.encryption, sa.authentication) == ("aes-cbc", authentication)
                assert sa.encryption_key.bits == int(encryption[4:])
                assert (sa.encryption_key, sa.authentication_key) == (other.encryption_key, other.authentication_key)
                assert (sa.mode, sa.replay_window) == (Mode.TUNNEL, 64)
            wait_for(lambda: all(len(peer.policies) == 2 for peer in peers), "policies at both ends", 5)
            assert peers[0].policies == {(Direction.OUT, 2), (Direction.IN, 1)}
            assert peers[1].policies == {(Direction.OUT, 1), (Direction.IN, 2)}
            for peer in peers:
                assert "failed to bypass" not in peer.log.read_text()

            # A soft limit is reached: iked makes new SAs, then deletes the old ones.
            first = next(iter(one.values()))
            peers[0].server.call(lambda sockets: sockets.send(sockets.server.expire(first, hard=False)))
            wait_for(lambda: all(len(peer.sas) == 2 and not set(peer.sas) & set(one) for peer in peers), "a rekey", 20)
            assert sorted(peers[0].sas) == sorted(peers[1].sas)
        finally:
            for peer in peers:
                stop(peer.process)
                left = len(peer.server.database.sad), len(peer.server.database.spd)
                peer.server.close()
        assert left == (0, 0)
