"""The pages: `/` and what belongs to it under `/web`, as files of the package, and `/docs`.

Scripts and styles come from this endpoint alone and stand in files of their own, so the Content-Security-Policy can
refuse everything else: whatever name another peer chooses, it is never more than text.
"""

from __future__ import annotations

from functools import cache
from html import escape
from importlib.resources import files

from starlette.responses import Response

from gossipml.api.answers import Refusal
from gossipml.api.guard import SECURITY_HEADERS
from gossipml.api.openapi import OPERATIONS

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": f"{SECURITY_HEADERS['content-security-policy']}; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'"
}


@cache
def _files() -> dict[str, bytes]:
    """Read once: a peer answers with what it was started with, though the package is replaced beneath it."""
    folder = files("gossipml.api") / "web"
    return {file.name: file.read_bytes() for file in folder.iterdir() if "." + file.name.rpartition(".")[2] in _TYPES}


def file(name: str) -> Response:
    """A file of the page. Refusal when there is none of that name."""
    content = _files().get(name)
    if content is None:
        raise Refusal(404, f"the page has no file {name[:80]!r}")
    return Response(content, 200, _HEADERS, media_type=_TYPES["." + name.rpartition(".")[2]])


def docs() -> Response:
    """Every operation, for people."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for o in OPERATIONS
        for cells in [(o.method, o.path, o.summary, ", ".join(media for media, _ in o.body))]
    )
    head = "".join(f'<th scope="col">{word}</th>' for word in ("method", "path", "answers", "takes"))
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>gossipml: what can be asked</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="/web/icon.svg" type="image/svg+xml"><link rel="stylesheet" href="/web/style.css">'
        '</head><body><main class="plain"><h1>What can be asked of this peer</h1>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>. <a href="/">This peer</a></p></main></body></html>'
    )
    return Response(html.encode(), 200, _HEADERS, media_type="text/html")
