"""What Prometheus gets: read by its own strict parser, named by its conventions, and shown by the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from gossipml.api.durations import Durations
from gossipml.api.ports import Metric
from gossipml.api.prometheus import exposition
from gossipml.config import PeerConfig
from gossipml.daemon.audit import Audit, AuditConfig
from gossipml.daemon.face import Face
from gossipml.daemon.learner import LearnerConfig
from gossipml.daemon.routing import Routing
from gossipml.daemon.serving import Serving
from gossipml.daemon.worker import open_predictor
from gossipml.env.simulated import World, run_simulation
from gossipml.simulations.cluster import Cluster

parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus-client, of the extra test")

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
QUICK = LearnerConfig(round_seconds=1.0, least_round=2.0, evaluate_seconds=4.0)
UNITS = ("bytes", "seconds", "ratio", "samples", "datagrams", "pieces")


def play(scenario: Callable[[Cluster], Awaitable[None]]) -> None:
    async def run(world: World) -> None:
        async with Cluster.of(world, peers=3, config=QUICK) as cluster:
            await trio.sleep(30)
            await scenario(cluster)

    run_simulation(run, seed=5)


def gathered(cluster: Cluster) -> list[Metric]:
    """Everything that `/metrics` of a peer says."""
    node = cluster.members["peer-0"].node
    assert node is not None
    config = PeerConfig(model="points")
    face = Face(node, config, Serving(node, config, partial(open_predictor, config, b"network")))
    face.audit = Audit(Path("/nowhere"), node.env.clock, AuditConfig())
    face.routing = Routing(node, face.serving)
    durations = Durations()
    durations.note("GET", "/healthz", 0.003)
    answers = Metric("gossipml_http_responses_total", "counter", "HTTP answers by status.", 1, {"code": "200"})
    return [*face.metrics(), answers, *durations.metrics()]


def test_the_exposition_is_what_prometheus_reads() -> None:
    async def scenario(cluster: Cluster) -> None:
        metrics = gathered(cluster)
        families = {family.name: family for family in parser.text_string_to_metric_families(exposition(metrics))}
        values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in families.values()
            for sample in family.samples
        }
        assert len(values) == len(metrics), "no sample twice"
        assert values["gossipml_training_rounds_total",] > 5
        assert values["gossipml_peers", "connected"] == 2
        assert values["gossipml_state", "training"] == 1
        assert values["gossipml_gossip_sent_bytes_total",] > 1000
        assert values["gossipml_http_request_duration_seconds_bucket", "GET", "/healthz", "0.005"] == 1

    play(scenario)


def test_names_follow_the_conventions() -> None:
    async def scenario(cluster: Cluster) -> None:
        for metric in gathered(cluster):
            assert re.fullmatch(r"(gossipml|process)_[a-z][a-z0-9_]*", metric.name)
            assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
            assert metric.help.endswith(".")
            words = metric.name.removesuffix("_total").split("_")
            assert not set(words[:-1]) & set(UNITS), f"the unit of {metric.name} comes last"

    play(scenario)


def test_the_dashboard_asks_for_what_there_is() -> None:
    text = DASHBOARD.read_text()
    asked = {name for panel in json.loads(text)["panels"] for target in panel.get("targets", ())
             for name in re.findall(r"(?:gossipml|process)_[a-z_]+", target["expr"])}  # fmt: skip
    assert len(asked) > 15

    async def scenario(cluster: Cluster) -> None:
        assert asked <= {metric.name + metric.suffix for metric in gathered(cluster)}

    play(scenario)
