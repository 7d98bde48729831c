"""The audit log: every prediction in HOME/audit.sqlite, chained by hashes so that a change shows.

A row's hash is SHA-256(hash of the row before | canonical JSON of the row's fields), so whoever changes, inserts or
removes a row must compute all later ones anew, and `verify` finds it when the last hash was noted elsewhere; cutting
off the end shows only there. Inputs stand in a table of their own, tied to their row by the digest in it, and may be
deleted without breaking the chain.

When the file has become large, or old, it is renamed to `audit-000001.sqlite` and so on, and the next one begins with
the last hash: the chain goes on. SQLite in WAL mode, so that others read while the peer writes. Blocking; knows no
clock and no threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from gossipml.errors import UserError

NAME = "audit.sqlite"
_OLD = re.compile(r"audit-(\d{6})\.sqlite")
FIRST_HASH = bytes(32)
BUSY_SECONDS = 2.0  # for a reader to let go

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chain (first INTEGER NOT NULL, previous BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS predictions (
    n INTEGER PRIMARY KEY, time REAL NOT NULL, route TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL,
    peer TEXT NOT NULL, status INTEGER NOT NULL, size INTEGER NOT NULL, input TEXT NOT NULL, answer TEXT NOT NULL,
    seconds REAL NOT NULL, hash BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS inputs (n INTEGER PRIMARY KEY, content BLOB NOT NULL);
"""


@dataclass(frozen=True)
class Entry:
    """One prediction, or a gap."""

    time: float
    """Seconds since 1970."""
    route: str
    """The path that was asked, and to whom it was forwarded when it was not answered here; or which peer asked; "lost"
    where entries could not be written, then `size` is how many."""
    model: str
    version: str
    peer: str
    """Who computed the answer."""
    status: int
    """Of HTTP."""
    size: int
    """Bytes of the input."""
    input: str
    """SHA-256 of the input, in hexadecimal."""
    answer: str
    """What was answered, or the beginning of it."""
    seconds: float


@dataclass(frozen=True)
class Row:
    n: int
    """From 1 on, over all files."""
    entry: Entry
    hash: bytes


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    rows: int
    files: int
    first: int
    """Number of the oldest row that is kept; 0 when there is none."""
    last_hash: str
    """To be noted elsewhere: it stands for everything up to now."""
    problem: str
    """The first thing that is wrong, in a sentence; empty when nothing is."""


_FIELDS = tuple(field.name for field in fields(Entry))
_INSERT = f"INSERT INTO predictions (n, {', '.join(_FIELDS)}, hash) VALUES ({', '.join('?' * (len(_FIELDS) + 2))})"
_SELECT = f"SELECT n, {', '.join(_FIELDS)}, hash FROM predictions"


class AuditLog:
    """The newest file, open for writing. OSError or sqlite3.Error for whatever the disk has against it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / NAME
        os.close(os.open(self._file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(self._file, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "PRAGMA synchronous=NORMAL"
            )  # a crash of the machine may cost the last moments, whole rows
            self._db.executescript(_SCHEMA)
            self._n, self._hash, self.begun = self._last()
        except BaseException:
            self._db.close()
            raise

    def append(self, entries: Sequence[tuple[Entry, bytes | None]]) -> None:
        """Add entries, each with its input or None, all of them or none."""
        n, previous = self._n, self._hash
        rows, inputs = [], []
        for entry, content in entries:
            n += 1
            previous = link(previous, n, entry)
            rows.append((n, *astuple(entry), previous))
            if content is not None:
                inputs.append((n, content))
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(_INSERT, rows)
            self._db.executemany("INSERT INTO inputs VALUES (?, ?)", inputs)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        if rows and self.begun is None:
            self.begun = entries[0][0].time
        self._n, self._hash = n, previous

    def size(self) -> int:
        """Bytes of the file and of what is still to be brought into it."""
        paths = (self._file, self._file.with_name(NAME + "-wal"))
        return sum(path.stat().st_size for path in paths if path.exists())

    def rotate(self) -> AuditLog:
        """Close this file under an old one's name; the next, which goes on with the chain."""
        self.close()
        self._file.rename(self._folder / f"audit-{_number(self._folder) + 1:06}.sqlite")
        return AuditLog(self._folder)

    def close(self) -> None:
        self._db.close()

    def _last(self) -> tuple[int, bytes, float | None]:
        """Number and hash of the last row, and when the first one of this file was made."""
        row = self._db.execute("SELECT n, hash FROM predictions ORDER BY n DESC LIMIT 1").fetchone()
        begun = self._db.execute("SELECT time FROM predictions ORDER BY n LIMIT 1").fetchone()
        if row is None:
            row = self._db.execute("SELECT first - 1, previous FROM chain").fetchone()
        if row is None:
            row = _end_of_older(self._folder)
            if row[0]:
                self._db.execute("INSERT INTO chain VALUES (?, ?)", (row[0] + 1, row[1]))
        return row[0], row[1], begun[0] if begun else None


