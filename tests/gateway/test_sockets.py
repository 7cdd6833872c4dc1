"""Policies of sockets between two gateways with real daemons: set by the API and by an unmodified program."""

import contextlib
import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import ipsecq
from ipsecq.lab.capture import Capture
from ipsecq.lab.gateway import Gateway, start_all
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.topology import build

pytestmark = pytest.mark.root

REQUIRE = ("out ipsec esp/transport//require", "in ipsec esp/transport//require")
NOBODY = 65534
PROGRAM = r"""
#include <errno.h>
#include <netinet/in.h>
#include <linux/ipsec.h>
#include <linux/pfkeyv2.h>
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* What ipsec_set_policy(3) makes of "DIR ipsec esp/transport//require", or of "DIR bypass". */
static int set(int fd, int dir, int type) {
    struct { struct sadb_x_policy p; struct sadb_x_ipsecrequest r; } v = {0};
    int size = type == IPSEC_POLICY_IPSEC ? sizeof v : sizeof v.p;
    v.p.sadb_x_policy_len = size / 8;
    v.p.sadb_x_policy_exttype = SADB_X_EXT_POLICY;
    v.p.sadb_x_policy_type = type;
    v.p.sadb_x_policy_dir = dir;
    v.r.sadb_x_ipsecrequest_len = sizeof v.r;
    v.r.sadb_x_ipsecrequest_proto = IPPROTO_ESP;
    v.r.sadb_x_ipsecrequest_mode = IPSEC_MODE_TRANSPORT;
    v.r.sadb_x_ipsecrequest_level = IPSEC_LEVEL_REQUIRE;
    return setsockopt(fd, IPPROTO_IP, 16, &v, size) ? errno : 0;
}
int main(int argc, char **argv) {
    int fd = socket(AF_INET, SOCK_DGRAM, 0), port = atoi(argv[2]);
    char buffer[256] = {0};
    socklen_t size = sizeof buffer;
    struct sadb_x_policy *seen = (void *)buffer;
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    printf("%d ", set(fd, IPSEC_DIR_INBOUND, IPSEC_POLICY_BYPASS));
    printf("%d ", set(fd, IPSEC_DIR_OUTBOUND, IPSEC_POLICY_IPSEC));
    printf("%d ", set(fd, IPSEC_DIR_INBOUND, IPSEC_POLICY_IPSEC));
    seen->sadb_x_policy_len = 2; seen->sadb_x_policy_dir = IPSEC_DIR_OUTBOUND;
    printf("%d ", getsockopt(fd, IPPROTO_IP, 16, buffer, &size) ? errno : 0);
    struct sadb_x_ipsecrequest *request = (void *)(seen + 1);
    printf("%u %u %u ", size, seen->sadb_x_policy_type, request->sadb_x_ipsecrequest_proto);
    connect(fd, (void *)&to, sizeof to);
    send(fd, "from C", 6, 0);
    size = recv(fd, buffer, sizeof buffer - 1, 0); buffer[size] = 0;
    printf("%s\n", buffer);
    return 0;
}
"""


class Net:
    """Two gateways whose daemons have SAs for transport mode between them, and no policy at all."""

    def __init__(self, lab):
        self.network = build(lab)
        text = ""
        for version in (4, 6):
            for near, far in (self.network.sites, self.network.sites[::-1]):
                text += (
                    f"add {near.wan(version)} {far.wan(version)} esp {0x2000 + 16 * near.number + version} "
                    f"-m transport -r 32 -E aes-gcm-16 0x{secrets.token_hex(20)};\n"
                    f"add {near.wan(version)} {far.wan(version)} ah {0x3000 + 16 * near.number + version} "
                    f"-m transport -r 32 -A hmac-sha2-256 0x{secrets.token_hex(32)};\n"
                )
        self.gateways = [Gateway(site.gateway, text) for site in self.network.sites]
        self.setkey = text
        for gateway in self.gateways:
            # Programs of other users have to get at the socket.
            for folder in (gateway.directory, lab.directory):
                folder.chmod(0o755)
        start_all(self.gateways)
        self.paths = [gateway.directory / "run" / "sockets" for gateway in self.gateways]
        self.open = []

    def address(self, side, version):
        return self.network.sites[side].wan(version)

    def socket(self, side, version=4, kind=socket.SOCK_DGRAM, policies=(), *, bind=None):
        """A socket of one gateway's namespace, with policies."""

        def make():
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
            made.settimeout(5)
            for policy in policies:
                ipsecq.set_policy(made, policy, path=self.paths[side])
            if bind is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind((self.address(side, version), bind))
            return made

        made = self.network.sites[side].gateway.call(make)
        self.open.append(made)
        return made

    def capture(self):
        return Capture(self.network.one.gateway, "wan")

    def polvio(self, side):
        return self.gateways[side].status()["counters"].get("in_polvio", 0)

    def pairs(self, side):
        return [(pair["out"], pair["in"]) for pair in self.gateways[side].status()["sockets"]]


