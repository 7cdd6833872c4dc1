"""The control socket: for root and a group, bounded, and no client holds up another."""

import asyncio
import contextlib
import json
import os
import socket
import threading
import time

import pytest

from ipsecq.daemon.control import MAX_CLIENTS, MAX_REQUEST, MAX_STREAMS, ControlError, ControlServer, ask, follow
from ipsecq.errors import DaemonError, SysctlError


class Numbers:
    """A stream that always has something."""

    closed = 0

    async def take(self):
        await asyncio.sleep(0)
        return [{"number": number, "filler": "x" * 1000} for number in range(100)]

    def close(self):
        Numbers.closed += 1


class Silence(Numbers):
    """A stream that never has anything."""

    async def take(self):
        await asyncio.Event().wait()


async def handler(command, request):
    if command in ("monitor", "silence"):
        return Numbers() if command == "monitor" else Silence()
    if command == "fail":
        raise SysctlError("unknown oid 'x'")
    if command == "long":
        return "x" * (1 << 22)
    if command == "slow":
        await asyncio.sleep(0.2)
    return {"command": command, "value": request.get("value")}


@pytest.fixture
def path(tmp_path):
    """A server on its own thread."""
    place = tmp_path / "control"
    loop = asyncio.new_event_loop()
    server = ControlServer(place, "", handler)
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield place
    asyncio.run_coroutine_threadsafe(server.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    # As asyncio.run does: a client may have come in the last moment.
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.close()
    assert not place.exists()


def raw(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(path))
    return sock


def test_a_question_is_answered(path):
    assert ask(path, "status", value=3) == {"command": "status", "value": 3}


def test_the_daemons_own_error_arrives_with_code_and_exit_status(path):
    with pytest.raises(ControlError, match="unknown oid") as caught:
        ask(path, "fail")
    assert (caught.value.code, caught.value.exit_status) == ("sysctl", 1)


def test_a_daemon_that_ends_right_after_an_answer_leaves_nothing_unfinished(tmp_path):
    """The loop stops in the very step in which the answer has gone out: what that step began must be over."""
    loop = asyncio.new_event_loop()
    server = ControlServer(tmp_path / "c", "", handler)
    loop.run_until_complete(server.start())
    before = asyncio.all_tasks(loop)
    with raw(tmp_path / "c") as client:
        client.sendall(b'{"command": "status"}\n')
        client.setblocking(False)
        answer = b""
        while not answer:
            loop.call_soon(loop.stop)
            loop.run_forever()  # one step
            with contextlib.suppress(BlockingIOError):
                answer = client.recv(4096)
    assert asyncio.all_tasks(loop) - before == set()
    loop.run_until_complete(server.close())
    loop.close()


def test_nobody_else_may_open_the_socket(path):
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_group_gets_in_by_mode(tmp_path):
    async def scenario():
        server = ControlServer(tmp_path / "c", "daemon", handler)
        await server.start()
        status = (tmp_path / "c").stat()
        await server.close()
        return status

    status = asyncio.run(scenario())
    assert status.st_mode & 0o777 == 0o660
    assert status.st_gid == 1


def test_an_unknown_group_is_named(tmp_path):
    with pytest.raises(DaemonError, match="no group 'nobodys'"):
        asyncio.run(ControlServer(tmp_path / "c", "nobodys", handler).start())


@pytest.mark.skipif(os.geteuid() != 0, reason="changes user")
def test_members_of_the_group_may_look_but_not_change(path):
    path.chmod(0o666)
    for parent in path.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(12345)
            os.setuid(12345)
            seen = ask(path, "status")["command"]
            try:
                ask(path, "reload")
            except ControlError as error:
                seen += " " + str(error)
            os.write(writer, seen.encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 1000) == b"status reload: only root may"


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{}\n", b"\xff\xff\n", b"[" * 5000 + b"\n", b'{"command"'])
def test_nonsense_is_refused(path, line):
    with raw(path) as sock:
        sock.sendall(line)
        sock.shutdown(socket.SHUT_WR)
        answer = json.loads(sock.makefile().read())
    assert not answer["ok"]


def test_a_request_without_end_is_cut_off(path):
    with raw(path) as sock:
        try:
            for _ in range(4 * MAX_REQUEST // 1000):
                sock.sendall(b"x" * 1000)
            assert sock.recv(100) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert ask(path, "status")


def test_stuck_clients_do_not_block_others(path, monkeypatch):
    monkeypatch.setattr("ipsecq.daemon.control.PATIENCE", 120.0)  # who waits for them would wait in vain
    silent = [raw(path) for _ in range(MAX_CLIENTS - 2)]
    unread = raw(path)
    unread.sendall(b'{"command": "long"}\n')
    assert ask(path, "status")["command"] == "status"
    for each in (*silent, unread):
        each.close()


def test_too_many_clients_are_told(path, monkeypatch):
    monkeypatch.setattr("ipsecq.daemon.control.REFUSAL_PATIENCE", 30.0)
    silent = [raw(path) for _ in range(MAX_CLIENTS)]
    with pytest.raises(ControlError, match="busy"):
        ask(path, "status")
    for each in silent:
        each.close()


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_goes_on_until_its_reader_goes(path):
    before = Numbers.closed
    stream = follow(path, "monitor")
    assert [next(stream)["number"] for _ in range(250)] == [*range(100), *range(100), *range(50)]
    stream.close()
    until(lambda: Numbers.closed == before + 1)
    silent = raw(path)
    silent.sendall(b'{"command": "silence"}\n')
    assert silent.recv(100) == b'{"ok": true, "stream": true}\n'
    silent.close()
    until(lambda: Numbers.closed == before + 2)


def test_a_reader_that_does_not_read_is_dropped_and_holds_up_nobody(path, monkeypatch):
    monkeypatch.setattr("ipsecq.daemon.control.READER_PATIENCE", 0.3)
    before = Numbers.closed
    stuck = raw(path)
    stuck.sendall(b'{"command": "monitor"}\n')
    assert ask(path, "status")["command"] == "status"
    until(lambda: Numbers.closed == before + 1)
    with contextlib.suppress(ConnectionResetError):
        while stuck.recv(1 << 20):  # what was on its way, then the end
            pass
    stuck.close()


def test_streams_leave_places_for_questions(path):
    readers = [raw(path) for _ in range(MAX_STREAMS)]
    for each in readers:
        each.sendall(b'{"command": "silence"}\n')
        assert b"stream" in each.recv(100)
    with pytest.raises(ControlError, match="clients read already"):
        next(follow(path, "silence"))
    assert ask(path, "status")["command"] == "status"
    for each in readers:
        each.close()


def test_a_stream_that_is_refused_is_an_error_as_any(path):
    with pytest.raises(ControlError, match="unknown oid"):
        next(follow(path, "fail"))


def test_a_daemon_that_is_not_there_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(DaemonError, match="is ipsecq running"):
        ask(tmp_path / "none", "status")


def test_a_stream_ends_when_the_reader_of_what_is_printed_has_gone(path):
    reader, writer = os.pipe()
    try:
        stream = follow(path, "monitor", writing_to=writer)
        assert next(stream)["number"] == 0
        stream.close()
        os.close(reader)
        with pytest.raises(BrokenPipeError):  # it would wait for ever
            next(follow(path, "silence", writing_to=writer))
    finally:
        os.close(writer)


def test_a_server_that_closes_with_clients_connected_has_nothing_to_complain_of(tmp_path):
    complaints = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context["message"]))
        server = ControlServer(tmp_path / "control", "", handler)
        await server.start()
        readers = []
        for command in ("silence", "monitor", ""):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "control"))
            readers.append((reader, writer))
            if command:
                writer.write(json.dumps({"command": command}).encode() + b"\n")
                assert json.loads(await reader.readline())["stream"]
        while len(server._clients) < 3:
            await asyncio.sleep(0.01)
        await server.close()
        assert not server._clients
        for reader, writer in readers:
            with contextlib.suppress(ConnectionError):
                while await reader.read(1 << 16):
                    pass
            writer.close()
        await asyncio.sleep(0)  # callbacks of the tasks

    asyncio.run(main())
    assert complaints == []
