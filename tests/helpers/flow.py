"""A flow that goes on while something breaks: ping, a hundred packets a second, and what became of them."""

import itertools
import re
import signal
import time


class Flow:
    """``with Flow(space, address) as flow``: pings until the block ends; ``sent``, ``received``, ``outage``."""

    def __init__(self, space, address, *, interval=0.01):
        self.space, self.address, self.interval = space, address, interval
        self._log = space.lab.directory / f"flow-{time.monotonic_ns()}"

    def __enter__(self):
        self._process = self.space.popen(
            "ping", "-n", "-D", "-i", str(self.interval), "-W", "1", self.address, log=self._log
        )
        deadline = time.monotonic() + 20
        while self._answers() < 3:
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        # What is on its way may still arrive.
        time.sleep(0.3)
        self._process.send_signal(signal.SIGINT)
        self._process.wait(20)
        text = self._log.read_text()
        summary = re.search(r"(\d+) packets transmitted, (\d+) received", text)
        assert summary, text[-500:]
        self.received = int(summary[2])
        # The last request may be younger than any answer can be: what counts is what was sent before the last answer.
        self.sent = max((int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", text)), default=int(summary[1]))
        times = [float(stamp) for stamp in re.findall(r"^\[(\d+\.\d+)\] .*icmp_seq=", text, re.MULTILINE)]
        self.outage = max((after - before for before, after in itertools.pairwise(times)), default=0.0)

    def _answers(self):
        return self._log.read_text().count("bytes from") if self._log.exists() else 0

    def goes_on(self, answers=10, timeout=20.0):
        """Wait until so many more answers have come."""
        wanted, deadline = self._answers() + answers, time.monotonic() + timeout
        while self._answers() < wanted:
            assert time.monotonic() < deadline, f"no {answers} answers in {timeout} s"
            time.sleep(0.02)
