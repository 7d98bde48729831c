"""The two pages: what this peer does, and what can be asked of it. Whole in one answer: no script, nothing from
elsewhere. Names of other peers are theirs to choose, so every value is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

from starlette.responses import Response

from gossipml.api.guard import SECURITY_HEADERS
from gossipml.api.openapi import OPERATIONS
from gossipml.api.ports import JSON, ModelCard, Node

MAX_ROWS = 200  # peers on the page; all of them are in /v1/peers

_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "th,td{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #8884;vertical-align:top}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "content-security-policy": f"{SECURITY_HEADERS['content-security-policy']}; style-src 'sha256-{_STYLE_HASH}'"
}
_REFRESH = 5  # seconds between two looks


def status_page(node: Node) -> Response:
    status, peers = node.status(), node.peers()
    columns = sorted({key for peer in peers[:MAX_ROWS] for key in peer})
    sections = [
        f"<p>{escape(node.health().sentence)} {escape(node.readiness().sentence)}</p>",
        "<h2>This peer</h2>",
        _table(("", ""), ((key, _text(value)) for key, value in status.items())),
        "<h2>Models</h2>",
        _table(("model", "version", "state"), ((m.name, m.version, _state(m)) for m in node.models())),
        f"<h2>Peers ({len(peers)})</h2>",
        _table(columns, ([_text(peer.get(key)) for key in columns] for peer in peers[:MAX_ROWS])),
        '<p><a href="/docs">What can be asked here</a></p>',
    ]
    return _page("gossipml peer", sections, refresh=True)


def docs_page() -> Response:
    rows = ((o.method, o.path, o.summary, ", ".join(media for media, _ in o.body)) for o in OPERATIONS)
    sections = [
        _table(("method", "path", "answers", "takes"), rows),
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>. <a href="/">This peer</a></p>',
    ]
    return _page("gossipml: what can be asked", sections, refresh=False)


def _page(title: str, sections: Sequence[str], *, refresh: bool) -> Response:
    meta = f'<meta http-equiv="refresh" content="{_REFRESH}">' if refresh else ""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>{meta}'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>"
    )
    return Response(html.encode(errors="replace"), 200, _HEADERS, media_type="text/html")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _state(model: ModelCard) -> str:
    return "ready" if model.ready else model.reason


def _text(value: JSON) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(_text(item) for item in value)
        case _:
            return str(value)
