"""Where the daemon's log goes: HOME/log/peer.log, rotated, and short lines on standard error.

Secrets never reach it: nothing that holds one has a `repr` that shows it, and no part logs a token or a key.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from datetime import UTC, datetime
from json import dumps
from pathlib import Path

FILE_BYTES = 4 << 20  # a month of an ordinary peer
FILES = 5
FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
SHORT_FORMAT = "%(asctime)s %(message)s"


def start_logging(file: Path, *, verbose: bool, json: bool = False) -> None:
    """Send the log of this process to `file` and, in short, to standard error; both as JSON lines when wanted."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lasting = _Quiet(file, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8")
    lasting.setFormatter(JsonLines() if json else logging.Formatter(FORMAT))
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(JsonLines() if json else _Short(SHORT_FORMAT, "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [lasting, console]
    root.setLevel(logging.WARNING)
    logging.getLogger("gossipml").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.raiseExceptions = False  # a closed terminal must not end the daemon


class _Quiet(logging.handlers.RotatingFileHandler):
    """A full disk costs lines of the log, never the daemon."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class JsonLines(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, and traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return dumps(line, ensure_ascii=False)


class _Short(logging.Formatter):
    """No traceback on the terminal: it stands in the file."""

    def format(self, record: logging.LogRecord) -> str:
        shown = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        if record.levelno >= logging.WARNING:
            shown.msg, shown.args = f"{record.levelname.lower()}: {record.getMessage()}", None
        return super().format(shown)
