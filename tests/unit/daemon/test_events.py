"""Events: every reader gets them in order, none holds up the daemon, and what one missed it is told."""

import asyncio

from ipsecq.daemon.events import BURST, PART, QUEUE, EventBus


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def bus(clock=None):
    return EventBus(lambda: {"version": "1"}, clock or Clock())


def drained(reader):
    found = []
    while reader._waiting:
        found += asyncio.run(reader.take())
    return found


def test_a_reader_waits_for_news():
    async def scenario():
        events = bus()
        reader = events.subscribe()
        await reader.take()
        news = asyncio.ensure_future(reader.take())
        await asyncio.sleep(0.01)
        assert not news.done()
        events.publish("x")
        return await asyncio.wait_for(news, 30)

    assert [event["event"] for event in asyncio.run(scenario())] == ["x"]


def test_a_reader_is_greeted_and_gets_what_comes_after():
    events = bus()
    events.publish("before")
    reader = events.subscribe()
    other = events.subscribe()
    events.publish("sa_added", spi="0x1")
    expected = [
        {"time": 1000.0, "event": "hello", "version": "1"},
        {"time": 1000.0, "event": "sa_added", "spi": "0x1"},
    ]
    assert drained(reader) == expected
    other.close()
    events.publish("sa_deleted", spi="0x1")
    assert drained(other) == expected
    assert [event["event"] for event in drained(reader)] == ["sa_deleted"]


def test_a_reader_that_falls_behind_keeps_the_oldest_and_is_told_how_many_it_missed():
    events = bus()
    reader = events.subscribe()
    for number in range(QUEUE + 500):
        events.publish("x", number=number)
    found = drained(reader)
    assert [event.get("number") for event in found[1:-1]] == list(range(QUEUE - 1))
    assert (found[-1]["event"], found[-1]["count"]) == ("lost", 501)
    events.publish("x", number=-1)
    assert [event["number"] for event in drained(reader)] == [-1]


def test_a_reader_gets_parts_not_everything_at_once():
    events = bus()
    reader = events.subscribe()
    for number in range(3 * PART):
        events.publish("x", number=number)
    assert len(asyncio.run(reader.take())) == PART


def test_a_flood_of_one_kind_is_thinned_and_says_so_and_leaves_the_others_alone():
    clock = Clock()
    events = bus(clock)
    reader = events.subscribe()
    for number in range(1000):
        events.publish_limited("acquire", number=number)
    events.publish_limited("moved", number=0)
    clock.now += 1.0
    events.publish_limited("acquire", number=1000)
    found = drained(reader)[1:]
    assert [event["number"] for event in found] == [*range(int(BURST)), 0, 1000]
    assert found[-1]["left_out"] == 1000 - BURST


def test_without_readers_nothing_is_kept():
    events = bus()
    events.publish("x")
    events.publish_limited("x")
    assert events.readers == set()
