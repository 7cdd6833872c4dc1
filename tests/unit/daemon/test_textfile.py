"""What an operator wrote is read from regular files of a bounded size; nothing else holds up a reader."""

import asyncio
import os
import threading

import pytest

from ipsecq.daemon import content
from ipsecq.daemon.textfile import read_text
from ipsecq.errors import ConfigError


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "file").write_bytes("# ä\r\nflush;\n".encode())
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_text(tmp_path / name) == "# ä\nflush;\n"


def test_a_fifo_a_device_and_a_directory_are_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    odd = "expected a regular file, found a"
    for path, why in (
        (tmp_path / "fifo", f"{odd} FIFO"), ("/dev/zero", f"{odd} character device"), (tmp_path, "Is a directory"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            read_text(path)
        assert str(caught.value) == f"{path}: cannot be read: {why}"


def test_a_file_beyond_the_limit_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"#" * 100)
    assert len(read_text(path, 100)) == 100
    with pytest.raises(ConfigError, match=rf"{path}: cannot be read: expected at most 99 octets"):
        read_text(path, 99)


def test_what_is_no_utf_8_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="expected UTF-8 text"):
        read_text(tmp_path / "file")


def test_a_policy_file_that_is_a_fifo_is_refused_with_its_name(tmp_path):
    os.mkfifo(tmp_path / "setkey.conf")
    (tmp_path / "ipsecq.toml").write_text('[daemon]\npolicy = ["setkey.conf"]\n')
    with pytest.raises(ConfigError, match=r"setkey\.conf: cannot be read: expected a regular file, found a FIFO"):
        content.read(tmp_path / "ipsecq.toml")


def test_files_are_read_beside_the_event_loop(tmp_path, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def read(path):
        reading.set()
        assert go_on.wait(60)
        raise ConfigError("as it was", file=str(path))

    monkeypatch.setattr(content, "read", read)

    async def main():
        task = asyncio.ensure_future(content.read_aside(tmp_path))
        while not reading.is_set():
            await asyncio.sleep(0.01)
        assert not task.done()  # the loop turns, and the reader waits
        go_on.set()
        with pytest.raises(ConfigError, match="as it was"):
            await task

    asyncio.run(main())


def test_a_loop_that_ends_does_not_wait_for_files(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(content, "read", lambda path: go_on.wait(600))

    async def main():
        task = asyncio.ensure_future(content.read_aside(tmp_path))
        await asyncio.sleep(0)
        task.cancel()

    try:
        asyncio.run(main())
        assert not go_on.is_set()
        left = [thread for thread in threading.enumerate() if thread.name == "files"]
        assert left
        assert all(thread.daemon for thread in left)
    finally:
        go_on.set()
