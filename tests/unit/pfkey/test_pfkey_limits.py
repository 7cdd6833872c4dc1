"""What PF_KEY clients can make grow, and where it stops."""

import errno
import os

import pytest

from ipsecq.numbers import SaState
from ipsecq.pfkey import sadb, socket_server
from ipsecq.pfkey.client import PfkeyClient
from ipsecq.pfkey.constants import MessageType
from ipsecq.pfkey.extensions import SpiRange
from ipsecq.pfkey.memory import MemoryDatabase
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.server import PfkeyServer

T = MessageType


def getspi(make):
    ends = {"src": make.host(make.A), "dst": make.host(make.B)}
    return Message(T.GETSPI, 3, seq=9, pid=77, spirange=SpiRange(0x1000, 0x8000), **ends)


def larvals(bench):
    return sum(sa.state is SaState.LARVAL for sa in bench.database.sas(None))


def test_larval_sas_are_bounded_for_each_client_and_in_total(bench, make, monkeypatch):
    monkeypatch.setattr(sadb, "MAX_LARVAL_CLIENT", 5)
    monkeypatch.setattr(sadb, "MAX_LARVAL", 12)
    for client in (2, 3):
        bench.open(client)
    assert [bench.ask(getspi(make))[0].errno for _ in range(7)] == [0] * 5 + [errno.ENOBUFS] * 2
    assert [bench.ask(getspi(make), 2)[0].errno for _ in range(5)] == [0] * 5
    assert [bench.ask(getspi(make), 3)[0].errno for _ in range(4)] == [0] * 2 + [errno.ENOBUFS] * 2
    assert larvals(bench) == 12


def test_larval_sas_that_matured_or_died_make_room(bench, make, monkeypatch):
    monkeypatch.setattr(sadb, "MAX_LARVAL_CLIENT", 2)
    spis = [bench.ask(getspi(make))[0].sa.spi for _ in range(2)]
    assert bench.ask(make.add(spis[0], T.UPDATE))[0].errno == 0
    assert bench.ask(getspi(make))[0].errno == 0
    assert bench.ask(getspi(make))[0].errno == errno.ENOBUFS
    assert bench.ask(make.named(T.DELETE, spis[1]))[0].errno == 0
    assert bench.ask(getspi(make))[0].errno == 0


@pytest.fixture
def sockets(tmp_path):
    server = socket_server.PfkeySocketServer(PfkeyServer(MemoryDatabase(), lambda: 1.0, lambda n: 0))
    server.listen(tmp_path / "pfkey")
    yield server, tmp_path / "pfkey"
    server.close()


def test_pfkey_clients_are_bounded_and_a_place_is_free_again(sockets, monkeypatch):
    monkeypatch.setattr(socket_server, "MAX_CLIENTS", 3)
    server, path = sockets
    clients = []
    for _ in range(5):
        clients.append(PfkeyClient.connect(path))
        server.on_readable()
    assert len(server.clients) == 3
    clients[0].close()
    server.on_readable()
    clients.append(PfkeyClient.connect(path))
    server.on_readable()
    assert len(server.clients) == 3
    for client in clients:
        client.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_one_user_cannot_take_all_places(sockets, monkeypatch):
    monkeypatch.setattr(socket_server, "MAX_CLIENTS_USER", 2)
    server, path = sockets
    crowd = [PfkeyClient.connect(path) for _ in range(4)]
    server.on_readable()
    assert len(server.clients) == 4  # root's
    for connection in server._connections.values():
        connection.uid = 1000
    assert server._crowded(1000)
    assert not server._crowded(1001)
    assert not server._crowded(0)
    for client in crowd:
        client.close()
