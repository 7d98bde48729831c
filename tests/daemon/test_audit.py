"""The audit log: what is written, that changes show, that the chain goes on, and that nothing waits for it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from gossipml.api.ports import Prediction
from gossipml.daemon import audit as recording
from gossipml.daemon import audit_log
from gossipml.daemon.audit import Audit, AuditConfig
from gossipml.daemon.audit_log import AuditLog, Entry
from gossipml.env.real import real_env
from gossipml.errors import UserError

ENTRY = Entry(
    1000.5, "/predict/xor", "xor", "v7", "anna", 200, 7, sha256(b"a=0&b=1").hexdigest(), '{"result":1}', 0.002
)
ASKED = Prediction("/predict/xor", "xor", 200, 0.002, b"a=0&b=1", b'{"result":1,"version":"v7","peer":"anna"}', head=41)


def filled(folder: Path, count: int = 5) -> None:
    log = AuditLog(folder)
    log.append([(replace(ENTRY, time=1000.0 + n), b"a=0&b=1") for n in range(count)])
    log.close()


def change(folder: Path, statement: str, file: str = audit_log.NAME) -> None:
    with closing(sqlite3.connect(folder / file, isolation_level=None)) as db:
        db.execute(statement)


def test_what_was_written_is_read_and_its_chain_is_whole(tmp_path: Path) -> None:
    filled(tmp_path)
    filled(tmp_path)  # a later start goes on
    rows = list(audit_log.read(tmp_path))
    assert [row.n for row in rows] == list(range(1, 11))
    assert rows[0].entry == replace(ENTRY, time=1000.0)
    assert [row.n for row in audit_log.read(tmp_path, newest=2)] == [9, 10]
    assert list(audit_log.read(tmp_path, model="other")) == []
    assert audit_log.input_of(tmp_path, 3) == b"a=0&b=1"
    verdict = audit_log.verify(tmp_path)
    assert (verdict.rows, verdict.problem, verdict.last_hash) == (10, "", rows[-1].hash.hex())
    assert (tmp_path / audit_log.NAME).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        *((f"UPDATE predictions SET {column} = {value} WHERE n = 3", "entry 3 was changed") for column, value in (
            ("time", "7"), ("route", "'/'"), ("model", "'y'"), ("version", "'v8'"), ("peer", "'bert'"),
            ("status", "500"), ("size", "8"), ("input", "''"), ("answer", "'0'"), ("seconds", "1"), ("hash", "x'00'"),
        )),
        ("DELETE FROM predictions WHERE n = 3", "3 to 3 are missing"),
        ("DELETE FROM predictions WHERE n = 1", "entry 2 was changed, or one before it was removed"),
        ("UPDATE predictions SET n = n + 1 WHERE n = 5", "5 to 5 are missing"),
        ("UPDATE inputs SET content = x'00' WHERE n = 2", "the input kept for entry 2"),
        ("INSERT INTO inputs VALUES (99, x'00')", "the input kept for entry 99"),
    ],
)  # fmt: skip
def test_a_change_shows(tmp_path: Path, statement: str, says: str) -> None:
    filled(tmp_path)
    change(tmp_path, statement)
    assert says in audit_log.verify(tmp_path).problem


def test_inputs_may_be_deleted_without_breaking_the_chain(tmp_path: Path) -> None:
    filled(tmp_path)
    change(tmp_path, "DELETE FROM inputs")
    assert audit_log.verify(tmp_path).problem == ""


def test_the_chain_goes_on_over_files_and_their_removal(tmp_path: Path) -> None:
    for _ in range(3):
        filled(tmp_path)
        AuditLog(tmp_path).rotate().close()
    filled(tmp_path)
    verdict = audit_log.verify(tmp_path)
    assert (verdict.rows, verdict.files, verdict.first, verdict.problem) == (20, 4, 1, "")
    assert audit_log.forget(tmp_path, before=900) == 0
    assert audit_log.forget(tmp_path, before=2000) == 3
    verdict = audit_log.verify(tmp_path)
    assert (verdict.rows, verdict.files, verdict.first, verdict.problem) == (5, 1, 16, "")


def test_a_missing_file_in_the_middle_shows(tmp_path: Path) -> None:
    for _ in range(3):
        filled(tmp_path)
        AuditLog(tmp_path).rotate().close()
    filled(tmp_path)
    (tmp_path / "audit-000002.sqlite").unlink()
    assert "6 to 10 are missing" in audit_log.verify(tmp_path).problem


def test_without_a_log_the_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audit log"):
        audit_log.verify(tmp_path)


async def while_recording(folder: Path, config: AuditConfig, *steps: Callable[[Audit], None]) -> Audit:
    """Each step, and time to write between two."""
    audit = Audit(folder, real_env(folder).clock, config)
    async with trio.open_nursery() as nursery:
        await nursery.start(audit.run)
        for step in steps:
            step(audit)
            with trio.fail_after(10):
                while audit._queue:
                    await trio.sleep(0.01)
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    return audit


def rows(folder: Path) -> list[Entry]:
    return [row.entry for row in audit_log.read(folder)]


async def test_a_prediction_is_recorded_with_version_peer_and_digest(tmp_path: Path) -> None:
    await while_recording(tmp_path, AuditConfig(), lambda audit: audit.record(ASKED))
    (entry,) = rows(tmp_path)
    assert entry == replace(ENTRY, time=entry.time, answer=ASKED.answer.decode())
    assert audit_log.input_of(tmp_path, 1) is None


async def test_the_open_inference_protocol_is_understood_with_binary_tensors_too(tmp_path: Path) -> None:
    head = json.dumps({"model_version": "v9", "parameters": {"peer": "bert"}}).encode()
    asked = replace(ASKED, answer=head + b"\xff\x00{", head=len(head))
    await while_recording(tmp_path, AuditConfig(inputs=True), lambda audit: audit.record(asked))
    (entry,) = rows(tmp_path)
    assert (entry.version, entry.peer, entry.answer) == ("v9", "bert", head.decode())
    assert audit_log.input_of(tmp_path, 1) == b"a=0&b=1"


async def test_what_does_not_fit_the_queue_is_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def too_many(audit: Audit) -> None:
        for _ in range(recording.QUEUE_ENTRIES + 10):
            audit.record(ASKED)

    audit = await while_recording(tmp_path, AuditConfig(), too_many, lambda audit: audit.record(ASKED))
    assert (audit.lost, audit.written) == (10, recording.QUEUE_ENTRIES + 1)
    assert [(e.route, e.size) for e in rows(tmp_path) if e.route == "lost"] == [("lost", 10)]
    assert "not in the audit log" in caplog.text
    assert audit_log.verify(tmp_path).problem == ""


async def test_a_full_disk_loses_entries_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RETRY_SECONDS", 0.01)

    def full(log: AuditLog, entries: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def fill(audit: Audit) -> None:
        monkeypatch.setattr(AuditLog, "append", full)
        audit.record(ASKED)

    def free(audit: Audit) -> None:
        assert "takes nothing (database or disk is full)" in audit.problem
        monkeypatch.setattr(AuditLog, "append", append)

    def go_on(audit: Audit) -> None:
        assert audit.problem == "", "nobody had to ask for anything"
        audit.record(ASKED)

    append = AuditLog.append
    audit = await while_recording(tmp_path, AuditConfig(), lambda audit: audit.record(ASKED), fill, free, go_on)
    assert (audit.written, audit.lost) == (2, 1)
    assert [entry.route for entry in rows(tmp_path)] == ["/predict/xor", "lost", "/predict/xor"]
    assert audit_log.verify(tmp_path).problem == ""


async def test_a_damaged_file_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RETRY_SECONDS", 0.01)
    (tmp_path / audit_log.NAME).write_bytes(b"no database at all" * 1000)
    audit = await while_recording(tmp_path, AuditConfig(), *[lambda audit: audit.record(ASKED)] * 2)
    assert (audit.written, audit.lost) == (1, 1)
    assert (tmp_path / f"{audit_log.NAME}.damaged").exists()
    assert audit_log.verify(tmp_path).problem == ""


async def test_large_files_are_closed_and_the_next_one_goes_on(tmp_path: Path) -> None:
    await while_recording(tmp_path, AuditConfig(max_bytes=20_000), *[lambda audit: audit.record(ASKED)] * 3)
    verdict = audit_log.verify(tmp_path)
    assert (verdict.rows, verdict.problem) == (3, "")
    assert verdict.files > 1
