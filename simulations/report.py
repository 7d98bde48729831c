"""One HTML file that shows a result: no outside hosts, no scripts, light and dark, to be mailed and kept.

Charts are SVG (`report_svg`), drawn here, so that they take the colours of the page.
"""

from __future__ import annotations

import datetime
import html
import math
from dataclasses import fields, is_dataclass
from pathlib import Path

from gossipml.errors import UserError
from gossipml.simulations.charts import COLOURS, colours, is_baseline, make_charts, make_spreads, stroke
from gossipml.simulations.report_svg import draw_chart, draw_spreads
from gossipml.simulations.report_topology import draw_topologies
from gossipml.simulations.result import Result
from gossipml.simulations.scenario import Scenario
from gossipml.simulations.summary import Line, compare_figures, shown, summarise

escape = html.escape

PALETTE = (
    ("#2563eb", "#6ea8ff"),
    ("#d9480f", "#ff9457"),
    ("#0f8a5f", "#3ecf96"),
    ("#9333ea", "#c792ff"),
    ("#b8860b", "#f2c14e"),
    ("#c2255c", "#ff7fae"),
    ("#0c8599", "#4cc9dd"),
    ("#5c6773", "#a9b4c0"),
)
"""Light, dark."""

STYLE = """
:root { color-scheme: light dark; --back: #fafaf8; --card: #fff; --text: #1d2228; --soft: #667079; --line: #e2e4e1;
  --accent: #2563eb; LIGHT }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2024; --text: #e8eaec; --soft: #98a2ab;
  --line: #31373d; --accent: #6ea8ff; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 44px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0 0 10px; max-width: 75ch; }
.soft, .about { color: var(--soft); }
.about { font-size: 13px; margin: 0 0 6px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 18px; }
.fact b { display: block; font-size: 24px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: 13px; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 10px 0;
  margin: 28px 0 8px; background: var(--back); border-bottom: 1px solid var(--line); font-size: 14px; }
.legend svg { width: 26px; height: 10px; margin-right: 7px; vertical-align: middle; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 16px; align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
figure svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg .name { fill: var(--text); font-size: 13px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .trace { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .dashed { stroke-dasharray: 6 5; }
svg .again { stroke-dasharray: 1 4; } svg .dashed.again { stroke-dasharray: 9 4 1 4; }
svg .band { stroke: none; opacity: .13; }
svg .hit { fill: transparent; } svg .hit:hover { fill: currentColor; }
svg .edge { stroke: var(--soft); stroke-width: 1; opacity: .35; }
svg .node { fill: var(--accent); } svg .liar { fill: #e03131; } svg .late { fill: var(--card); stroke: var(--accent); stroke-width: 2; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; }
th, td { padding: 8px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
td.best { font-weight: 650; }
code { font: 13px ui-monospace, monospace; background: var(--card); border: 1px solid var(--line); border-radius: 5px;
  padding: 1px 5px; }
"""  # noqa: E501 a rule is one line

COLUMNS = (
    ("accuracy", "accuracy"),
    ("accuracy_std", "± peers"),
    ("accuracy_min", "worst peer"),
    ("accuracy_average", "averaged model"),
    ("accuracy_served", "served"),
    ("loss", "loss"),
    ("consensus", "consensus distance"),
    ("variance", "variance"),
    ("bytes", "sent by a peer"),
    ("messages", "messages"),
)
HIGHER_IS_BETTER = ("accuracy", "accuracy_min", "accuracy_average", "accuracy_served")


def write_report(result: Result, path: Path) -> None:
    """UserError when there is no row yet, or nothing can be written there."""
    if not result.rows:
        raise UserError(f"{result.folder} holds no rows yet; run it for a while first")
    try:
        path.write_text(render_report(result), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def render_report(result: Result) -> str:
    """The page."""
    scenario, lines = result.scenario, summarise(result)
    light, dark = (" ".join(f"--c{number}: {pair[shade]};" for number, pair in enumerate(PALETTE)) for shade in (0, 1))
    style = STYLE.replace("LIGHT", light).replace("DARK", dark)
    charts = "".join(
        f"<figure><h3>{escape(chart.title)}</h3><p class=about>{escape(chart.about)}</p>{draw_chart(chart)}</figure>"
        for chart in make_charts(result)
    )
    if spreads := make_spreads(result):
        about = "dot: mean; thick: one standard deviation; thin: from the worst to the best peer"
        charts += (
            f"<figure><h3>Spread over peers at the end</h3><p class=about>{about}</p>{draw_spreads(spreads)}</figure>"
        )
    for names, about, picture in draw_topologies(scenario):
        of = f"Topology of {names}" if names else "Topology"
        charts += f"<figure><h3>{escape(of)}</h3><p class=about>{escape(about)}</p>{picture}</figure>"
    body = [
        f"<h1>{escape(scenario.name)}</h1><p class=soft>{escape(scenario.description)}</p>",
        _facts(result, lines),
        _legend(result),
        f"<div class=charts>{charts}</div>",
        "<h2>At the end</h2>",
        _table_of_figures(lines),
        _published(result),
        "<h2>The setting</h2>",
        _settings(scenario),
        _origin(result),
    ]
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(scenario.name)} - gossipml</title><style>{style}</style><main>{''.join(body)}</main></html>\n"
    )


