"""Log lines: plain text, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from disagg_ray.text import printable

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")


MAX_CHARS = 4000
"""Longest message logged."""


class TextFormatter(logging.Formatter):
    """The message alone, made one printable line: it may hold file names and contents."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(record.message, MAX_CHARS)


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger, message; `request_id` where a line is about a request, `error` with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage(), MAX_CHARS),
        }
        if request_id := getattr(record, "request_id", None):
            fields["request_id"] = request_id
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def set_up(log_format: Format = "text", *, quiet: bool = False) -> None:
    """Send log lines to standard error.

    As JSON they include each finished stage of a request, which otherwise the progress display shows.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(log_format == "json")  # libraries' warnings would be lines of text
    if log_format == "json" and not quiet:
        logging.getLogger("disagg_ray").setLevel(logging.DEBUG)
