"""The graph of a scenario as a picture: who can send to whom, who lies, who comes late."""

from __future__ import annotations

import math

from gossipml.simulations.scenario import Scenario

SIZE = 420
MOST_PEERS = 400  # beyond, the picture is a grey disc
MOST_EDGES = 6000
MOST_PICTURES = 6


def draw_topologies(scenario: Scenario) -> list[tuple[str, str, str]]:
    """Of those variants that differ in it: their names ("" where all have the same), and what `draw_topology` gives."""
    alike: dict[str, tuple[Scenario, list[str]]] = {}
    for variant in scenario.variants():
        if not variant.baseline:
            key = repr((variant.topology, variant.byzantine.share, variant.late.share, variant.peers))
            alike.setdefault(key, (variant, []))[1].append(variant.chosen)
    drawn = list(alike.values())[:MOST_PICTURES]
    return [(", ".join(names) if len(alike) > 1 else "", *draw_topology(variant)) for variant, names in drawn]


def draw_topology(scenario: Scenario) -> tuple[str, str]:
    """What it is, in words, and the SVG (empty where there are too many peers)."""
    topology, peers = scenario.topology, scenario.peers
    about = {
        "peer-sampling": "peer sampling: any peer to any other, drawn anew for each message",
        "complete": "complete: every peer to every other",
        "ring": "a ring",
        "torus": "a torus, each peer with four neighbours",
        "k-regular": f"random, {topology.degree} neighbours each",
        "small-world": f"a small world: a ring of {topology.degree} neighbours, {topology.probability:.0%} rewired",
        "erdos-renyi": f"random, an edge with probability {topology.probability:g}",
        "scale-free": f"scale-free: each new peer brings {topology.degree} edges",
        "edges": f"from {topology.file}",
    }[topology.kind]
    if topology.every:
        about += f"; drawn anew every {topology.every} rounds, this is the first"
    lying, late = _liars(scenario), round(scenario.late.share * peers)
    if lying:
        about += f"; red: {len(lying)} that lie"
    if late:
        about += f"; hollow: {late} that come late"
    if peers > MOST_PEERS:
        return f"{about} ({peers:,} peers, too many to draw)", ""
    edges = [] if topology.kind in ("peer-sampling", "complete") else _edges(scenario)
    if len(edges) > MOST_EDGES:
        about, edges = f"{about} ({len(edges):,} edges, too many to draw)", []
    places = _places(scenario)
    radius = max(1.8, min(7.0, 220 / peers))
    parts = [
        f"<svg viewBox='0 0 {SIZE} {SIZE}' style='max-width:{SIZE}px;margin:0 auto' role=img aria-label='topology'>"
    ]
    if topology.kind in ("peer-sampling", "complete"):
        parts += _everybody(peers, places)
    for a, b in edges:
        (x1, y1), (x2, y2) = places[a], places[b]
        parts.append(f"<line class=edge x1={x1:.1f} y1={y1:.1f} x2={x2:.1f} y2={y2:.1f} />")
    for peer, (x, y) in enumerate(places):
        kind = "liar" if peer in lying else "late" if peer >= peers - late else "node"
        parts.append(f"<circle class={kind} cx={x:.1f} cy={y:.1f} r={radius:.1f}><title>peer {peer}</title></circle>")
    return about, "".join(parts) + "</svg>"


def _edges(scenario: Scenario) -> list[tuple[int, int]]:
    from gossipml.simulations.population_setting import graph_drawer

    draw = graph_drawer(scenario, scenario.seeds[0])
    return [(int(a), int(b)) for a, b in draw(0).edges] if draw is not None else []


def _liars(scenario: Scenario) -> list[int]:
    from gossipml.simulations.population_setting import liars_of

    return liars_of(scenario, scenario.seeds[0]) if scenario.byzantine.share else []


def _everybody(peers: int, places: list[tuple[float, float]]) -> list[str]:
    """Every edge where there are few, else as many that look the same from each peer, to show that any can be."""
    leaps = range(1, peers) if peers <= 40 else [peers * part // 7 for part in (1, 2, 3)]
    pairs = [(peer, (peer + leap) % peers) for peer in range(peers) for leap in leaps if leap <= peers // 2]
    return [
        f"<line class=edge x1={places[a][0]:.1f} y1={places[a][1]:.1f} x2={places[b][0]:.1f} y2={places[b][1]:.1f} />"
        for a, b in pairs
    ]


def _places(scenario: Scenario) -> list[tuple[float, float]]:
    """On a circle; a torus as a grid."""
    peers, middle = scenario.peers, SIZE / 2
    if scenario.topology.kind == "torus":
        rows = max(divisor for divisor in range(1, math.isqrt(peers) + 1) if peers % divisor == 0)
        columns = peers // rows
        step = (SIZE - 40) / max(rows, columns, 2)
        left, top = middle - step * (columns - 1) / 2, middle - step * (rows - 1) / 2
        return [(left + step * (peer % columns), top + step * (peer // columns)) for peer in range(peers)]
    reach = SIZE / 2 - 14
    angles = [2 * math.pi * peer / peers - math.pi / 2 for peer in range(peers)]
    return [(middle + reach * math.cos(angle), middle + reach * math.sin(angle)) for angle in angles]
