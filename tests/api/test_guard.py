"""Who may ask at all: every operation of the OpenAPI document with foreign Host, Origin, key and body."""

from __future__ import annotations

import logging
import re

import pytest

from gossipml.api import openapi
from gossipml.api.guard import LINK, MAX_BODY, SECURITY_HEADERS, GuardRules

from .fake_node import Answer, Client, FakeNode, client

KEY = "k" * 32
OWN = "127.0.0.1:8710"


def operations() -> list[tuple[str, str]]:
    """(method, path) of everything documented, and what is not there; each with methods nobody expects."""
    paths = openapi.document()["paths"]
    assert isinstance(paths, dict)
    filled = [re.sub(r"{model}", "xor", re.sub(r"{version}", "v7", path)) for path in paths] + ["/nothing"]
    methods = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW")
    return [(method, path) for path in filled for method in methods]


async def refused(asker: Client, status: int, node: FakeNode, method: str, path: str, **headers: str) -> None:
    answer = await asker.ask(method, path, {"content-type": "application/json", **headers}, [b"[0, 1]"])
    assert answer.status == status, (method, path, headers)
    assert answer.error
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert not node.asked


@pytest.mark.parametrize(("method", "path"), operations())
async def test_no_operation_answers_a_foreign_host_or_origin(method: str, path: str) -> None:
    node = FakeNode()
    asker = client(node)
    for host in ("evil.example", "evil.example:8710", "127.0.0.1.evil.example:8710", "0.0.0.0:8710", "[::]"):
        await refused(asker, 421, node, method, path, host=host)
    for host in ("127.0.0.1:8711", "localhost:80", "127.0.0.1:8710:1", "[::1", "", "[::1]x", "user@127.0.0.1:8710"):
        await refused(asker, 421 if host else 400, node, method, path, host=host)
    for origin in (
        "http://evil.example",
        "null",
        "https://127.0.0.1:8710",
        "http://127.0.0.1:3000",
        "http://127.0.0.1",
    ):
        await refused(asker, 403, node, method, path, origin=origin)
    for origin in ("http://localhost:8710", "127.0.0.1:8710", f"http://{OWN}.evil.example", f"http://a@{OWN}"):
        await refused(asker, 403, node, method, path, origin=origin)
    for site in ("cross-site", "same-site", "x"):
        await refused(asker, 403, node, method, path, sec_fetch_site=site, sec_fetch_mode="no-cors")


@pytest.mark.parametrize(("method", "path"), [asked for asked in operations() if not asked[1].startswith(LINK)])
async def test_with_a_key_no_operation_answers_without_it(method: str, path: str) -> None:
    node = FakeNode()
    asker = client(node, GuardRules(api_key=KEY))
    for authorization in ("", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[1:]}", f"Basic {KEY}", KEY):
        await refused(asker, 401, node, method, path, authorization=authorization)
    await refused(asker, 401, node, method, f"{path}?key={KEY}")


@pytest.mark.parametrize(
    "host", [OWN, "127.0.0.1", "localhost:8710", "LOCALHOST", "[::1]:8710", "[0:0::1]", "127.0.0.1:"]
)
async def test_the_loopback_names_are_answered(host: str) -> None:
    answer = await client(FakeNode()).get("/healthz", host=host, origin=f"http://{host.lower()}")
    assert answer.status == 200


async def test_the_bound_address_and_configured_names_are_answered() -> None:
    asker = client(FakeNode(), GuardRules(names=("peer.example",), api_key=KEY))
    asker.server = ("192.0.2.7", 8710)
    key = f"Bearer {KEY}"
    for host in ("192.0.2.7:8710", "192.0.2.7", "peer.example", "PEER.example:8710"):
        assert (await asker.get("/healthz", host=host, authorization=key)).status == 200
    proxied = {"host": "peer.example", "origin": "https://peer.example", "authorization": key}
    assert (await asker.get("/healthz", **proxied)).status == 200
    assert (await asker.get("/healthz", host="192.0.2.8", authorization=key)).status == 421


async def test_two_hosts_are_refused() -> None:
    answer = await client(FakeNode()).ask_raw("GET", "/healthz", [(b"host", b"localhost"), (b"Host", b"evil.example")])
    assert (answer.status, answer.error) == (400, "the request has 2 Host headers; send one")


