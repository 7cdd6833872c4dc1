import os
import socket
import subprocess
import sys

from ipsecq.daemon.liveness import Watch


def test_a_file_lives_until_its_last_descriptor_is_closed_in_any_process():
    watch = Watch()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        inode = watch.add(sock.fileno())
        assert watch.add(sock.fileno()) == inode
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[sock.fileno()]
        )
    assert watch.alive() == {inode}
    child.kill()
    child.wait()
    assert watch.alive() == set()
    watch.close()


def test_a_duplicate_is_the_same_file_and_watching_keeps_nothing_open():
    watch = Watch()
    left, right = socket.socketpair()
    copy = os.dup(left.fileno())
    inode = watch.add(copy)
    os.close(copy)
    assert watch.alive() == {inode}
    left.close()
    assert right.recv(1) == b""
    assert watch.alive() == set()
    right.close()
    watch.close()