@pytest.fixture(scope="module")
def net():
    with Lab() as lab:
        made = Net(lab)
        yield made


@pytest.fixture(autouse=True)
def _closed(net):
    yield
    for sock in net.open:
        sock.close()
    net.open.clear()


def nothing(sock, seconds=0.4):
    sock.settimeout(seconds)
    try:
        sock.recv(2000)
    except TimeoutError:
        return True
    return False


def clear(frames, net, version):
    """Frames of the two gateways' UDP and TCP that anybody can read."""
    addresses = {net.address(0, version), net.address(1, version)}
    return [f for f in frames if {f.src, f.dst} <= addresses and f.protocol in (6, 17)]


@pytest.mark.parametrize("version", [4, 6])
def test_udp_between_two_gateways_is_protected_by_the_sockets_policies_alone(net, version):
    with net.capture() as capture:
        one = net.socket(0, version, policies=REQUIRE, bind=7000)
        two = net.socket(1, version, policies=REQUIRE, bind=7000)
        other = net.socket(0, version, bind=7001)
        receiver = net.socket(1, version, bind=7001)
        one.sendto(b"secret", (net.address(1, version), 7000))
        assert two.recv(100) == b"secret"
        two.sendto(b"answer", (net.address(0, version), 7000))
        assert one.recv(100) == b"answer"
        other.sendto(b"plain", (net.address(1, version), 7001))
        assert receiver.recv(100) == b"plain"
        capture.settle()
    seen = b"".join(frame.data for frame in capture.frames())
    assert b"plain" in seen
    assert b"secret" not in seen
    assert b"answer" not in seen
    assert ipsecq.get_policy(one, "in", path=net.paths[0]) == REQUIRE[1]
    assert ipsecq.get_policy(one, "out", path=net.paths[0]) == REQUIRE[0]
    assert ipsecq.get_policy(other, "out", path=net.paths[0]) == "out entrust"


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_from_the_first_segment_to_the_last_and_what_accept_makes_has_the_listener_s_policy(net, version):
    with net.capture() as capture:
        listener = net.socket(1, version, socket.SOCK_STREAM, REQUIRE, bind=7100)
        listener.listen()
        client = net.socket(0, version, socket.SOCK_STREAM, REQUIRE)
        client.connect((net.address(1, version), 7100))
        server, _ = listener.accept()
        net.open.append(server)
        listener.close()
        assert ipsecq.get_policy(server, "out", path=net.paths[1]) == REQUIRE[0]
        time.sleep(3)  # the listener's policy would have gone by now
        for sock in (client, server):
            sock.settimeout(20)
        blob = b"marker" * 20000
        thread = threading.Thread(target=lambda: (client.sendall(blob), client.shutdown(socket.SHUT_WR)))
        thread.start()
        received = bytearray()
        while chunk := server.recv(1 << 16):
            received += chunk
        thread.join()
        assert received == blob
        server.close()
        client.close()
        capture.settle()
    frames = capture.frames()
    assert clear(frames, net, version) == []
    assert sum(frame.protocol == 50 for frame in frames) > 50


def test_clear_packets_to_a_socket_that_requires_protection_are_dropped_and_counted(net):
    before = net.polvio(1)
    two = net.socket(1, policies=REQUIRE[1:], bind=7200)
    listener = net.socket(1, kind=socket.SOCK_STREAM, policies=REQUIRE[1:], bind=7200)
    listener.listen()
    one = net.socket(0, bind=7200)
    one.sendto(b"clear", (net.address(1, 4), 7200))
    assert nothing(two)
    client = net.socket(0, kind=socket.SOCK_STREAM)
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.connect((net.address(1, 4), 7200))
    assert net.polvio(1) >= before + 2
    assert net.gateways[1].metric("ipsecq_drops_total", reason="in_polvio") >= before + 2


