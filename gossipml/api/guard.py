"""What is refused before any route sees it: the first layer of the application, pure ASGI.

Against pages in a browser on the same machine (CSRF, DNS rebinding, framing) and clumsy or hostile clients. On
every method and every path: exactly one Host, naming this endpoint; an Origin, when there is one, of this
endpoint; no request that a browser calls cross-site; the API key, when there is one; bodies within the cap and of
the announced length. What changes something needs the bearer token besides (`check_token`, asked by the routes).
No CORS header is ever sent. An exception inside ends as a 500 with a sentence, logged, and nothing else.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
from collections import Counter
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gossipml.api.answers import Refusal, refusal_for
from gossipml.api.sessions import Sessions, session_of

log = logging.getLogger(__name__)

MAX_BODY = 1 << 24  # a photograph; a picture of 300 x 300 x 4 numbers is 7 MB as JSON
LINK = "/open/"  # where the one-time link of `gossipml peer open` leads
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class GuardRules:
    names: tuple[str, ...] = ()
    """Host names, beside the address itself and the loopback names, under which the endpoint is reached."""
    api_key: str = field(default="", repr=False)
    api_token: str = field(default="", repr=False)
    """What a request needs that changes something; it is as good as the API key for the others."""
    max_body: int = MAX_BODY
    sessions: Sessions = field(default_factory=lambda: Sessions(os.urandom), repr=False)
    """Those of the page; one is as good as the token, for requests of the endpoint's own Origin."""


class Guard:
    """ASGI middleware; `answered` counts answers by status."""

    def __init__(self, app: ASGIApp, rules: GuardRules) -> None:
        self.app = app
        self.rules = rules
        self.answered: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no lifespan is needed, websockets are not spoken
            raise ValueError(f"the endpoint speaks http, not {scope['type']}")
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.answered[message["status"]] += 1
                headers = list(message.get("headers", ()))
                present = {name for name, _ in headers}
                headers += [
                    (name.encode(), value.encode())
                    for name, value in SECURITY_HEADERS.items()
                    if name.encode() not in present
                ]
                message = {**message, "headers": headers}
            await send(message)

        try:
            headers = headers_of(scope)
            check_host(headers, scope["server"], self.rules)
            check_origin(headers, scope["method"], self.rules)
            if not scope["path"].startswith(LINK):  # what follows it is the proof
                check_key(headers, self.rules, scope["server"][1])
            limited = _limited(receive, _announced_length(headers, self.rules.max_body), self.rules.max_body)
            await self.app(scope, limited, guarded_send)
        except Disconnected:
            return
        except Exception as error:
            refusal = refusal_for(error)
            if refusal.status == 500:
                log.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise  # too late for an answer: the server cuts the connection
            await refusal.response()(scope, receive, guarded_send)


class Disconnected(Exception):
    """The client went away in the middle of its own request: nobody to answer."""


Headers = dict[bytes, list[bytes]]


def check_host(headers: Headers, server: tuple[str, int], rules: GuardRules) -> None:
    """Refusal unless the one Host header is an address or name of this endpoint, with its port or none.

    A page that rebinds its own name to 127.0.0.1 sends its own name here.
    """
    values = headers.get(b"host", [])
    if len(values) != 1:
        raise Refusal(400, f"the request has {len(values)} Host headers; send one")
    host, port = _split_authority(values[0].decode("latin-1"))
    own_host, own_port = server
    allowed = {*LOOPBACK_NAMES, own_host.lower(), *rules.names}
    if host not in allowed or port not in ("", str(own_port)):
        raise Refusal(
            421,
            f"this endpoint is not called {values[0][:80].decode('latin-1')!r}; use "
            f"http://{_bracketed(own_host)}:{own_port}",
        )


