"""The log as JSON lines."""

from __future__ import annotations

import json
import logging
import sys

from gossipml.daemon.logs import JsonLines


def record(message: str, *args: object, exc_info: bool = False) -> logging.LogRecord:
    info = sys.exc_info() if exc_info else None
    made = logging.LogRecord("gossipml.peer", logging.WARNING, "file.py", 1, message, args, info)
    made.created = 1_795_000_000.25
    return made


def test_a_record_is_one_json_object_on_one_line() -> None:
    text = JsonLines().format(record("two\nlines of %s", "é"))
    assert "\n" not in text
    assert json.loads(text) == {
        "time": "2026-11-18T11:06:40.250+00:00",
        "level": "warning",
        "logger": "gossipml.peer",
        "message": "two\nlines of é",
    }


def test_a_traceback_stands_in_its_own_member() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = json.loads(JsonLines().format(record("failed", exc_info=True)))
    assert line["message"] == "failed"
    assert line["traceback"].endswith("ValueError: broken")
