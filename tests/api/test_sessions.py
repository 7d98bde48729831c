"""The page's leave to change something: one-time links, sessions, cookies."""

from __future__ import annotations

import os

import pytest
import trio

from gossipml.api.guard import GuardRules
from gossipml.api.sessions import SESSION_SECONDS, TICKET_SECONDS, Sessions

from .fake_node import Answer, Client, FakeNode, client

TOKEN = "t" * 32
BEARER = {"authorization": f"Bearer {TOKEN}"}
OWN = {"origin": "http://127.0.0.1:8710"}


@pytest.fixture
def asker() -> Client:
    return client(FakeNode(), GuardRules(api_token=TOKEN))


async def link(asker: Client) -> str:
    answer = await asker.ask("POST", "/v1/page-link", BEARER)
    path = answer.json()["path"]
    assert isinstance(path, str)
    return path


def cookie_of(answer: Answer) -> str:
    assert (answer.status, answer.headers["location"]) == (303, "/")
    value, *rest = answer.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(rest)
    return value


async def test_a_link_gives_a_session_that_may_change_things(asker: Client) -> None:
    cookie = cookie_of(await asker.get(await link(asker)))
    assert (await asker.get("/v1/page-session", cookie=cookie)).json() == {"may_change": True}
    assert (await asker.ask("POST", "/v1/training/pause", {"cookie": cookie, **OWN})).status == 200
    assert (await asker.ask("POST", "/v1/training/pause", {"cookie": f"other=1; {cookie}", **OWN})).status == 200


async def test_a_link_works_once(asker: Client) -> None:
    path = await link(asker)
    assert (await asker.get(path)).status == 303
    again = await asker.get(path)
    assert again.status == 403 and "gossipml peer open" in again.error
    assert (await asker.get("/open/" + "0" * 40)).status == 403


async def test_only_the_token_prints_a_link(asker: Client) -> None:
    assert (await asker.ask("POST", "/v1/page-link")).status == 401


async def test_a_session_needs_the_origin_of_the_endpoint(asker: Client) -> None:
    cookie = cookie_of(await asker.get(await link(asker)))
    assert (await asker.ask("POST", "/v1/training/pause", {"cookie": cookie})).status == 401
    for origin in ("http://127.0.0.1:9999", "http://evil.example", "null"):
        assert (await asker.ask("POST", "/v1/training/pause", {"cookie": cookie, "origin": origin})).status == 403


@pytest.mark.parametrize("cookie", ["", "gossipml-8710=", "gossipml-8710=" + "0" * 40, "gossipml-9999={}", "é"])
async def test_other_cookies_are_no_session(asker: Client, cookie: str) -> None:
    value = cookie_of(await asker.get(await link(asker))).partition("=")[2]
    headers = {"cookie": cookie.format(value), **OWN}
    assert (await asker.ask("POST", "/v1/training/pause", headers)).status == 401
    assert (await asker.get("/v1/page-session", **headers)).json() == {"may_change": False}


async def test_behind_an_api_key_the_link_is_followed_without_it_and_the_session_is_as_good() -> None:
    asker = client(FakeNode(), GuardRules(api_key="k" * 32, api_token=TOKEN))
    assert (await asker.get("/")).status == 401
    cookie = cookie_of(await asker.get(await link(asker)))
    assert (await asker.get("/", cookie=cookie)).status == 200


async def test_tickets_and_sessions_end(autojump_clock: trio.abc.Clock) -> None:
    sessions = Sessions(os.urandom)
    late = sessions.ticket()
    await trio.sleep(TICKET_SECONDS)
    assert sessions.redeem(late) is None
    value = sessions.redeem(sessions.ticket())
    assert value is not None and sessions.holds(value) and sessions.redeem(value) is None
    await trio.sleep(SESSION_SECONDS)
    assert not sessions.holds(value)


async def test_the_number_of_sessions_is_bounded() -> None:
    sessions = Sessions(os.urandom)
    values = [sessions.redeem(sessions.ticket()) or "" for _ in range(20)]
    assert [sessions.holds(value) for value in values] == [False] * 4 + [True] * 16
