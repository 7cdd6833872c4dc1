"""Makes one side of every test late, each time: what the dice of ``stalls.py`` seldom meet between two lines of a test.

``make test PYTEST="--late SIDE tests/unit"``: whoever looks, without waiting, for what the late side has yet to do, fails.

- ``threads``: a thread that a test began starts late, and is late whenever something woke it;
- ``main``: the test itself is, so that everybody else is ahead of it;
- ``children``: what a test started in the background stands still before it has done anything.
"""

import contextlib
import functools
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time

SIDES = "threads", "main", "children"
LATE = 0.1
"""Seconds of a thread that begins or wakes."""
FREE = 0.002
"""Seconds for which a thread that was late goes on undisturbed: a thousand datagrams may come in a row."""
CHILD = 0.7
"""Seconds of a program."""

_sleep = time.sleep
_own = threading.local()


def _hold(side):
    main = threading.current_thread() is threading.main_thread()
    if main == (side == "main") and time.monotonic() - getattr(_own, "held", 0.0) > FREE:
        _sleep(LATE)
        _own.held = time.monotonic()


def _after(side, call):
    @functools.wraps(call)
    def late(*args, **kwargs):
        try:
            return call(*args, **kwargs)
        finally:
            _hold(side)

    return late


def _before(side, call):
    @functools.wraps(call)
    def late(*args, **kwargs):
        _hold(side)
        return call(*args, **kwargs)

    return late


def _poller(side, factory):
    """``select.poll`` and ``select.epoll`` are made in C: their objects are wrapped."""

    class Poller:
        def __init__(self, *args, **kwargs):
            self._made = factory(*args, **kwargs)
            self.poll = _after(side, self._made.poll)

        def __getattr__(self, name):
            return getattr(self._made, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._made.close()

    return Poller


def _late_threads(side):
    select.select = _after(side, select.select)
    select.poll, select.epoll = _poller(side, select.poll), _poller(side, select.epoll)
    # Those that selectors made of them when it was imported.
    selectors.PollSelector._selector_cls, selectors.EpollSelector._selector_cls = select.poll, select.epoll
    for name in ("accept", "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg"):
        setattr(socket.socket, name, _after(side, getattr(socket.socket, name)))
    threading.Event.wait = _after(side, threading.Event.wait)
    time.sleep = _after(side, time.sleep)
    threading.Thread.run = _before(side, threading.Thread.run)
    threading.Thread.start = _after(side, threading.Thread.start)


def _later(pid):
    time.sleep(CHILD)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _late_children():
    start = subprocess.Popen.__init__

    def late(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if sys._getframe(1).f_code is subprocess.run.__code__:  # whose caller waits for its end
            return
        os.kill(self.pid, signal.SIGSTOP)
        threading.Thread(target=_later, args=(self.pid,), daemon=True).start()

    subprocess.Popen.__init__ = late


def begin(side):
    """For the rest of this process."""
    if side == "children":
        _late_children()
    else:
        _late_threads(side)
