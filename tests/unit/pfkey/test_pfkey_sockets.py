import errno
import os
import queue
import select
import socket
import stat
import threading
import time

import pytest

from ipsecq.errors import DaemonError
from ipsecq.lab.netns import wait_for
from ipsecq.numbers import Protocol
from ipsecq.pfkey.client import PfkeyClient
from ipsecq.pfkey.constants import Dialect, MessageType
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.memory import MemoryDatabase
from ipsecq.pfkey.messages import Message, build
from ipsecq.pfkey.server import PfkeyServer
from ipsecq.pfkey.socket_server import PfkeySocketServer
from ipsecq.sa.association import SecurityAssociation

T = MessageType


class Daemon:
    """The socket server in a thread of its own, as the daemon's loop would run it."""

    def __init__(self, path, barrier=None, **listen):
        self.database = MemoryDatabase()
        self.server = PfkeyServer(self.database, time.time, lambda n: int.from_bytes(os.urandom(4), "big") % n)
        self.sockets = PfkeySocketServer(self.server, barrier)
        self.sockets.listen(path, **listen)
        self.stop_read, self.stop_write = os.pipe()
        self.jobs = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        poll = select.poll()
        poll.register(self.sockets.fileno(), select.POLLIN)
        poll.register(self.stop_read, select.POLLIN)
        while True:
            if self.stop_read in [fd for fd, _ in poll.poll()]:
                if os.read(self.stop_read, 1) == b"x":
                    return
                job, done = self.jobs.get()
                job()
                done.set()
            self.sockets.on_readable()

    def call(self, job):
        """Run in the server's thread, as an event of the daemon would."""
        done = threading.Event()
        self.jobs.put((job, done))
        os.write(self.stop_write, b"j")
        assert done.wait(30)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        os.write(self.stop_write, b"x")
        self.thread.join()
        self.sockets.close()
        os.close(self.stop_read)
        os.close(self.stop_write)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pfkey.sock"


def sa(number):
    return SecurityAssociation(Protocol.ESP, 0x1000 + number, bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)))


def test_requests_and_errors_come_back_over_the_socket(path, make):
    with Daemon(path) as daemon, PfkeyClient.connect(path) as client:
        assert client.request(make.add()).sa.spi == 0x1000
        with pytest.raises(PfkeyError) as caught:
            client.request(make.add())
        assert caught.value.errno == errno.EEXIST
        assert [record.sa.spi for record in client.dump()] == [0x1000]
        assert list(client.dump(satype=2)) == []
        assert len(daemon.database.sad) == 1


