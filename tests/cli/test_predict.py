"""What `gossipml predict` makes of its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossipml.cli import predict
from gossipml.errors import UserError

Asked = tuple[str, str, object]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    calls: list[Asked] = []
    monkeypatch.setattr(predict, "fetch_json", lambda api, method, path, body=None: calls.append((method, path, body)))
    return calls


def test_inputs_are_read_as_people_write_them(asked: list[Asked], tmp_path: Path) -> None:
    (tmp_path / "row.csv").write_text("1,2.5,3\n")
    (tmp_path / "row.json").write_text('{"a": 1}')
    for inputs in (["a=0", "b=1 & more"], ["0,0,5"], ["0", "0", "5"], ["[1, 2]"], ['{"a": "b=c"}']):
        predict.ask_for("api", "xor", inputs)
    for name in ("row.csv", "row.json"):
        predict.ask_for("api", "xor", [str(tmp_path / name)])
    assert asked == [
        ("GET", "/predict/xor?a=0&b=1+%26+more", None),
        ("POST", "/predict/xor", [0, 0, 5]),
        ("POST", "/predict/xor", [0, 0, 5]),
        ("POST", "/predict/xor", [1, 2]),
        ("POST", "/predict/xor", {"a": "b=c"}),
        ("POST", "/predict/xor", [1, 2.5, 3]),
        ("POST", "/predict/xor", {"a": 1}),
    ]


def test_what_is_no_input_is_said(asked: list[Asked], tmp_path: Path) -> None:
    (tmp_path / "image.csv").write_bytes(b"\xff\xfe\x00")
    for inputs in (["hello"], [str(tmp_path / "missing.csv")], [str(tmp_path / "image.csv")]):
        with pytest.raises(UserError):
            predict.ask_for("api", "xor", inputs)
    assert asked == []