async def test_following_a_link_from_elsewhere_opens_the_page() -> None:
    answer = await client(FakeNode()).get("/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert answer.status == 200


async def test_the_right_key_is_answered() -> None:
    asker = client(FakeNode(), GuardRules(api_key=KEY))
    assert (await asker.get("/healthz", authorization=f"Bearer {KEY}")).status == 200
    assert (await asker.get("/healthz")).headers["www-authenticate"] == "Bearer"
    assert KEY not in repr(GuardRules(api_key=KEY))


@pytest.mark.parametrize("target", ["/healthz", "/", "/nothing", "/metrics", "/v2/models/none"])
async def test_every_answer_carries_the_security_headers(target: str) -> None:
    answer = await client(FakeNode()).get(target)
    assert SECURITY_HEADERS.keys() <= answer.headers.keys()
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "access-control-allow-origin" not in answer.headers


async def post(asker: Client, chunks: list[bytes], **headers: str) -> Answer:
    return await asker.ask("POST", "/predict/xor", {"content-type": "application/json", **headers}, chunks)


async def test_a_body_over_the_cap_is_refused_announced_or_not() -> None:
    node = FakeNode()
    asker = client(node)
    announced = await post(asker, [], content_length=str(MAX_BODY + 1))
    assert (announced.status, announced.error) == (
        413,
        "the body is over the limit of 16777216 bytes; send less at once",
    )
    assert (await post(asker, [], content_length="9" * 5000)).status == 413
    assert (await post(asker, [b" " * (1 << 23)] * 3)).status == 413
    assert not node.asked
    padded = b"[0,1]".ljust(MAX_BODY)
    assert (await post(asker, [padded], content_length=str(MAX_BODY))).status == 200


@pytest.mark.parametrize(("length", "says"), [("4", "5 bytes where"), ("6", "5 bytes where"), ("-1", "one decimal")])
async def test_a_body_of_another_length_than_announced_is_refused(length: str, says: str) -> None:
    node = FakeNode()
    answer = await post(client(node), [b"[0,1]"], content_length=length)
    assert answer.status == 400
    assert says in answer.error
    assert not node.asked


async def test_a_compressed_body_is_refused() -> None:
    assert (await post(client(FakeNode()), [b"x"], content_encoding="gzip")).status == 415


async def test_a_bug_in_a_handler_is_a_500_with_a_sentence_and_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    node = FakeNode(failure=RuntimeError("secret detail"))
    asker = client(node)
    with caplog.at_level(logging.ERROR):
        answer = await asker.get("/predict/xor?a=0&b=1")
    assert answer.status == 500
    assert answer.error.startswith("gossipml failed inside")
    assert "secret" not in answer.error
    assert "secret detail" in caplog.text
    node.failure = ExceptionGroup("several", [ValueError("a"), ValueError("b")])
    assert (await asker.get("/predict/xor?a=0&b=1")).status == 500
    node.failure = None
    assert (await asker.get("/predict/xor?a=0&b=1")).status == 200


async def test_anything_but_http_is_a_bug_of_the_server() -> None:
    asker = client(FakeNode())

    async def never() -> dict[str, object]:
        raise AssertionError

    async def nothing(message: object) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="websocket"):
        await asker.app({"type": "websocket"}, never, nothing)


TOKEN = "token-of-the-home-0123456789"


@pytest.mark.parametrize(("method", "path"), [(o.method, o.path) for o in openapi.OPERATIONS if o.changes])
async def test_what_changes_something_needs_the_token(method: str, path: str) -> None:
    node = FakeNode()
    asker = client(node, GuardRules(api_token=TOKEN))
    target = path.replace("{model}", "xor").replace("{version}", "ab12")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        assert (await asker.ask(method, target, headers)).status == 401
    assert node.library.asked == []
    allowed = await asker.ask(method, target, {"authorization": f"Bearer {TOKEN}"})
    assert allowed.status == 200
    assert len(node.library.asked) == path.startswith("/v1/models/")


async def test_without_a_token_nobody_changes_anything() -> None:
    node = FakeNode()
    assert (await client(node).ask("POST", "/v1/models/xor/pull", {"authorization": "Bearer "})).status == 401
    assert node.library.asked == []


async def test_the_token_also_opens_what_needs_the_api_key_but_not_the_other_way_round() -> None:
    asker = client(FakeNode(), GuardRules(api_key=KEY, api_token=TOKEN))
    assert (await asker.get("/v1/status", authorization=f"Bearer {TOKEN}")).status == 200
    assert (await asker.post("/v1/models/xor/pull", {}, authorization=f"Bearer {KEY}")).status == 401
