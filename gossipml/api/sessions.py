"""How the page gets leave to change something: a one-time link becomes a session in a cookie.

`gossipml peer open` asks, with the bearer token, for a ticket and prints a link that holds it. Whoever follows the link
first, and soon, gets a session: a random value in a cookie that scripts cannot read (HttpOnly) and that no other site
makes the browser send (SameSite=Strict). The bearer token itself never is in a browser, a URL or a cookie.

A cookie knows no port: other servers on this machine that the same browser visits are sent it, too. So a session is
short, ends with the peer, and its requests must carry the endpoint's own Origin, which such a server's pages cannot.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

import trio

TICKET_SECONDS = 120.0  # from the terminal to the browser, by hand
SESSION_SECONDS = 12 * 3600.0  # a day at work
MAX_TICKETS = 8  # nobody prints more links than that at once; bounds memory
MAX_SESSIONS = 16
SECRET_SIZE = 20  # bytes: out of reach of guessing


class Sessions:
    """The tickets and sessions of one endpoint, in memory alone."""

    def __init__(self, secrets: Callable[[int], bytes]) -> None:
        self._secrets = secrets
        self._tickets: dict[str, float] = {}  # when each ends, the oldest first
        self._sessions: dict[str, float] = {}

    def ticket(self) -> str:
        """A word that `redeem` takes once, within TICKET_SECONDS."""
        return self._add(self._tickets, TICKET_SECONDS, MAX_TICKETS)

    def redeem(self, ticket: str) -> str | None:
        """The value of a new session's cookie; None when the ticket is used, too old, or was never given."""
        return self._add(self._sessions, SESSION_SECONDS, MAX_SESSIONS) if self._holds(self._tickets, ticket) else None

    def holds(self, value: str) -> bool:
        """Whether that is the value of a session's cookie."""
        return self._holds(self._sessions, value, once=False)

    def _add(self, kept: dict[str, float], seconds: float, most: int) -> str:
        value = self._secrets(SECRET_SIZE).hex()
        kept[value] = trio.current_time() + seconds
        while len(kept) > most:
            del kept[next(iter(kept))]
        return value

    def _holds(self, kept: dict[str, float], value: str, *, once: bool = True) -> bool:
        now = trio.current_time()
        for ended in [known for known, end in kept.items() if end <= now]:
            del kept[ended]
        given = value.encode(errors="replace")
        found = [known for known in kept if hmac.compare_digest(known.encode(), given)]
        if once:
            for known in found:
                del kept[known]
        return bool(found)


def cookie_name(port: int) -> str:
    """By port, so that the sessions of several peers of one machine stand beside each other."""
    return f"gossipml-{port}"


def set_cookie(port: int, value: str) -> str:
    """The header `Set-Cookie` of a new session."""
    return f"{cookie_name(port)}={value}; Max-Age={SESSION_SECONDS:.0f}; Path=/; HttpOnly; SameSite=Strict"


def session_of(headers: dict[bytes, list[bytes]], port: int) -> str:
    """The value of our cookie in a request; empty when there is none."""
    wanted = cookie_name(port)
    for line in headers.get(b"cookie", []):
        for pair in line.decode("latin-1").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == wanted:
                return value
    return ""
