"""Log lines: one line each, bounded in rate, without keys."""

import io
import json
import logging
import sys

from ipsecq.daemon.log import BURST, RateLimit, configure
from ipsecq.daemon.options import LogConfig
from ipsecq.secret import Key


def lines(style, log):
    stream = io.StringIO()
    logger = configure(LogConfig(level="debug", format=style), stream=stream, journal=style == "text")
    log(logger)
    return stream.getvalue().splitlines()


def test_json_lines_are_json():
    [line] = lines("json", lambda log: log.warning("worker %d died", 2, extra={"fields": {"worker": 2}}))
    entry = json.loads(line)
    assert entry["level"] == "warning"
    assert entry["message"] == "worker 2 died"
    assert entry["worker"] == 2
    assert entry["time"].endswith("Z")


def test_journal_lines_carry_their_priority():
    assert lines("text", lambda log: log.error("x")) == ["<3>x"]


def test_a_message_cannot_forge_a_second_line():
    [line] = lines("text", lambda log: log.info("name %s", "a\n<0>forged"))
    assert "\n" not in line


def test_an_exception_is_one_line_without_values():
    def log(logger):
        key = Key(b"secretsecret")
        try:
            int(f"bad {key}")
        except ValueError:
            logger.error("failed", exc_info=sys.exc_info())

    [line] = lines("text", log)
    assert "ValueError: invalid literal" in line
    assert "<Key of 96 bits>" in line
    assert "test_log.py:" in line
    assert "secret" not in line.replace("test_log", "")


def test_a_flood_of_one_template_is_cut_and_reported_and_others_pass():
    now = [0.0]
    limit = RateLimit(lambda: now[0])

    def record(message, level=logging.INFO):
        return logging.LogRecord("ipsecq", level, "", 0, message, (), None)

    passed = sum(limit.filter(record("flood")) for _ in range(1000))
    assert passed == BURST
    assert limit.filter(record("other"))
    assert limit.filter(record("flood", logging.ERROR))
    now[0] += 1.0
    again = record("flood")
    assert limit.filter(again)
    assert f"{1000 - BURST} more" in again.msg
