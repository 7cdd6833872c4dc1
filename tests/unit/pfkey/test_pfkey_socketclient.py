"""What programs call: ipsecq.set_policy and get_policy, against a daemon that accepts everything."""

import array
import json
import os
import socket
import threading

import pytest

import ipsecq

OUT = "out ipsec esp/transport//require"


@pytest.fixture
def daemon(tmp_path):
    """(path, list of (request, inode of the socket that came with it))."""
    path, seen = tmp_path / "sockets", []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve():
            while True:
                client, _ = listener.accept()
                with client:
                    data, rights, _, _ = client.recvmsg(4096, socket.CMSG_SPACE(8))
                    if not data:
                        return
                    numbers = array.array("i", rights[0][2])
                    seen.append((json.loads(data), os.fstat(numbers[0]).st_ino))
                    for number in numbers:
                        os.close(number)
                    client.send(json.dumps({"errno": 0, "policy": OUT}).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield path, seen
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
            last.connect(str(path))
        thread.join()


def test_a_socket_and_its_descriptor_are_the_same(daemon):
    path, seen = daemon
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        inode = os.fstat(sock.fileno()).st_ino
        for form in (sock, sock.fileno()):
            ipsecq.set_policy(form, OUT, path=path)
            assert ipsecq.get_policy(form, "out", path=str(path)) == OUT
    assert seen == [({"op": "set", "policy": OUT}, inode), ({"op": "get", "direction": "out"}, inode)] * 2


@pytest.mark.parametrize("sock", ["0", None, object(), 1.0])
def test_what_is_no_socket_is_a_type_error_that_says_so(tmp_path, sock):
    for call, word in ((ipsecq.set_policy, OUT), (ipsecq.get_policy, "out")):
        with pytest.raises(TypeError, match=f"expected a socket or a descriptor, found {type(sock).__name__}"):
            call(sock, word, path=tmp_path / "none")


def test_words_are_strings(tmp_path):
    with pytest.raises(TypeError, match="policy: expected a str, found bytes"):
        ipsecq.set_policy(0, b"out none", path=tmp_path / "none")
    with pytest.raises(TypeError, match="direction: expected a str, found bytes"):
        ipsecq.get_policy(0, b"out", path=tmp_path / "none")
    with pytest.raises(ValueError, match="in or out"):
        ipsecq.get_policy(0, "fwd", path=tmp_path / "none")