def check_origin(headers: Headers, method: str, rules: GuardRules) -> None:
    """Refusal for a request that a page of another origin makes; `check_host` has gone before.

    The origin must be what the Host header says. Sec-Fetch-Site catches what carries no Origin (an image, a
    script); following a link here is a person's own doing.
    """
    host = headers[b"host"][0].decode("latin-1").lower()
    for value in headers.get(b"origin", []):
        scheme, separator, authority = value.decode("latin-1").lower().partition("://")
        schemes = ("http", "https") if _split_authority(host)[0] in rules.names else ("http",)  # a proxy with TLS
        if not separator or scheme not in schemes or authority != host:
            raise Refusal(403, f"pages of {value[:80].decode('latin-1')!r} may not use this endpoint, only its own may")
    site = headers.get(b"sec-fetch-site", [b"none"])
    following_link = method == "GET" and headers.get(b"sec-fetch-mode") == [b"navigate"]
    if any(value not in (b"same-origin", b"none") for value in site) and not following_link:
        raise Refusal(403, "pages of other sites may not use this endpoint, only its own may")


def check_key(headers: Headers, rules: GuardRules, port: int) -> None:
    """Refusal unless the request carries the API key, if there is one, or the bearer token, or is of a session."""
    if not rules.api_key or _carries(headers, rules.api_key) or _carries(headers, rules.api_token):
        return
    if not rules.sessions.holds(session_of(headers, port)):
        raise Refusal(
            401,
            "this endpoint needs its API key: send the header `Authorization: Bearer KEY`",
            {"www-authenticate": "Bearer"},
        )


def check_token(headers: Headers, rules: GuardRules, port: int) -> None:
    """Refusal unless the request carries the bearer token, or is of a session of the page: for what changes something.

    Of a session only with an Origin, which `check_origin` has found to be ours: a browser always sends one here.
    """
    of_session = b"origin" in headers and rules.sessions.holds(session_of(headers, port))
    if not of_session and not _carries(headers, rules.api_token):
        raise Refusal(
            401,
            "this changes something and needs the token of HOME/api-token: send the header `Authorization: Bearer "
            "TOKEN`, or use the command line; on the page follow the link that `gossipml peer open` prints",
            {"www-authenticate": "Bearer"},
        )


def headers_of(scope: Scope) -> Headers:
    headers: Headers = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.lower(), []).append(value)
    return headers


def _carries(headers: Headers, secret: str) -> bool:
    """Compared in constant time; an empty secret is carried by nobody."""
    values = headers.get(b"authorization", [])
    scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    return bool(secret) and scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), secret.encode())


def is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _announced_length(headers: Headers, cap: int) -> int | None:
    if headers.get(b"content-encoding", [b"identity"]) != [b"identity"]:
        raise Refusal(415, "compressed bodies are not taken; send it as it is", {"accept-encoding": "identity"})
    values = headers.get(b"content-length", [])
    if not values:
        return None
    text = values[0].decode("latin-1")
    if len(values) > 1 or not (text.isascii() and text.isdigit()):
        raise Refusal(400, "Content-Length must be one decimal number")
    if len(text) > 15 or int(text) > cap:
        raise _too_large(cap)
    return int(text)


def _limited(receive: Receive, announced: int | None, cap: int) -> Receive:
    """`receive` that raises when the body grows over the cap, or ends before or after the announced length."""
    taken = 0
    ended = False

    async def limited_receive() -> Message:
        nonlocal taken, ended
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if taken > cap:
                raise _too_large(cap)
            if announced is not None and (taken > announced or (ended and taken < announced)):
                raise Refusal(400, f"the body has {taken} bytes where Content-Length says {announced}")
        elif not ended:
            raise Disconnected
        return message

    return limited_receive


def _too_large(cap: int) -> Refusal:
    return Refusal(413, f"the body is over the limit of {cap} bytes; send less at once")


def _split_authority(text: str) -> tuple[str, str]:
    """Lower-case host without brackets, and the port's text, empty when there is none; ("", "") for nonsense."""
    text = text.lower()
    if text.startswith("["):
        host, separator, rest = text[1:].partition("]")
        if not separator or (rest and not rest.startswith(":")):
            return "", ""
        try:
            return str(ipaddress.IPv6Address(host)), rest[1:]
        except ValueError:
            return "", ""
    host, _, port = text.partition(":")
    return ("", "") if ":" in port else (host, port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