def test_a_clear_segment_cannot_finish_a_handshake_that_began_protected(net):
    listener = net.socket(1, kind=socket.SOCK_STREAM, policies=REQUIRE, bind=7300)
    listener.listen()
    near, far = net.address(0, 4), net.address(1, 4)

    def shake():
        from scapy.all import IP, TCP, Raw, conf, raw

        conf.verb = 0
        # A raw socket for TCP that has the policy sends the SYN protected, and the rest as it is told.
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        listen = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        listen.settimeout(5)
        ipsecq.set_policy(sender, REQUIRE[0], path=net.paths[0])
        sender.sendto(raw(IP(src=near, dst=far) / TCP(sport=5555, dport=7300, flags="S", seq=100)), (far, 0))
        while True:
            reply = IP(listen.recv(2000))
            if TCP in reply and reply[TCP].dport == 5555:
                break
        ipsecq.set_policy(sender, "out entrust", path=net.paths[0])
        ack = TCP(sport=5555, dport=7300, flags="PA", seq=101, ack=reply[TCP].seq + 1)
        sender.sendto(raw(IP(src=near, dst=far) / ack / Raw(b"clear data")), (far, 0))
        sender.close()
        listen.close()

    gateway = net.network.one.gateway
    # Our own TCP must not answer the SYN-ACK with a RST.
    gateway.nft("table inet quiet { chain out { type filter hook output priority 0; tcp flags rst tcp sport 5555 drop; }; }")
    try:
        before = net.polvio(1)
        gateway.call(shake)
        listener.settimeout(1)
        with pytest.raises(TimeoutError):
            listener.accept()
        assert net.polvio(1) > before
    finally:
        gateway.run("nft", "delete", "table", "inet", "quiet")


def test_a_packet_that_was_protected_otherwise_than_the_socket_wants_is_dropped(net):
    two = net.socket(1, policies=("in ipsec ah/transport//require",), bind=7400)
    one = net.socket(0, policies=REQUIRE[:1], bind=7400)
    one.sendto(b"esp only", (net.address(1, 4), 7400))
    assert nothing(two)
    ipsecq.set_policy(one, "out ipsec ah/transport//require", path=net.paths[0])
    one.sendto(b"ah", (net.address(1, 4), 7400))
    two.settimeout(5)
    assert two.recv(100) == b"ah"
    # The same flow, from one packet to the next.
    ipsecq.set_policy(two, "in ipsec esp/transport//require", path=net.paths[1])
    one.sendto(b"ah again", (net.address(1, 4), 7400))
    assert nothing(two)


def test_without_an_sa_a_socket_that_requires_one_sends_nothing(net):
    one = net.socket(0, policies=("out ipsec esp/transport//unique:77",), bind=7500)
    two = net.socket(1, bind=7500)
    one.sendto(b"never", (net.address(1, 4), 7500))
    assert nothing(two)
    ipsecq.set_policy(one, "out entrust", path=net.paths[0])
    one.sendto(b"clear", (net.address(1, 4), 7500))
    two.settimeout(5)
    assert two.recv(100) == b"clear"


def as_nobody(space, path, text):
    """Run Python lines as nobody; ``sock``, a UDP socket, and ``path`` are there.  What it prints."""
    return as_user(NOBODY, space, path, text)


def as_user(user, space, path, text):
    """The same as another user."""
    code = "import os, socket, sys, ipsecq, ipsecq.policy.setpolicy, ipsecq.pfkey.socketclient\n"
    code += f"os.setgroups([]); os.setgid({user}); os.setuid({user})\n"
    code += f"path = {str(path)!r}\nsock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n{text}"
    return space.run(sys.executable, "-c", code).stdout.split()


def test_bypass_needs_privilege_and_protection_does_not(net):
    text = """
for policy in ("in bypass", "out bypass", "out none", "out ipsec esp/transport//require", "out discard", "out entrust"):
    try:
        ipsecq.set_policy(sock, policy, path=path)
        print(0, sock.getsockopt(socket.SOL_SOCKET, 36) != 0)
    except OSError as error:
        print(error.errno)
"""
    answers = as_nobody(net.network.one.gateway, net.paths[0], text)
    assert answers == [*[str(errno.EACCES)] * 3, "0", "True", "0", "True", "0", "False"]


