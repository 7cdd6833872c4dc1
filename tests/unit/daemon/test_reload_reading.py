"""A reload reads its files beside the event loop, and one reload at a time."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from ipsecq.daemon import content
from ipsecq.daemon.reload import Reloads
from ipsecq.daemon.sampling import History
from ipsecq.errors import ConfigError


@pytest.fixture
def supervisor():
    """As much of one as a reload needs whose files have a mistake."""
    return SimpleNamespace(history=History(), config=SimpleNamespace(path="x"))


def test_while_a_reload_reads_the_loop_turns_and_a_second_reload_waits(supervisor, monkeypatch):
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
    reading = []

    def read(path):
        reading.append(path)
        begun.release()
        assert go_on.acquire(timeout=60)
        raise ConfigError("as it was", file=path)

    monkeypatch.setattr(content, "read", read)

    async def main():
        reloads = Reloads(supervisor, journal=False)
        first, second = (asyncio.ensure_future(reloads.reload()) for _ in range(2))
        for number in (1, 2):
            while not begun.acquire(blocking=False):
                await asyncio.sleep(0.01)
            assert len(reading) == number
            assert not second.done()
            go_on.release()
            if number == 1:
                with pytest.raises(ConfigError):
                    await first
        with pytest.raises(ConfigError):
            await second

    asyncio.run(main())
    assert (supervisor.history.reloads, supervisor.history.reload_failures) == (2, 2)
