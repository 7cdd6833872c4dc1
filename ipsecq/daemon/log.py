"""Log lines for people (text) and for programs (JSON), to standard error, never more than a reader can follow."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

from ipsecq.daemon.options import LogConfig

LOGGER: Final = "ipsecq"
BURST: Final = 20
PER_SECOND: Final = 5.0
_PRIORITY: Final = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_MAX_TEMPLATES: Final = 256


class RateLimit(logging.Filter):
    """A token bucket for each message template: a flood of one kind of line leaves the other kinds alone.

    Errors always pass.  The first line after a silence says how many were left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._buckets: dict[str, tuple[float, float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line goes out."""
        if record.levelno >= logging.ERROR:
            return True
        now = self._clock()
        template = str(record.msg)
        if template not in self._buckets and len(self._buckets) >= _MAX_TEMPLATES:
            self._buckets.clear()
        tokens, then, dropped = self._buckets.get(template, (float(BURST), now, 0))
        tokens = min(float(BURST), tokens + (now - then) * PER_SECOND)
        if tokens < 1.0:
            self._buckets[template] = (tokens, now, dropped + 1)
            return False
        if dropped:
            record.msg = f"{template} ({dropped} more of these were not logged)"
        self._buckets[template] = (tokens - 1.0, now, 0)
        return True


class TextFormatter(logging.Formatter):
    """``<6>message``: the journal takes the priority from the prefix; on a terminal there is a plain level."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        text = _one_line(record)
        if self._journal:
            return f"<{_PRIORITY.get(record.levelname, 6)}>{text}"
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{stamp} {record.levelname.lower():7} {text}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, message, and what the caller passed as ``extra=fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": _one_line(record),
        }
        line.update(getattr(record, "fields", {}))
        return json.dumps(line, default=str)


def _one_line(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        # The place, not the traceback's source lines or values: nothing secret can be in it.
        error, trace = record.exc_info[1], record.exc_info[2]
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        text = f"{text}: {type(error).__name__}: {error}{where}"
    return text.replace("\n", "\\n").replace("\r", "\\r")


def configure(settings: LogConfig, *, journal: bool = False, stream: TextIO | None = None) -> logging.Logger:
    """Set up the logger of the whole daemon and return it; calling it again (reload) replaces the settings."""
    logger = logging.getLogger(LOGGER)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter(journal=journal))
    handler.addFilter(RateLimit())
    logger.handlers[:] = [handler]
    logger.setLevel(settings.level.upper())
    logger.propagate = False
    return logger
