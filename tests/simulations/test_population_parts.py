"""Graphs, delays, presence: what a population is laid out on, each by itself."""

from __future__ import annotations

import statistics
from pathlib import Path
from random import Random

import numpy as np
import pytest

from gossipml.errors import UserError
from gossipml.simulations import churn, network, topology
from gossipml.simulations.churn import Change
from gossipml.simulations.topology import Graph
from gossipml.simulations.traces import read_presence


def is_symmetric(graph: Graph) -> bool:
    return all(peer in graph.neighbours(other) for peer in range(graph.peers) for other in graph.neighbours(peer))


GRAPHS = {
    "ring": topology.ring(30, 4),
    "torus": topology.torus(30),
    "regular": topology.regular(30, 5, 1),
    "nearly complete": topology.regular(12, 10, 1),
    "small world": topology.small_world(30, 4, 0.3, 1),
    "erdos-renyi": topology.erdos_renyi(30, 0.3, 1),
    "scale-free": topology.scale_free(30, 2, 1),
}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_graphs_are_symmetric_without_loops_and_connected(graph: Graph) -> None:
    assert is_symmetric(graph)
    assert all(peer not in graph.neighbours(peer) for peer in range(graph.peers))
    assert graph.parts() == 1


def test_degrees_are_those_that_were_asked_for() -> None:
    assert set(GRAPHS["ring"].degrees) == {4}
    assert set(GRAPHS["torus"].degrees) == {4}
    assert set(topology.torus(4).degrees) == {2}, "in a grid of two rows up and down are the same peer"
    for degree in (2, 3, 20):
        assert set(topology.regular(100, degree, 7).degrees) == {degree}
    assert set(GRAPHS["nearly complete"].degrees) == {10}
    assert GRAPHS["small world"].degrees.sum() == 30 * 4
    assert topology.scale_free(1000, 3, 1).degrees.max() > 40, "some are far better connected than the mean of 6"


def test_erdos_renyi_has_every_edge_with_the_same_chance() -> None:
    edges = topology.erdos_renyi(400, 0.1, 3).edges
    assert len(edges) == pytest.approx(0.1 * 400 * 399 / 2, rel=0.05)
    assert np.bincount(edges.ravel(), minlength=400).std() < 8, "binomial: 6"
    assert topology.erdos_renyi(20, 1.0, 1).degrees.tolist() == [19] * 20
    assert topology.erdos_renyi(20, 0.0, 1).parts() == 20


def test_the_same_seed_draws_the_same_graph() -> None:
    first, again, other = (topology.small_world(50, 4, 0.5, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.targets, again.targets)
    assert not np.array_equal(first.targets, other.targets)
    assert np.array_equal(topology.regular(50, 4, 1).targets, topology.regular(50, 4, 1).targets)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: topology.ring(5, 3), "an even number"),
        (lambda: topology.torus(7), "product of two"),
        (lambda: topology.regular(5, 3, 1), "half an edge"),
        (lambda: topology.regular(5, 5, 1), "1 to 4"),
        (lambda: topology.erdos_renyi(5, 1.5, 1), "from 0 to 1"),
        (lambda: topology.erdos_renyi(1_000_000, 0.5, 1), "complete topology"),
        (lambda: topology.scale_free(5, 5, 1), "1 to 4"),
    ],
)
def test_impossible_graphs_are_refused_with_what_is_possible(make: object, remedy: str) -> None:
    assert callable(make)
    with pytest.raises(UserError, match=remedy):
        make()


def test_an_edge_list_is_read_and_its_faults_named(tmp_path: Path) -> None:
    file = tmp_path / "edges.csv"
    file.write_text("# a square\n0 1\n1,2\n2 3\n3 0\n0 1\n")
    assert topology.edge_list(file, 4).degrees.tolist() == [2, 2, 2, 2]
    file.write_text("0 1\n1 9\n")
    with pytest.raises(UserError, match=r"line 2: '1 9' is no edge; write two peers from 0 to 3"):
        topology.edge_list(file, 4)
    with pytest.raises(UserError, match="cannot be read"):
        topology.edge_list(tmp_path / "absent", 4)


def test_delays_have_the_shape_that_they_are_named_for() -> None:
    rng = Random(1)
    assert {network.fixed(0.5)(rng) for _ in range(5)} == {0.5}
    flat = [network.uniform(1.0, 3.0)(rng) for _ in range(1000)]
    assert min(flat) >= 1.0 and max(flat) <= 3.0 and statistics.mean(flat) == pytest.approx(2.0, abs=0.1)
    tail = [network.heavy_tailed(0.1, 1.0)(rng) for _ in range(4000)]
    assert statistics.median(tail) == pytest.approx(0.1, rel=0.1)
    assert max(tail) > 1.0
    assert {network.from_trace([0.1, 0.2])(rng) for _ in range(50)} == {0.1, 0.2}
    with pytest.raises(UserError, match="heavy-tailed"):
        network.heavy_tailed(0.0, 1.0)


def test_links_lose_their_share_and_carry_so_many_bytes_a_second() -> None:
    links = network.Links(Random(1), delay=network.fixed(0.0), loss=0.3, bandwidth=[100.0, 50.0])
    lost = sum(links.delay() is None for _ in range(2000))
    assert lost == pytest.approx(600, rel=0.1)
    assert links.sending(0, 1, 200) == 4.0


def test_sessions_are_exponential_and_begin_in_the_steady_state() -> None:
    presence = churn.exponential(2000, 30.0, 10.0, 100.0, Random(1))
    assert sum(presence.first) == pytest.approx(1500, rel=0.05)
    up = list(presence.first)
    for change in presence.changes:
        assert up[change.peer] != change.up
        up[change.peer] = change.up
    assert sum(up) == pytest.approx(1500, rel=0.05)
    with pytest.raises(UserError, match="lengthen"):
        churn.exponential(1000, 1e-6, 1e-6, 1e6, Random(1))


def test_late_joiners_come_at_their_time_unless_they_are_away_then() -> None:
    presence = churn.Presence([True, True, True], [Change(5.0, 1, False), Change(9.0, 1, True), Change(20.0, 2, False)])
    late = churn.joining_late(presence, {1: 7.0, 2: 7.0})
    assert late.first == [True, False, False]
    assert late.changes == [Change(7.0, 2, True), Change(9.0, 1, True), Change(20.0, 2, False)]


def test_a_trace_says_who_is_there_when_and_who_it_does_not_name_always_is(tmp_path: Path) -> None:
    file = tmp_path / "churn.csv"
    file.write_text("peer,from,to\n0,20,inf\n0,0,10\n2,5,6\n")
    presence = churn.from_trace(read_presence(str(file), 4), 4)
    assert presence.first == [True, True, False, True]
    assert presence.changes == [
        Change(5.0, 2, True), Change(6.0, 2, False), Change(10.0, 0, False), Change(20.0, 0, True),
    ]  # fmt: skip
