"""What each route answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

import gossipml
from gossipml.api import openapi, routes
from gossipml.api.budget import parameter_seconds
from gossipml.api.guard import GuardRules
from gossipml.api.ports import (
    JSON,
    Event,
    Health,
    NotReady,
    Overloaded,
    PredictRequest,
)
from gossipml.api.routes import Endpoint
from gossipml.errors import RemoteError, UserError

from .fake_node import DIGITS, FakeNode, client

INFER: dict[str, JSON] = {
    "id": "7",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [0, 1, 1, 1]}],
}


# Probes


async def test_health_is_200_or_503_with_the_sentence() -> None:
    node = FakeNode()
    asker = client(node)
    for route, v2, key in (("/healthz", "/v2/health/live", "live"), ("/readyz", "/v2/health/ready", "ready")):
        assert (await asker.get(route)).status == 200
        assert (await asker.get(v2)).json() == {key: True}
    node.well = Health(False, "the learner crashed five times in a minute")
    node.ready = Health(False, "nothing is trained yet")
    for route, v2, sentence in (
        ("/healthz", "/v2/health/live", node.well.sentence),
        ("/readyz", "/v2/health/ready", node.ready.sentence),
    ):
        for target in (route, v2):
            answer = await asker.get(target)
            assert (answer.status, answer.error) == (503, sentence)
            assert int(answer.headers["retry-after"]) > 0


# /predict


async def test_predict_from_a_query_answers_result_model_version_peer() -> None:
    node = FakeNode()
    answer = await client(node).get("/predict/xor?a=0&b=1")
    assert answer.json() == {"result": 1, "model": "xor", "version": "v7", "peer": "peer1"}
    assert node.asked == [("xor", PredictRequest("json", b'{"a":"0","b":"1"}'))]


async def test_a_query_is_passed_on_as_text() -> None:
    node = FakeNode(failure=UserError("no"))
    await client(node).get("/predict/xor?a=nan&b=%C3%A9+1&c=")
    assert json.loads(node.asked[0][1].body) == {"a": "nan", "b": "é 1", "c": ""}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("a=1&a=2", "'a' is given twice"),
        ("a", "name=value"),
        ("a=%ff", "not UTF-8"),
        ("&".join(["a=1"] * 5000), "4096"),
    ],
)
async def test_a_query_that_is_none_is_refused(query: str, says: str) -> None:
    answer = await client(FakeNode()).get(f"/predict/xor?{query}")
    assert answer.status == 400
    assert says in answer.error


async def test_a_body_is_passed_on_as_it_is_in_the_form_that_its_type_says() -> None:
    node = FakeNode()
    asker = client(node)
    assert (await asker.post("/predict/xor", [1, 1])).json()["result"] == 0
    assert (await asker.post("/predict/xor", b"[1, 0]", "Application/JSON; charset=UTF-8")).json()["result"] == 1
    await asker.post("/predict/xor", b"0,1\r\n", "text/csv; header=absent")
    for media in ("image/png", "image/jpeg"):
        await asker.post("/predict/xor", b"0,1", media)
    assert [(request.form, request.body) for _, request in node.asked] == [
        ("json", b"[1, 1]"),
        ("json", b"[1, 0]"),
        ("csv", b"0,1\r\n"),
        ("picture", b"0,1"),
        ("picture", b"0,1"),
    ]


def form(*parts: bytes) -> bytes:
    return b"".join(b"--xx\r\n" + part + b"\r\n" for part in parts) + b"--xx--\r\n"


async def test_the_one_part_of_a_form_is_the_input() -> None:
    node = FakeNode(failure=UserError("no"))
    head = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n'
    parts = (
        (
            b"Content-Type: image/png\r\n\r\n\x89PNG\r\n\x1a\n\x00\xff\r\r\n",
            ("picture", b"\x89PNG\r\n\x1a\n\x00\xff\r\r\n"),
        ),
        (b"Content-Type: text/csv\r\n\r\n1,2", ("csv", b"1,2")),
        (b"\r\n[1, 2]", ("json", b"[1, 2]")),
    )
    for part, expected in parts:
        await client(node).post("/predict/xor", form(head + part), "multipart/form-data; boundary=xx")
        assert (node.asked[-1][1].form, node.asked[-1][1].body) == expected
    asked = len(node.asked)
    for body in (form(), form(head + parts[0][0], head + parts[1][0]), b"", b"garbage"):
        answer = await client(node).post("/predict/xor", body, "multipart/form-data; boundary=xx")
        assert (answer.status, "send one" in answer.error) == (400, True)
    assert len(node.asked) == asked


@pytest.mark.parametrize(
    ("media", "says"),
    [
        ("application/x-www-form-urlencoded", "Content-Type: application/json` or text/csv or image/png"),
        ("text/plain", "'text/plain' is not understood"),
        ("", "not understood"),
        ("application/json; charset=latin-1", "not understood"),
        ("image/svg+xml", "not understood"),
    ],
)
async def test_a_body_of_another_type_is_415(media: str, says: str) -> None:
    answer = await client(FakeNode()).post("/predict/xor", b"[0, 1]", media)
    assert (answer.status, says in answer.error) == (415, True)


async def test_a_version_and_a_time_may_be_asked_for() -> None:
    node = FakeNode()
    asker = client(node)
    assert (await asker.get("/predict/xor?a=0&b=1&version=v7", prediction_timeout="0.25")).json()["version"] == "v7"
    assert (await asker.post("/predict/xor?version=v7", [0, 1], prediction_timeout="2")).status == 200
    assert [(request.version, request.seconds) for _, request in node.asked] == [("v7", 0.25), ("v7", 2.0)]
    assert (await asker.get("/predict/xor?a=0&b=1&version=v8")).status == 404
    assert "not a version's name" in (await asker.get("/predict/xor?a=0&b=1&version=a/b")).error
    for wrong in ("0", "31", "-1", "nan", "1e1", "soon", "9" * 50):
        answer = await asker.get("/predict/xor?a=0&b=1", prediction_timeout=wrong)
        assert (answer.status, "prediction-timeout" in answer.error) == (400, True)


async def test_input_twice_is_refused() -> None:
    answer = await client(FakeNode()).post("/predict/xor?a=1", [0, 1])
    assert (answer.status, "not as both" in answer.error) == (400, True)


@pytest.mark.parametrize(
    "target",
    [
        "/predict/{}",
        "/v2/models/{}",
        "/v2/models/{}/ready",
        "/v2/models/{}/versions/v7",
        "/v2/models/{}/versions/v7/ready",
    ],
)
async def test_an_unknown_model_is_404_with_the_nearest_names(target: str) -> None:
    asker = client(FakeNode())
    for name, hint in (
        ("xo", "did you mean 'xor'?"),
        ("XOR", "'XOR' is not a model's name"),
        ("..", "'..' is not a model's name"),
        ("-x", "is not a model's name"),
        ("a" * 65, "is not a model's name"),
        ("xor\n", "is not a model's name"),
        ("x" * 5000, "is not a model's name"),
    ):
        answer = await asker.get(target.format(name))
        assert answer.status == 404
        assert hint in answer.error
        assert len(answer.error) < 300


@pytest.mark.parametrize(
    "target", ["/predict/../v1/status", "/predict/a/b", "/predict/", "/v2/models/xor/", "//healthz"]
)
async def test_a_path_that_climbs_or_wanders_leads_nowhere(target: str) -> None:
    node = FakeNode()
    answer = await client(node).get(target)
    assert answer.status == 404
    assert not node.asked


async def test_a_model_that_is_not_ready_is_503_with_the_reason() -> None:
    node = FakeNode()
    asker = client(node)
    for answer in (
        await asker.get("/predict/digits-mlp?a=1"),
        await asker.post("/predict/digits-mlp", [1]),
        await asker.get("/v2/models/digits-mlp/ready"),
        await asker.post("/v2/models/digits-mlp/infer", INFER),
    ):
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (503, DIGITS.reason, "5")


@pytest.mark.parametrize(
    ("failure", "status", "says", "retry"),
    [
        (UserError("a must be 0 or 1"), 400, "a must be 0 or 1", None),
        (NotReady("still training", 3), 503, "still training", "3"),
        (Overloaded("the queue is full"), 503, "the queue is full", "1"),
        (RemoteError("gone"), 502, "the peer that was asked failed: gone", "1"),
    ],
)
async def test_what_the_node_says_becomes_a_status(
    failure: Exception, status: int, says: str, retry: str | None
) -> None:
    for answer in (
        await client(FakeNode(failure=failure)).get("/predict/xor?a=0&b=1"),
        await client(FakeNode(failure=failure)).post("/v2/models/xor/infer", INFER),
    ):
        assert (answer.status, answer.error, answer.headers.get("retry-after")) == (status, says, retry)


async def test_a_model_that_does_not_answer_is_504(autojump_clock: trio.abc.Clock) -> None:
    answer = await client(FakeNode(hold=trio.Event())).get("/predict/xor?a=0&b=1")
    assert (answer.status, "within 30 s" in answer.error) == (504, True)
    began = trio.current_time()
    answer = await client(FakeNode(hold=trio.Event())).get("/predict/xor?a=0&b=1", prediction_timeout="0.5")
    assert (answer.status, "within 0.5 s" in answer.error) == (504, True)
    assert trio.current_time() - began == pytest.approx(0.5, abs=0.1)


async def test_the_timeout_of_the_inference_protocol_is_kept_in_microseconds(autojump_clock: trio.abc.Clock) -> None:
    asker = client(FakeNode(hold=trio.Event()))
    began = trio.current_time()
    answer = await asker.post("/v2/models/xor/infer", {**INFER, "parameters": {"timeout": 250_000}})
    assert (answer.status, "within 0.25 s" in answer.error) == (504, True)
    assert trio.current_time() - began == pytest.approx(0.25, abs=0.1)
    answer = await asker.post("/v2/models/xor/infer", {"parameters": {"timeout": 0}, **INFER}, prediction_timeout="2")
    assert "within 2 s" in answer.error, "the shorter of the two"
    answer = await asker.post("/v2/models/xor/infer", {**INFER, "parameters": {"timeout": 60_000_000}})
    assert "within 30 s" in answer.error, "longer than may be waited is cut, so that clients need no change"
    for wrong in ("7", -1, 0.5, True, None):
        answer = await asker.post("/v2/models/xor/infer", {**INFER, "parameters": {"timeout": wrong}})
        assert (answer.status, "give microseconds" in answer.error) == (400, True)


TENSOR = {"name": "x", "datatype": "BYTES", "shape": [1], "data": ['}]"{"parameters":{"timeout":5}']}


@pytest.mark.parametrize(
    ("request_", "seconds"),
    [
        ({"inputs": [TENSOR], "parameters": {"timeout": 5}}, 5e-6),
        ({"parameters": {"a": "}", "timeout": 5, "b": True}, "inputs": [TENSOR]}, 5e-6),
        ({"inputs": [{**TENSOR, "parameters": {"timeout": 5}}]}, 30.0),
        ({"inputs": [{**TENSOR, "parameters": {"timeout": 5}}], "parameters": {"timeout": 7}}, 7e-6),
        ({"inputs": [TENSOR], "timeout": 5}, 30.0),
        ({"parameters": {"inner": {"parameters": {"timeout": 5}}}, "inputs": [TENSOR]}, 30.0),
        ({"inputs": [TENSOR], "parameters": []}, 30.0),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_the_timeout_is_that_of_the_request_and_of_nothing_in_it(
    request_: dict[str, object], seconds: float, indent: int | None
) -> None:
    assert parameter_seconds(json.dumps(request_, indent=indent).encode()) == seconds


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_whatever_stands_around_a_timeout_is_no_crash(before: bytes, after: bytes) -> None:
    assert parameter_seconds(before + b'"parameters":{"timeout":5}' + after) in (5e-6, 30.0)


async def test_the_bytes_of_bodies_at_once_are_bounded(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MAX_HELD", 60)
    node = FakeNode(hold=trio.Event())
    asker = client(node)
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await asker.post("/predict/xor", [0, 1], content_length="6")).status)

    async with trio.open_nursery() as nursery:
        for _ in range(15):
            nursery.start_soon(ask)
        await trio.sleep(1)
        assert statuses == [503] * 5
        refused = await asker.post("/predict/xor", [0, 1], transfer_encoding="chunked")
        assert refused.headers["retry-after"] == "1"
        assert (await asker.get("/healthz")).status == 200
        assert node.hold is not None
        node.hold.set()
    assert sorted(statuses) == [200] * 10 + [503] * 5
    assert (await asker.post("/predict/xor", [0, 1])).status == 200


# Open Inference Protocol


async def test_server_and_model_metadata() -> None:
    asker = client(FakeNode())
    assert (await asker.get("/v2")).json() == {
        "name": "gossipml",
        "version": gossipml.__version__,
        "extensions": ["binary_tensor_data", "model_repository", "schedule_policy"],
    }
    expected = {
        "name": "xor",
        "versions": ["v7"],
        "platform": "gossipml_torch",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
        "parameters": {"labels": ["0", "1"]},
    }
    assert (await asker.get("/v2/models/xor")).json() == expected
    assert (await asker.get("/v2/models/xor/versions/v7")).json() == expected
    assert (await asker.get("/v2/models/xor/ready")).json() == {"name": "xor", "ready": True}
    assert (await asker.get("/v2/models/xor/versions/v7/ready")).status == 200
    assert (await asker.get("/v2/models/digits-mlp")).json()["versions"] == []
    answer = await asker.get("/v2/models/digits-mlp/ready")
    assert answer.status == 503
    assert answer.json() == {"name": "digits-mlp", "ready": False, "error": DIGITS.reason}


async def test_an_unknown_version_is_404() -> None:
    asker = client(FakeNode())
    for target in ("/v2/models/xor/versions/v8", "/v2/models/xor/versions/v8/ready"):
        assert "there is no version 'v8' of 'xor' here" in (await asker.get(target)).error
    assert "not a version's name" in (await asker.get("/v2/models/xor/versions/a b")).error
    assert (await asker.post("/v2/models/xor/versions/v8/infer", INFER)).status == 404
    assert (await asker.post("/v2/models/xor/versions/../infer", INFER)).status == 404


@pytest.mark.parametrize("target", ["/v2/models/xor/infer", "/v2/models/xor/versions/v7/infer"])
async def test_infer_passes_the_request_on(target: str) -> None:
    node = FakeNode()
    answer = await client(node).post(target, INFER)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"model_name": "xor", "model_version": "v7", "outputs": []}
    ((_, request),) = node.asked
    assert (request.form, json.loads(request.body), request.json_size) == ("infer", INFER, None)
    assert request.version == ("v7" if "versions" in target else "")


@pytest.mark.parametrize("media", ["application/octet-stream", "application/json", ""])
async def test_binary_tensors_go_both_ways(media: str) -> None:
    node = FakeNode()
    answer = await client(node).post("/v2/models/xor/infer", b"{}\x00\xff", media, inference_header_content_length="2")
    assert (node.asked[0][1].body, node.asked[0][1].json_size) == (b"{}\x00\xff", 2)
    size = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert (json.loads(answer.body[:size])["model_name"], answer.body[size:]) == ("xor", b"\x00\xff")


async def test_infer_refuses_in_the_protocols_error_form() -> None:
    node = FakeNode()
    asker = client(node)
    for media, size, status in (("text/plain", "", 415), ("application/octet-stream", "-1", 400)):
        answer = await asker.post("/v2/models/xor/infer", b"{}", media, inference_header_content_length=size)
        assert answer.status == status
        assert answer.json().keys() == {"error"}
    assert not node.asked


async def test_the_repository_index_lists_models_and_states() -> None:
    asker = client(FakeNode())
    xor = {"name": "xor", "version": "v7", "state": "READY", "reason": ""}
    digits = {"name": "digits-mlp", "version": "", "state": "UNAVAILABLE", "reason": DIGITS.reason}
    other = {"name": "other", "version": "", "state": "UNAVAILABLE", "reason": "no peer answers for it"}
    assert json.loads((await asker.ask("POST", "/v2/repository/index")).body) == [xor, digits, other]
    assert json.loads((await asker.post("/v2/repository/index", {})).body) == [xor, digits, other]
    assert json.loads((await asker.post("/v2/repository/index", {"ready": True})).body) == [xor]
    assert (await asker.post("/v2/repository/index", {"ready": 1})).status == 400
    assert (await asker.post("/v2/repository/index", [])).status == 400
    assert (await asker.post("/v2/repository/index", b"{}", "text/plain")).status == 415


async def test_models_are_loaded_and_unloaded_with_the_token() -> None:
    node = FakeNode()
    asker, token = client(node, GuardRules(api_token="t" * 32)), {"authorization": "Bearer " + "t" * 32}
    load, unload = "/v2/repository/models/xor/load", "/v2/repository/models/xor/unload"
    assert (await asker.ask("POST", load)).status == (await asker.ask("POST", unload)).status == 401
    assert (await asker.ask("POST", load, token)).json() == {} and node.loaded == {"xor"}
    assert (await asker.post(unload, {"parameters": {"unload_dependents": False}}, "", **token)).json() == {}
    assert node.loaded == set()
    wrongs: tuple[JSON, ...] = ({"parameters": {"config": "{}"}}, {"parameters": 7}, [])
    for wrong in wrongs:
        answer = await asker.post(load, wrong, **token)
        assert (answer.status, "without parameters" in answer.error) == (400, True)
    assert (await asker.ask("POST", "/v2/repository/models/nothing/load", token)).status == 404


# Status, pages, metrics, documents


def rows(value: JSON) -> list[dict[str, JSON]]:
    assert isinstance(value, list)
    return [row for row in value if isinstance(row, dict)]


async def test_status_peers_and_models_are_json() -> None:
    asker = client(FakeNode(peer_rows=[{"name": "bert", "alive": True}]))
    assert (await asker.get("/v1/status")).json() == {"name": "anna", "round": 3, "loss": None}
    assert (await asker.get("/v1/peers")).json() == {"peers": [{"name": "bert", "alive": True}]}
    served = [line["serving"] for line in rows((await asker.get("/v1/models")).json()["models"]) if line["serving"]]
    assert [(m["name"], m["ready"], m["version"], m["labels"]) for m in rows(served)] == [
        ("xor", True, "v7", ["0", "1"]),
        ("other", False, "", []),
        ("digits-mlp", False, "", []),
    ]


async def test_the_page_holds_no_script_of_its_own_and_nothing_from_elsewhere() -> None:
    asker = client(FakeNode())
    answer = await asker.get("/")
    text = answer.body.decode()
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]* src=)|<style| on\w+=|style=", text)
    waiting, seen = re.findall(r'(?:src|href)="/web/([^"]+)"', text), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            answer = await asker.get(f"/web/{name}")
            assert answer.status == 200, name
            if name.endswith(".js"):
                assert answer.headers["content-type"].startswith("text/javascript")
                waiting += re.findall(r'from "\./([^"]+)"', answer.body.decode())
            assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", answer.body), name
    assert {"app.js", "style.css", "icon.svg"} <= seen
    assert {file.name for file in (files("gossipml.api") / "web").iterdir()} == seen | {"index.html"}, "an unused file"
    assert (await asker.get("/web/no.js")).status == 404
    assert (await asker.get("/web/..%2fpage.py")).status == 404
    docs = (await asker.get("/docs")).body.decode()
    assert all(operation.path in docs for operation in openapi.OPERATIONS)


async def test_training_is_paused_and_resumed_with_the_token() -> None:
    node = FakeNode()
    asker, token = client(node, GuardRules(api_token="t" * 32)), {"authorization": "Bearer " + "t" * 32}
    assert (await asker.ask("POST", "/v1/training/pause")).status == 401
    answer = await asker.ask("POST", "/v1/training/pause", token)
    assert (answer.status, answer.json(), node.paused) == (200, {"detail": "training is paused"}, True)
    answer = await asker.ask("POST", "/v1/training/resume", token)
    assert (answer.status, answer.json(), node.paused) == (200, {"detail": "training goes on"}, False)


async def test_history_is_json() -> None:
    answer = await client(FakeNode()).get("/v1/history")
    assert answer.json() == {"points": [{"uptime": 0.5, "round": 1, "loss": 2.0, "accuracy": None}]}


async def test_metrics_are_in_the_text_format() -> None:
    asker = client(FakeNode())
    await asker.get("/nothing")
    answer = await asker.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.body.decode() == (
        "# HELP gossipml_rounds_total Rounds trained.\n"
        "# TYPE gossipml_rounds_total counter\n"
        "gossipml_rounds_total 3\n"
        "# HELP gossipml_bytes_total Bytes.\n"
        "# TYPE gossipml_bytes_total counter\n"
        'gossipml_bytes_total{way="in"} 10\n'
        'gossipml_bytes_total{way="out"} 20\n'
        "# HELP gossipml_peer_up Peers.\n"
        "# TYPE gossipml_peer_up gauge\n"
        'gossipml_peer_up{name="a\\"b\\n"} 1\n'
        "# HELP gossipml_http_responses_total HTTP answers by status.\n"
        "# TYPE gossipml_http_responses_total counter\n"
        'gossipml_http_responses_total{code="404"} 1\n'
    )


async def test_answers_are_timed_by_route() -> None:
    asker = client(FakeNode())
    for target in ("/healthz", "/healthz", "/predict/none?a=1"):
        await asker.get(target)
    text = (await asker.get("/metrics")).body.decode()
    labels = 'method="GET",path="/healthz"'
    assert f'gossipml_http_request_duration_seconds_bucket{{{labels},le="+Inf"}} 2' in text
    assert f"gossipml_http_request_duration_seconds_count{{{labels}}} 2" in text
    assert 'gossipml_http_request_duration_seconds_count{method="GET",path="/predict/{model}"} 1' in text
    assert text.count("# TYPE gossipml_http_request_duration_seconds histogram\n") == 1


async def test_published_and_served_models_are_one_list() -> None:
    lines = {str(line["name"]): line for line in rows((await client(FakeNode()).get("/v1/models")).json()["models"])}
    assert set(lines) == {"xor", "other", "digits-mlp"}
    assert lines["xor"]["version"] == "ab12"
    assert lines["xor"]["serving"] is not None
    (other,) = rows([lines["other"]["serving"]])
    assert other["reason"] == "no peer answers for it", "of every model of the network there is a word"
    assert "version" not in lines["digits-mlp"]


async def test_requests_about_models_reach_the_library() -> None:
    node = FakeNode()
    asker = client(node, GuardRules(api_token="t" * 20))
    bearer = {"authorization": "Bearer " + "t" * 20}
    await asker.post("/v1/models/xor/publish", {"file": "a.safetensors", "note": "n"}, **bearer)
    await asker.ask("POST", "/v1/models/xor/pull", bearer)
    await asker.post("/v1/models/xor/rollback", {"version": "ab12"}, **bearer)
    await asker.ask("DELETE", "/v1/models/xor/versions/ab12", bearer)
    await asker.ask("DELETE", "/v1/models/xor", bearer)
    assert node.library.asked == [
        ("publish", "xor", "a.safetensors", "n"),
        ("pull", "xor", ""),
        ("rollback", "xor", "ab12"),
        ("remove", "xor", "ab12"),
        ("remove", "xor", ""),
    ]
    wrong: list[JSON] = [[], {"versio": "a"}, {"version": 3}, {"version": "a" * 2000}]
    for body in wrong:
        assert (await asker.post("/v1/models/xor/pull", body, **bearer)).status == 400
    assert (await asker.get("/v1/models/XOR")).status == 404
    assert (await asker.get("/v1/models/none")).error == "there is no model 'none' in the network"
    assert rows((await asker.get("/v1/transfers")).json()["transfers"])[0]["done"] == 5


async def test_the_openapi_document_describes_every_operation_with_existing_schemas() -> None:
    answer = await client(FakeNode()).get("/openapi.json")
    document = answer.json()
    assert document["openapi"] == "3.1.0"
    paths, components = document["paths"], document["components"]
    assert isinstance(paths, dict) and isinstance(components, dict)
    described = {(method.upper(), path) for path, item in paths.items() if isinstance(item, dict) for method in item}
    assert described == {(operation.method, operation.path) for operation in openapi.OPERATIONS}
    schemas = components["schemas"]
    assert isinstance(schemas, dict)
    for reference in answer.body.decode().split('"$ref":"')[1:]:
        assert reference.split('"')[0].removeprefix("#/components/schemas/") in schemas


async def test_a_wrong_method_is_405_with_allow() -> None:
    asker = client(FakeNode())
    for method, path, allowed in (
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("DELETE", "/v2/models/xor/infer", {"POST"}),
        ("GET", "/v2/repository/index", {"POST"}),
    ):
        answer = await asker.ask(method, path)
        assert answer.status == 405
        assert set(answer.headers["allow"].replace(" ", "").split(",")) == allowed
        assert method in answer.error


async def test_predict_allows_both_of_its_methods() -> None:
    answer = await client(FakeNode()).ask("DELETE", "/predict/xor")
    assert answer.status == 405
    assert set(answer.headers["allow"].replace(" ", "").split(",")) == {"GET", "HEAD", "POST"}


async def test_an_unknown_route_is_404_and_says_where_to_look() -> None:
    answer = await client(FakeNode()).get("/nothing")
    assert answer.error == "there is nothing at '/nothing'; GET /openapi.json lists what there is"


# Events


class Stream:
    """One `/v1/events` request that stays open."""

    def __init__(self, node: FakeNode) -> None:
        self.stopping = trio.Event()
        self.app = Endpoint(node, GuardRules(), self.stopping).app
        self.left = trio.Event()
        self.told: list[bytes] = []
        self.head: Mapping[str, object] = {}

    async def run(self, method: str = "GET") -> None:
        scope = {
            "type": "http", "method": method, "path": "/v1/events", "raw_path": b"/v1/events", "query_string": b"",
            "root_path": "", "scheme": "http", "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8710), "http_version": "1.1",
        }  # fmt: skip
        first: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            if first:
                return first.pop()
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await trio.lowlevel.checkpoint()
            if message["type"] == "http.response.start":
                self.head = message
            else:
                self.told.append(message["body"])

        await self.app(scope, receive, send)


async def test_events_begin_with_the_status_and_follow_what_happens(autojump_clock: trio.abc.Clock) -> None:
    node = FakeNode(peer_rows=[{"name": "bert"}])
    stream = Stream(node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run)
        await trio.sleep(0.5)
        assert stream.head["status"] == 200
        beat = (
            b'event: status\ndata: {"name":"anna","round":3,"loss":null}\n\n'
            b'event: peers\ndata: {"peers":[{"name":"bert"}]}\n\n'
        )
        assert stream.told == [b"retry: 2000\n\n", beat]
        node.broadcast.publish(Event("round", {"text": "two\nlines"}))
        await trio.sleep(0.1)
        assert stream.told[2:] == [b'event: round\ndata: {"text":"two\\nlines"}\n\n']
        await trio.sleep(5)
        assert stream.told[3:] == [beat] * 5
        stream.left.set()
    assert stream.told[-1] == b""


async def test_events_end_when_the_endpoint_stops_and_free_their_place(autojump_clock: trio.abc.Clock) -> None:
    node = FakeNode()
    for _ in range(40):  # more than may watch at once
        stream = Stream(node)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.run)
            await trio.sleep(1)
            stream.stopping.set()
        assert stream.head["status"] == 200


async def test_too_many_watchers_are_503(autojump_clock: trio.abc.Clock) -> None:
    node = FakeNode()
    streams = [Stream(node) for _ in range(17)]
    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(stream.run)
            await trio.sleep(0.1)
        assert [stream.head["status"] for stream in streams] == [200] * 16 + [503]
        nursery.cancel_scope.cancel()


async def test_head_of_the_events_ends_at_once() -> None:
    stream = Stream(FakeNode())
    await stream.run("HEAD")
    assert (stream.head["status"], stream.told) == (200, [b""])


# What is recorded


async def test_every_prediction_is_recorded_answered_or_refused() -> None:
    node = FakeNode()
    asker = client(node)
    answer = await asker.get("/predict/xor?a=0&b=1")
    await asker.post("/predict/xor", [1, 1])
    await asker.get("/predict/xor?a=x")
    await asker.get("/predict/none?a=0")
    await asker.get("/healthz")
    told = [(p.route, p.model, p.status, p.given) for p in node.recorded]
    assert told == [
        ("/predict/xor", "xor", 200, b"a=0&b=1"),
        ("/predict/xor", "xor", 200, b"[1, 1]"),
        ("/predict/xor", "xor", 400, b"a=x"),
        ("/predict/none", "none", 404, b"a=0"),
    ]
    assert node.recorded[0].answer == answer.body
    assert b"there is no model" in node.recorded[3].answer
