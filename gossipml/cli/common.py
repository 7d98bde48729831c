"""What the commands share: the global options, asking the local peer, and printing."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossipml.errors import UserError

if TYPE_CHECKING:
    from gossipml.daemon.home import Home, RunInfo

ANSWER_LIMIT = 16 << 20  # bytes of a local answer; a list of thousands of peers fits
ANSWER_SECONDS = 10.0
CHANGE_SECONDS = 600.0  # hashing a file of many GB that is published


@dataclass(frozen=True)
class Context:
    """The global options."""

    home_option: Path | None
    verbose: bool

    @property
    def home(self) -> Home:
        from gossipml.config import default_home
        from gossipml.daemon.home import Home

        return Home((self.home_option or default_home()).expanduser().absolute())


def ask(info: RunInfo, path: str) -> Any:  # Any: whatever JSON the route answers
    """GET `path` of the peer's HTTP endpoint, decoded; UserError when it does not answer."""
    return fetch_json(info.api, "GET", path)


def change(home: Home, method: str, path: str, body: object = None) -> Any:  # Any: whatever JSON the route answers
    """Ask the peer of the home to change something, with the token that lies there."""
    info = home.require_run_info()
    return fetch_json(info.api, method, path, body, token=home.api_token(), seconds=CHANGE_SECONDS)


def fetch_json(
    api: str,
    method: str,
    path: str,
    body: object = None,
    *,
    media: str = "application/json",
    token: str = "",
    seconds: float = ANSWER_SECONDS,
) -> Any:  # Any: JSON
    """The decoded answer of an HTTP endpoint; UserError for no answer or an error status.

    A body of bytes is sent as it is, as the media type says; any other as JSON.
    """
    import http.client

    connection = http.client.HTTPConnection(api, timeout=seconds)
    try:
        payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": media} if payload is not None else {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, payload, headers)
        response = connection.getresponse()
        text = response.read(ANSWER_LIMIT)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"the peer at http://{api} does not answer ({error}); look at its log with `gossipml peer logs`"
        ) from None
    finally:
        connection.close()
    try:
        answer = json.loads(text)
    except ValueError:
        raise UserError(f"http://{api}{path} answered {response.status} and something that is not JSON") from None
    if response.status >= 400:
        sentence = answer.get("error") if isinstance(answer, dict) else None
        raise UserError(f"{sentence or answer} (HTTP {response.status} from http://{api}{path})")
    return answer


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def is_terminal() -> bool:
    return sys.stdout.isatty()


def megabytes(size: float) -> str:
    """A size in bytes for people: 12 kB, 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """A time span for people: 12 s, 3 min, 4 h 05 min, 2 d 3 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
