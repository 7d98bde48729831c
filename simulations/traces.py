"""Measured delays and times of presence, from CSV files. A hole in one is an error that names its line.

A first line that is no number is taken for the heading. Times of a churn trace are virtual seconds.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError

MAX_LINES = 10_000_000  # bounds the memory: 80 MB of delays


def read_delays(file: str) -> NDArray[np.float64]:
    """Seconds, in the order of the file: one number a line, or the first of several."""
    delays = [_numbers(line, where, 1)[0] for line, where in _lines(file)]
    for number, delay in enumerate(delays, 1):
        if not 0 <= delay < math.inf:
            raise UserError(f"{file}: the delay number {number} is {delay:g} s; delays are finite and not below 0")
    return np.array(delays)


def read_presence(file: str, peers: int) -> dict[int, list[tuple[float, float]]]:
    """For each peer in the file when it is there, ascending: lines `peer,from,to`, peers counted from 0; the last `to`
    may be inf."""
    presence: dict[int, list[tuple[float, float]]] = {}
    for line, where in _lines(file):
        peer, start, end = _numbers(line, where, 3)
        if not (peer.is_integer() and 0 <= peer < peers):
            raise UserError(f"{where}: there is no peer {peer:g}; write a whole number from 0 to {peers - 1}")
        if not 0 <= start < end:
            raise UserError(f"{where}: from {start:g} s to {end:g} s is no time; write peer,from,to with from < to")
        presence.setdefault(int(peer), []).append((start, end))
    for peer, times in presence.items():
        times.sort()
        for (_, before), (after, _) in pairwise(times):
            if after < before:
                raise UserError(f"{file}: peer {int(peer)} comes at {after:g} s while it is there until {before:g} s")
    return presence


def _lines(file: str) -> list[tuple[str, str]]:
    """The lines with where each is, for messages; without a heading."""
    try:
        with Path(file).expanduser().open(encoding="utf-8") as text:
            lines = [line.strip() for _, line in zip(range(MAX_LINES + 1), text, strict=False)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the trace {file} cannot be read: {getattr(error, 'strerror', '') or error}") from None
    if len(lines) > MAX_LINES:
        raise UserError(f"the trace {file} has more than {MAX_LINES:,} lines; give a part of it")
    numbered = [(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]
    if numbered and not _is_number(numbered[0][0].split(",")[0]):
        del numbered[0]
    if not numbered:
        raise UserError(f"the trace {file} is empty")
    return numbered


def _numbers(line: str, where: str, count: int) -> list[float]:
    fields = line.split(",")
    if len(fields) < count or not all(map(_is_number, fields[:count])):
        shown = line[:60] or "nothing"
        raise UserError(f"{where}, holds {shown!r} where {count} number{'s' * (count > 1)} should be: mend or drop it")
    return [float(field) for field in fields[:count]]


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
