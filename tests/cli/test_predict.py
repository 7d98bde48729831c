"""What `gossipml predict` makes of its arguments, and how it shows the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossipml.cli import predict
from gossipml.errors import UserError

Asked = tuple[str, str, object, str]
JSON = "application/json"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    calls: list[Asked] = []

    def fetch(api: str, method: str, path: str, body: object = None, *, media: str = JSON) -> None:
        calls.append((method, path, body, media))

    monkeypatch.setattr(predict, "fetch_json", fetch)
    return calls


def test_inputs_are_read_as_people_write_them(asked: list[Asked], tmp_path: Path) -> None:
    (tmp_path / "row.csv").write_text("1,2.5,red\n")
    (tmp_path / "row.json").write_text('{"a": 1}')
    (tmp_path / "digit.PNG").write_bytes(b"\x89PNG")
    for inputs in (["a=0", "b=1 & more"], ["0,0,5"], ["0", "0", "5"], ["[1, 2]"], ['{"a": "b=c"}']):
        predict.ask_for("api", "xor", inputs)
    for name in (str(tmp_path / "row.csv"), f"@{tmp_path}/row.csv", f"@{tmp_path}/row.json", f"@{tmp_path}/digit.PNG"):
        predict.ask_for("api", "xor", [name])
    predict.ask_for("api", "xor", ["1", "red"], as_csv=True)
    predict.ask_for("api", "xor@ab12", ["a=0"])
    predict.ask_for("api", "xor@ab12", ["0,1"])
    assert asked == [
        ("GET", "/predict/xor?a=0&b=1+%26+more", None, JSON),
        ("POST", "/predict/xor", [0, 0, 5], JSON),
        ("POST", "/predict/xor", [0, 0, 5], JSON),
        ("POST", "/predict/xor", [1, 2], JSON),
        ("POST", "/predict/xor", {"a": "b=c"}, JSON),
        ("POST", "/predict/xor", b"1,2.5,red", "text/csv"),
        ("POST", "/predict/xor", b"1,2.5,red", "text/csv"),
        ("POST", "/predict/xor", {"a": 1}, JSON),
        ("POST", "/predict/xor", b"\x89PNG", "image/png"),
        ("POST", "/predict/xor", b"1,red", "text/csv"),
        ("GET", "/predict/xor?a=0&version=ab12", None, JSON),
        ("POST", "/predict/xor?version=ab12", [0, 1], JSON),
    ]


def test_what_is_no_input_is_said(asked: list[Asked], tmp_path: Path) -> None:
    (tmp_path / "image.csv").write_bytes(b"\xff\xfe\x00")
    for inputs in (["hello"], [str(tmp_path / "missing.csv")], [str(tmp_path / "image.csv")], ["@file.exe"]):
        with pytest.raises(UserError):
            predict.ask_for("api", "xor", inputs)
    assert asked == []


def test_the_answer_shows_a_bar_for_each_label_the_version_and_the_peer(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"label": "cat", "probabilities": [0.75, 0.25], "model": "pets", "version": "ab12", "peer": "annaannaanna"}
    predict.show(answer, ["cat", "dog"])
    assert capsys.readouterr().out.splitlines() == [
        "label        cat",
        "cat ██████████████████        75.0 %",
        "dog ██████                    25.0 %",
        "pets@ab12 on peer annaanna",
    ]


def test_without_labels_the_numbers_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    predict.show({"result": 1, "probability": 0.9, "model": "xor", "version": "v", "peer": "p"}, [])
    assert capsys.readouterr().out.splitlines() == ["result       1", "probability  0.9", "xor@v on peer p"]


def test_what_another_peer_says_moves_no_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "fetch_json", lambda *_: {"parameters": {"labels": ["a\x1b[2J", "b\n"]}})
    answer = {"label": "a\x1b[2J", "probabilities": [0.5, 0.5], "model": "m", "version": "v", "peer": "p"}
    predict.show(answer, predict._labels("api", answer))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a?[2J", "b?"]
    assert lines[0].split()[1] == "a?[2J"


def test_of_many_labels_the_likeliest_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shares = [n / 1225 for n in range(50)]
    answer = {"label": "l49", "probabilities": shares, "model": "m", "version": "v", "peer": "p"}
    predict.show(answer, [f"l{n}" for n in range(50)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["l49", "l48", "l47"]
    assert lines[-2] == "and 40 more, each with less"