def test_who_is_handed_a_socket_without_privilege_cannot_take_its_policy_off_or_replace_it(net):
    given, other = "out ipsec esp/transport//unique:13", "out ipsec esp/transport//unique:14"
    text = f"""
ipsecq.set_policy(sock, {given!r}, path=path)
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
for policy in ("out entrust", "out discard", {other!r}, {given!r}, "in ipsec esp/transport//require", "in entrust"):
    try:
        ipsecq.set_policy(sock, policy, path=path)
        print(0)
    except OSError as error:
        print(error.errno)
    print(ipsecq.get_policy(sock, "out", path=path) == {given!r})
"""
    denied, done = [str(errno.EACCES), "True"], ["0", "True"]
    assert as_user(0, net.network.one.gateway, net.paths[0], text) == [*denied * 3, *done * 3]


def test_a_program_that_gives_up_root_keeps_its_policy_under_ipsecq_exec(net):
    text = f"""
import ctypes, os, socket
from ipsecq.pfkey.policyext import PolicyExt, Request
libc = ctypes.CDLL(None, use_errno=True)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def ask(value):
    return ctypes.get_errno() if libc.setsockopt(sock.fileno(), 0, 16, value, len(value)) else 0
require = PolicyExt(2, 2, requests=[Request(50, 1, 2)]).to_option()
print(ask(require))
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
print(ask(PolicyExt(3, 2).to_option()), ask(b""), ask(PolicyExt(0, 2).to_option()), ask(require))
"""
    words = ["exec", "--config", str(net.gateways[0].config), "--", sys.executable, "-c", text]
    done = net.network.one.gateway.run(sys.executable, "-m", "ipsecq", *words)
    assert done.stdout.split() == ["0", *[str(errno.EACCES)] * 3, "0"]


def test_a_user_without_privilege_has_a_limit(net):
    text = """
kept = []
try:
    for number in range(1, 100):
        kept.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        ipsecq.set_policy(kept[-1], f"out ipsec esp/transport//unique:{number}", path=path)
except OSError as error:
    print(error.errno, len(kept))
"""
    assert as_nobody(net.network.one.gateway, net.paths[0], text) == [str(errno.ENOBUFS), "33"]


def test_what_a_socket_cannot_have_is_refused_with_the_errno_of_the_system(net):
    space, path = net.network.one.gateway, net.paths[0]

    def answers(family, kind, protocol, policy):
        with space.call(lambda: socket.socket(family, kind, protocol)) as sock:
            try:
                ipsecq.set_policy(sock, policy, path=path)
            except OSError as error:
                return error.errno
            return 0

    assert answers(socket.AF_INET, socket.SOCK_RAW, 1, "out ipsec esp/transport//require") == 0
    assert answers(socket.AF_INET, socket.SOCK_RAW, 1, REQUIRE[1]) == errno.EOPNOTSUPP
    assert answers(socket.AF_UNIX, socket.SOCK_DGRAM, 0, REQUIRE[0]) == errno.EOPNOTSUPP
    assert answers(socket.AF_INET, socket.SOCK_DGRAM, 0, "out ipsec" + " esp/transport//use" * 5) == errno.EINVAL
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger, pytest.raises(OSError, match="namespace") as caught:
        ipsecq.set_policy(stranger, REQUIRE[0], path=path)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_bypass_in_both_directions_is_the_done_mark_and_in_one_a_policy_of_its_own(net):
    one = net.socket(0, policies=("out bypass",))
    assert ipsecq.get_policy(one, "out", path=net.paths[0]) == "out bypass"
    assert ipsecq.get_policy(one, "in", path=net.paths[0]) == "in entrust"
    ipsecq.set_policy(one, "in bypass", path=net.paths[0])
    assert one.getsockopt(socket.SOL_SOCKET, 36) == 0x01000000
    assert ipsecq.get_policy(one, "in", path=net.paths[0]) == "in bypass"
    ipsecq.set_policy(one, "out entrust", path=net.paths[0])
    assert ipsecq.get_policy(one, "out", path=net.paths[0]) == "out entrust"
    assert ipsecq.get_policy(one, "in", path=net.paths[0]) == "in bypass"