def set_aside(folder: Path) -> Path:
    """Rename a file that SQLite cannot read any more; where it is now."""
    damaged = folder / f"{NAME}.damaged"
    (folder / NAME).replace(damaged)
    for suffix in ("-wal", "-shm"):
        (folder / (NAME + suffix)).unlink(missing_ok=True)
    return damaged


def forget(folder: Path, before: float) -> int:
    """Remove the older files whose last entry was made before that time; how many."""
    removed = 0
    for file in _files(folder)[:-1]:
        with closing(_open(file)) as db:
            (newest,) = db.execute("SELECT max(time) FROM predictions").fetchone()
        if newest is not None and newest >= before:
            break
        file.unlink()
        removed += 1
    return removed


def link(previous: bytes, n: int, entry: Entry) -> bytes:
    """The hash of a row."""
    text = json.dumps([n, *astuple(entry)], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(previous + text.encode()).digest()


def read(folder: Path, *, model: str = "", newest: int | None = None) -> Iterator[Row]:
    """The rows of all files, oldest first; the `newest` alone, or those of a model. UserError when there is no log."""
    files = _files(folder)
    if not files:
        raise UserError(f"there is no audit log in {folder} yet; a peer writes it when it is asked for predictions")
    wanted, values = (" WHERE model = ?", [model]) if model else ("", [])
    if newest is None:
        for file in files:
            with closing(_open(file)) as db:
                yield from map(_row, db.execute(f"{_SELECT}{wanted} ORDER BY n", values))
        return
    rows: list[Row] = []
    for file in reversed(files):
        with closing(_open(file)) as db:
            left = newest - len(rows)
            rows += map(_row, db.execute(f"{_SELECT}{wanted} ORDER BY n DESC LIMIT ?", [*values, left]))
    yield from reversed(rows)


def input_of(folder: Path, n: int) -> bytes | None:
    """The input of a row, when it was kept."""
    for file in _files(folder):
        with closing(_open(file)) as db:
            if found := db.execute("SELECT content FROM inputs WHERE n = ?", [n]).fetchone():
                return bytes(found[0])
    return None


def verify(folder: Path) -> Verdict:
    """Compute the whole chain anew. UserError when there is no log."""
    rows, first, previous, problem = 0, 0, None, ""
    files = _files(folder)
    for row in read(folder):
        if previous is None:
            first, previous = row.n, _begin(files[0]) or FIRST_HASH
        elif row.n != first + rows:
            problem = problem or f"the entries {first + rows} to {row.n - 1} are missing"
        expected = link(previous, row.n, row.entry)
        if expected != row.hash:
            problem = problem or f"entry {row.n} was changed, or one before it was removed or added"
        previous, rows = row.hash, rows + 1
    if not problem and first > 1 and _begin(files[0]) is None:
        problem = f"the log begins with entry {first}, and does not say what was before"
    for file in files if not problem else ():
        with closing(_open(file)) as db:
            for n, digest, content in db.execute(
                "SELECT n, input, content FROM inputs LEFT JOIN predictions USING (n) ORDER BY n"
            ):
                if hashlib.sha256(content).hexdigest() != digest:
                    problem = problem or f"the input kept for entry {n} is another one"
    return Verdict(rows, len(files), first, (previous or FIRST_HASH).hex(), problem)


def _files(folder: Path) -> list[Path]:
    """Oldest first."""
    old = sorted(file for file in folder.glob("audit-*.sqlite") if _OLD.fullmatch(file.name))
    newest = folder / NAME
    return [*old, newest] if newest.exists() else old


def _number(folder: Path) -> int:
    return max((int(match[1]) for file in _files(folder) if (match := _OLD.fullmatch(file.name))), default=0)


def _end_of_older(folder: Path) -> tuple[int, bytes]:
    """Where the chain ends before the newest file: it was lost or set aside, or there never was another."""
    for file in reversed(_files(folder)[:-1]):
        with closing(_open(file)) as db:
            row = db.execute("SELECT n, hash FROM predictions ORDER BY n DESC LIMIT 1").fetchone()
        if row is not None:
            return row[0], row[1]
    return 0, FIRST_HASH


def _begin(file: Path) -> bytes | None:
    with closing(_open(file)) as db:
        row = db.execute("SELECT previous FROM chain").fetchone()
    return None if row is None else bytes(row[0])


def _open(file: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
        db.execute("SELECT count(*) FROM chain")
    except sqlite3.Error as error:
        raise UserError(f"cannot read {file}: {error}") from None
    return db


def _row(values: Sequence[object]) -> Row:
    n, *entry, digest = values
    assert isinstance(n, int) and isinstance(digest, bytes)
    return Row(n, Entry(*entry), digest)  # type: ignore[arg-type]  # SQLite gives what the schema says