def _facts(result: Result, lines: list[Line]) -> str:
    scenario = result.scenario
    facts = [(f"{scenario.peers:,}", "peers"), (f"{max(row.round for row in result.rows):g}", "rounds")]
    gossip = [line for line in lines if not is_baseline(line.variant)] or lines
    if any(not math.isnan(line.end.accuracy) for line in gossip):
        best = max(gossip, key=lambda line: -1 if math.isnan(line.end.accuracy) else line.end.accuracy)
        facts.append((shown("accuracy", best.end.accuracy), f"best by gossip: {best.variant}"))
        alone = [line for line in lines if line.variant.partition(":")[0] == "local"]
        facts += [(shown("accuracy", line.end.accuracy), "everyone alone") for line in alone]
    else:
        best = min(gossip, key=lambda line: line.end.variance)
        facts.append((shown("variance", best.end.variance), f"least variance: {best.variant}"))
    updates, wall = sum(line.end.updates * line.seeds for line in lines), sum(_wall(result))
    if updates and wall > 0:
        facts.append((f"{updates / wall:,.0f}", "local rounds a second, on this machine"))
    cells = "".join(f"<div class=fact><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in facts)
    return f"<div class=facts>{cells}</div>"


def _wall(result: Result) -> list[float]:
    ends = [result.of(variant, seed)[-1].wall for variant in result.variants() for seed in result.seeds(variant)]
    return [wall for wall in ends if not math.isnan(wall)]


def _legend(result: Result) -> str:
    entries = []
    for variant, colour in colours(result).items():
        classes = stroke(colour, is_baseline(variant))
        line = f"<line x1=1 y1=5 x2=25 y2=5 class='{classes}' style='stroke:var(--c{colour % COLOURS})'/>"
        entries.append(f"<span><svg viewBox='0 0 26 10' aria-hidden=true>{line}</svg>{escape(variant)}</span>")
    return f"<div class=legend>{''.join(entries)}</div>"


def _table_of_figures(lines: list[Line]) -> str:
    trained = any(not math.isnan(line.end.accuracy) for line in lines)
    used = [
        (column, title)
        for column, title in COLUMNS
        if any(not math.isnan(getattr(line.end, column)) for line in lines) and not (trained and column == "variance")
    ]
    head = "".join(f"<th class=number>{escape(title)}</th>" for _, title in used)
    rows = []
    for line in lines:
        cells = []
        for column, _ in used:
            value = getattr(line.end, column)
            best = column in HIGHER_IS_BETTER and value == max(
                (v for each in lines if not math.isnan(v := getattr(each.end, column))), default=None
            )
            cells.append(f"<td class='number{' best' if best else ''}'>{escape(shown(column, value))}</td>")
        note = "" if line.complete else " <span class=soft>(stopped)</span>"
        rows.append(
            f"<tr><td>{escape(line.variant)}{note}</td>{''.join(cells)}<td class=number>{line.end.round:g}</td>"
            f"<td class=number>{line.seeds}</td></tr>"
        )
    head = f"<th>variant</th>{head}<th class=number>rounds</th><th class=number>seeds</th>"
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _published(result: Result) -> str:
    reference, figures = result.scenario.reference, compare_figures(result)
    if not (reference.title or figures):
        return ""
    parts = ["<h2>Published, and ours</h2>"]
    if reference.title:
        parts.append(
            f"<p>{escape(reference.authors + ': ') if reference.authors else ''}<em>{escape(reference.title)}</em>. "
            f"{escape(reference.where)} {reference.year or ''}</p>"
        )
    if reference.differs:
        parts.append(f"<p><b>Here it differs:</b> {escape(reference.differs)}</p>")
    if figures:
        rows = "".join(
            f"<tr><td>{escape(each.what)}</td><td>{escape(each.variant)}</td><td>{escape(each.published)}</td>"
            f"<td><b>{escape(each.ours)}</b></td><td>{escape(each.differs)}</td></tr>"
            for each in figures
        )
        head = "".join(
            f"<th>{name}</th>" for name in ("figure", "variant", "published", "ours", "how the setting differs")
        )
        parts.append(f"<div class=scroll><table><tr>{head}</tr>{rows}</table></div>")
    return "".join(parts)


def _settings(scenario: Scenario) -> str:
    """What is not the default, of the scenario and of each variant."""
    rows = [("all", ", ".join(_changes(scenario, Scenario(scenario.name), "")) or "defaults")]
    for variant in scenario.variant:
        changes = [f"{path} = {'default' if value == '' else value}" for path, value in variant.overrides]
        rows.append((variant.name, ", ".join(changes) or "as above"))
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<div class=scroll><table>{cells}</table></div>"


def _changes(value: object, default: object, prefix: str) -> list[str]:
    changes = []
    for each in fields(value):  # type: ignore[arg-type]  # a dataclass
        if each.name in ("name", "description", "reference", "figure", "variant", "chosen"):
            continue
        ours, theirs = getattr(value, each.name), getattr(default, each.name)
        if is_dataclass(ours):
            changes += _changes(ours, theirs, f"{prefix}{each.name}.")
        elif ours != theirs:
            text = ", ".join(map(str, ours)) if isinstance(ours, tuple) else str(ours)
            changes.append(f"{prefix}{each.name} = {text}")
    return changes


def _origin(result: Result) -> str:
    environment = result.environment
    parts = []
    when = environment.get("when")
    if isinstance(when, int | float):
        parts.append(f"{datetime.datetime.fromtimestamp(when, datetime.UTC):%Y-%m-%d %H:%M} UTC")
    packages = environment.get("packages")
    if isinstance(packages, dict):
        parts.append(", ".join(f"{name} {version}" for name, version in packages.items()))
    parts += [str(environment[key]) for key in ("system",) if key in environment]
    if "cores" in environment:
        parts.append(f"{environment['cores']} cores, {sum(_wall(result)):.0f} s of simulation")
    again = f"<p>Again: <code>gossipml simulate run {escape(str(result.folder / 'scenario.toml'))}</code></p>"
    return f"<p class=soft style='margin-top:14px'>{escape('; '.join(parts))}</p>{again}"