def test_the_program_s_own_mark_stays(net):
    one = net.socket(0)
    one.setsockopt(socket.SOL_SOCKET, 36, 0x1234)
    ipsecq.set_policy(one, REQUIRE[0], path=net.paths[0])
    assert one.getsockopt(socket.SOL_SOCKET, 36) & 0xFFFF == 0x1234
    ipsecq.set_policy(one, "out entrust", path=net.paths[0])
    assert one.getsockopt(socket.SOL_SOCKET, 36) == 0x1234


def test_a_policy_goes_with_its_socket_however_that_ends(net):
    def shown():
        # Connections of the tests before have their policy for the minute that the kernel keeps them in TIME_WAIT.
        return [pair for pair in net.gateways[0].status()["sockets"] if "unique:909" in pair["out"]]

    space, path = net.network.one.gateway, net.paths[0]
    code = (
        "import os, socket, sys, time, ipsecq\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"ipsecq.set_policy(s, 'out ipsec esp/transport//unique:909', path={str(path)!r})\n"
        "pid = os.fork()\n"
        "if pid: print(pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = space.popen(sys.executable, "-c", code, log=net.gateways[0].directory / "parent")
    log = net.gateways[0].directory / "parent"
    wait_for(lambda: log.read_text().strip().isdigit(), "the fork", 10)
    child = int(log.read_text())
    assert [(pair["out"], pair["sockets"]) for pair in shown()] == [("out ipsec esp/transport//unique:909", 1)]
    assert net.gateways[0].metric("ipsecq_sockets_with_policy") >= 1
    assert net.gateways[0].metric("ipsecq_socket_policies") >= 1
    assert "unique:909" in net.gateways[0].command("status").stdout
    parent.kill()
    parent.wait()
    time.sleep(3)
    assert shown()  # the child has the socket, too
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not shown(), "the policy to go", 8)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    (folder / "program.c").write_text(PROGRAM)
    subprocess.run(["gcc", "-Wall", "-o", folder / "program", folder / "program.c"], check=True)
    return folder / "program"


def test_an_unmodified_program_sets_and_reads_its_policy_under_ipsecq_exec(net, program):
    two = net.socket(1, policies=REQUIRE, bind=7600)
    two.settimeout(30)
    answers = []

    def answer():
        data, peer = two.recvfrom(100)
        answers.append(data)
        two.sendto(b"to C", peer)

    thread = threading.Thread(target=answer)
    thread.start()
    with net.capture() as capture:
        words = ["exec", "--config", str(net.gateways[0].config), "--", str(program), net.address(1, 4), "7600"]
        done = net.network.one.gateway.run(sys.executable, "-m", "ipsecq", *words)
        thread.join()
        capture.settle()
    assert done.stdout.split(" ", 7) == ["0", "0", "0", "0", "32", "2", "50", "to C\n"]
    assert answers == [b"from C"]
    assert clear(capture.frames(), net, 4) == []


def test_a_dead_daemon_leaves_protected_sockets_blocked_and_the_next_one_serves_them(net):
    one = net.socket(0, policies=REQUIRE, bind=7700)
    two = net.socket(1, policies=REQUIRE, bind=7700)
    free = net.socket(0, bind=7701)
    receiver = net.socket(1, bind=7701)
    with net.capture() as capture:
        net.gateways[0].kill()
        one.sendto(b"nobody there", (net.address(1, 4), 7700))
        assert nothing(two)
        free.sendto(b"plain", (net.address(1, 4), 7701))
        assert receiver.recv(100) == b"plain"
        with contextlib.suppress(TimeoutError):
            two.sendto(b"hello", (net.address(0, 4), 7700))
        assert nothing(one)
        capture.settle()
    assert b"nobody there" not in b"".join(frame.data for frame in capture.frames())
    net.gateways[0].start()
    assert (REQUIRE[0], REQUIRE[1]) in net.pairs(0)
    with net.capture() as capture:
        one.sendto(b"served again", (net.address(1, 4), 7700))
        two.settimeout(5)
        assert two.recv(100) == b"served again"
        capture.settle()
    assert b"served again" not in b"".join(frame.data for frame in capture.frames())
    assert ipsecq.get_policy(one, "out", path=net.paths[0]) == REQUIRE[0]
