"""Events for whoever watches (``ipsecq monitor``): published by the daemon, taken by readers at their own pace.

Publishing never waits.  Each reader has a bounded queue; what a slow one misses is counted, and the count is the next
thing that it gets.  With no reader an event costs one comparison.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

QUEUE: Final = 2048
"""Events that wait for one reader."""
PART: Final = 256
"""Events that a reader gets at once."""
BURST: Final = 20.0
PER_SECOND: Final = 5.0
"""Events of one limited kind: so many at once, and so many a second from then on."""

Event = dict[str, Any]


class Subscription:
    """One reader's queue: a :class:`ipsecq.daemon.control.Stream`."""

    def __init__(self, bus: EventBus, first: Event) -> None:
        self._bus = bus
        self._waiting: deque[Event] = deque([first])
        self._lost = 0
        self._news = asyncio.Event()
        self._news.set()

    def put(self, event: Event) -> None:
        """Queue, or count as lost."""
        if len(self._waiting) >= QUEUE:
            self._lost += 1
            return
        self._waiting.append(event)
        self._news.set()

    async def take(self) -> list[Event]:
        """What waits, at least one event."""
        while not self._waiting:
            self._news.clear()
            await self._news.wait()
        part = [self._waiting.popleft() for _ in range(min(PART, len(self._waiting)))]
        if self._lost and not self._waiting:
            part.append({"time": part[-1]["time"], "event": "lost", "count": self._lost})
            self._lost = 0
        return part

    def close(self) -> None:
        """Nobody reads any more."""
        self._bus.readers.discard(self)


class EventBus:
    """The daemon's end.  ``hello()`` is what a new reader gets first."""

    def __init__(self, hello: Callable[[], Event], clock: Callable[[], float] = time.time) -> None:
        self.readers: set[Subscription] = set()
        self._hello, self._clock = hello, clock
        self._buckets: dict[str, tuple[float, float, int]] = {}

    def subscribe(self) -> Subscription:
        """A new reader."""
        reader = Subscription(self, {"time": self._clock(), "event": "hello", **self._hello()})
        self.readers.add(reader)
        return reader

    def publish(self, event: str, /, **fields: object) -> None:
        """To every reader."""
        if self.readers:
            record = {"time": self._clock(), "event": event, **fields}
            for reader in self.readers:
                reader.put(record)

    def publish_limited(self, event: str, /, **fields: object) -> None:
        """To every reader, unless too many of the kind came lately; the next one says how many were left out."""
        if not self.readers:
            return
        now = self._clock()
        tokens, then, dropped = self._buckets.get(event, (BURST, now, 0))
        tokens = min(BURST, tokens + max(now - then, 0.0) * PER_SECOND)
        if tokens < 1.0:
            self._buckets[event] = tokens, now, dropped + 1
            return
        self._buckets[event] = tokens - 1.0, now, 0
        self.publish(event, **fields, **({"left_out": dropped} if dropped else {}))