def test_the_socket_file_is_root_s_alone_and_goes_with_the_server(path):
    with Daemon(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(DaemonError, match="another daemon"):
            PfkeySocketServer(PfkeyServer(MemoryDatabase(), time.time, int)).listen(path)
    assert not path.exists()
    with pytest.raises(DaemonError, match="ipsecq run"):
        PfkeyClient.connect(path)


def test_a_stale_socket_file_is_replaced(path):
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.bind(str(path))
    left.close()
    with Daemon(path), PfkeyClient.connect(path) as client:
        assert client.request(Message(T.FLUSH)).type == T.FLUSH


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_group_member_gets_in_and_sees_no_keys_and_others_stay_out(path, make):
    path.parent.chmod(0o755)
    for parent in path.parents[1:4]:
        parent.chmod(parent.stat().st_mode | 0o055)

    def as_user(group, code):
        pid = os.fork()
        if not pid:
            status = 9
            try:
                os.setgroups([group])
                os.setgid(group)
                os.setuid(65534)
                with PfkeyClient.connect(path) as client:
                    status = code(client)
            except DaemonError:
                status = 7
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def keys_seen(client):
        return sum(record.key_encrypt is not None for record in client.dump())

    with Daemon(path, group=4321), PfkeyClient.connect(path) as client:
        client.request(make.add())
        assert as_user(4321, keys_seen) == 0
        assert as_user(4322, keys_seen) == 7
        assert keys_seen(client) == 1
    with Daemon(path), PfkeyClient.connect(path):
        path.chmod(0o666)  # whatever somebody did to the mode: without a group only root is served
        assert as_user(4321, lambda client: list(client.dump()) and 1) == 7


def test_a_slow_reader_gets_a_whole_dump_while_others_go_on(path, make):
    count = 3000
    with Daemon(path) as daemon, PfkeyClient.connect(path) as slow, PfkeyClient.connect(path) as quick:
        assert list(slow.dump()) == []  # who was answered is surely among the server's clients
        for number in range(count):
            daemon.database.add_sa(sa(number))
        slow_id = min(id_ for id_, *_ in daemon.sockets.clients)
        slow.send(Message(T.DUMP))
        for number in range(50):  # others change the SAD and are answered
            quick.request(make.add(0x900000 + number))
        under_way = []
        daemon.call(lambda: under_way.append(daemon.server.dumping(slow_id)))
        assert under_way == [True]
        quick.request(Message(T.FLUSH))
        records = []
        while not records or records[-1].seq:
            message = slow.receive()
            if message.type == T.DUMP:
                records.append(message)
                if len(records) % 500 == 0:
                    time.sleep(0.02)
        assert [record.sa.spi for record in records] == [0x1000 + number for number in range(count)]
        assert daemon.sockets.dropped == 0


def test_news_for_a_client_that_never_reads_is_dropped_at_a_bound_and_counted(path, make):
    with Daemon(path) as daemon, PfkeyClient.connect(path) as deaf, PfkeyClient.connect(path) as busy:
        deaf.request(Message(T.REGISTER, 3))
        busy.request(make.add(0x900000))
        datagram = build(make.add(0x900000))
        client_id = next(iter(sorted(id_ for id_, *_ in daemon.sockets.clients)))
        daemon.call(lambda: daemon.sockets.send([(client_id, datagram)] * 40000))
        assert daemon.sockets.dropped > 0
        assert {each[0]: each[3] for each in daemon.sockets.clients}[client_id] == daemon.sockets.dropped
        assert busy.request(make.add(0x900001)).errno == 0


def test_a_client_that_sends_without_reading_is_held_back_not_dropped(path, make):
    with Daemon(path) as daemon, PfkeyClient.connect(path, timeout=20) as client:
        total = 4000

        def flood():
            for number in range(total):
                client.socket.send(build(make.named(T.GET, 0x5000 + number)))

        sender = threading.Thread(target=flood)
        sender.start()
        time.sleep(0.2)
        replies = [client.receive() for _ in range(total)]
        sender.join()
        assert {reply.errno for reply in replies} == {errno.ESRCH}
        assert daemon.sockets.dropped == 0


def test_replies_wait_for_the_barrier_and_keep_their_order(path, make):
    waiting = []
    with Daemon(path, barrier=waiting.append) as daemon, PfkeyClient.connect(path, timeout=0.3) as client:
        client.send(make.add())
        wait_for(lambda: waiting, "the barrier", 30)
        assert len(daemon.database.sad) == 1
        with pytest.raises(TimeoutError):
            client.receive()
        client.socket.settimeout(30)
        daemon.call(waiting.pop(0))
        assert client.receive().type == T.ADD


def test_an_empty_datagram_is_answered_and_does_not_end_the_connection(path, make):
    with Daemon(path), PfkeyClient.connect(path) as client:
        client.socket.send(b"")
        assert client.receive().errno == errno.EMSGSIZE
        assert client.request(make.add()).errno == 0


def test_a_second_listener_speaks_freebsd(path, make, tmp_path):
    with Daemon(path) as daemon:
        daemon.sockets.listen(tmp_path / "freebsd.sock", dialect=Dialect.FREEBSD)
        with PfkeyClient.connect(tmp_path / "freebsd.sock", Dialect.FREEBSD) as client:
            assert client.request(make.add()).sa_replay.value == 256
