"""The figures of a running peer for Prometheus, by its conventions: base units (seconds, bytes, ratios from 0 to 1),
`_total` for what only grows, one name for one thing with labels for its kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import psutil

from gossipml import __version__
from gossipml.api.ports import Metric
from gossipml.daemon.audit import Audit
from gossipml.daemon.learner import Progress
from gossipml.daemon.node import Node
from gossipml.daemon.routing import RoutingStats
from gossipml.daemon.supervisor import Supervisor

STATES = ("starting", "training", "paused", "averaging", "serving", "stopped")
PEER_STATES = ("connected", "suspect", "lost", "refused", "quarantined", "known")


def metrics(node: Node, audit: Audit | None, routing: RoutingStats | None = None) -> list[Metric]:
    """All samples, those of one name together."""
    return [
        *_process(node),
        *_training(node.learner.progress, node.gossip.age),
        *_gossip(node),
        *_dht(node),
        *_store(node),
        *_swarm(node),
        *_parts(node.supervisor),
        *_routing(routing),
        *_audit(audit),
    ]


def _counter(name: str, help: str, value: float, /, **labels: str) -> Metric:
    return Metric(f"gossipml_{name}_total", "counter", help, value, labels)


def _gauge(name: str, help: str, value: float, /, **labels: str) -> Metric:
    return Metric(f"gossipml_{name}", "gauge", help, value, labels)


def _process(node: Node) -> Iterator[Metric]:
    process = psutil.Process()
    with process.oneshot():
        times, memory, started = process.cpu_times(), process.memory_info().rss, process.create_time()
    yield _gauge("info", "What runs here; always 1.", 1, version=__version__, name=node.config.name)
    yield Metric("process_cpu_seconds_total", "counter", "Processor time, without the worker.", times[0] + times[1])
    yield Metric("process_resident_memory_bytes", "gauge", "Memory, without the worker.", memory)
    yield Metric("process_start_time_seconds", "gauge", "Start, in seconds since 1970.", started)


def _training(progress: Progress, age: float) -> Iterator[Metric]:
    for state in STATES:
        yield _gauge("state", "1 for the state that the learner is in.", float(progress.state == state), state=state)
    yield _counter("training_rounds", "Rounds of local training.", progress.round)
    yield _counter("training_samples", "Samples trained on.", progress.samples)
    yield _counter("training_seconds", "Time spent in training.", progress.seconds)
    yield _gauge("model_age_samples", "Samples behind the model, merged ones included.", age)
    if progress.loss is not None:
        yield _gauge("training_loss", "Mean loss of the last round.", progress.loss)
    if (seen := progress.evaluation) is not None:
        help = "Accuracy of the served model, 0 to 1."
        yield _gauge("accuracy_ratio", help, seen.accuracy, data="test")
        yield _gauge("accuracy_ratio", help, seen.validation_accuracy, data="validation")
        yield _gauge("test_loss", "Loss of the served model on the test data.", seen.loss)


def _gossip(node: Node) -> Iterator[Metric]:
    stats = node.mesh.stats
    states: Counter[str] = Counter(info.state for info in node.mesh.neighbours())
    for state in PEER_STATES:
        yield _gauge("peers", "Other peers by their state, as seen from here.", states[state], state=state)
    yield _gauge("members", "Peers that may be chosen as receivers.", len(node.view))
    yield _gauge("sessions", "Open sessions with other peers.", len(node.mesh.links()))
    yield _counter("sessions_opened", "Sessions opened.", stats.sessions_opened)
    yield _counter("sessions_closed", "Sessions closed.", stats.sessions_closed)
    yield _counter("dials_failed", "Addresses where nobody answered.", stats.dials_failed)
    yield _counter("faults", "Breaches of the protocol by others.", stats.faults)
    help = "Model updates to others, by what became of them."
    yield _counter("updates_sent", help, stats.updates_sent, result="sent")
    yield _counter("updates_sent", help, stats.updates_failed, result="failed")
    yield _counter("updates_sent", help, stats.updates_dropped, result="dropped")
    help = "Model updates from others, by what became of them."
    yield _counter("updates_received", help, stats.updates_received, result="received")
    yield _counter("updates_received", help, stats.updates_refused, result="refused")
    help = "Merges of received models, refused ones for their values."
    yield _counter("merges", help, stats.merges, result="merged")
    yield _counter("merges", help, stats.merges_refused, result="refused")
    if node.gossip.policy.push_sum is not None:
        yield _gauge("push_sum_weight", "Weight of our model in push-sum.", node.gossip.policy.push_sum.weight)
    yield _counter("gossip_sent_bytes", "Bytes to other peers in sessions.", stats.traffic.sent)
    yield _counter("gossip_received_bytes", "Bytes from other peers in sessions.", stats.traffic.received)


def _dht(node: Node) -> Iterator[Metric]:
    stats = node.dht.stats
    yield _counter("dht_sent_datagrams", "Datagrams of the DHT sent.", stats.sent)
    yield _counter("dht_received_datagrams", "Datagrams of the DHT received.", stats.received)
    for reason, count in sorted(stats.dropped.items()):
        yield _counter("dht_dropped_datagrams", "Datagrams thrown away, by the reason.", count, reason=reason)
    yield _gauge("dht_nodes", "Proven nodes in the routing table.", stats.nodes)
    yield _gauge("dht_records", "Records held for others.", stats.records)


def _store(node: Node) -> Iterator[Metric]:
    store = node.library.store
    yield _gauge("store_bytes", "Bytes of the model store.", store.used)
    yield _gauge("store_versions", "Versions that are whole here.", len(store.versions()))


def _swarm(node: Node) -> Iterator[Metric]:
    stats, transfers = node.library.swarm.stats, node.library.swarm.transfers()
    yield _gauge("swarm_transfers", "Contents being fetched or given now.", len(transfers))
    yield _counter("swarm_sent_bytes", "Bytes of pieces sent.", stats.bytes_up)
    yield _counter("swarm_received_bytes", "Bytes of pieces received.", stats.bytes_down)
    yield _counter("swarm_sent_pieces", "Pieces sent.", stats.pieces_up)
    help = "Pieces received, by what they were good for."
    yield _counter("swarm_received_pieces", help, stats.pieces_down, result="good")
    yield _counter("swarm_received_pieces", help, stats.pieces_bad, result="bad")
    yield _counter("swarm_received_pieces", help, stats.pieces_wasted, result="twice")


def _parts(supervisor: Supervisor) -> Iterator[Metric]:
    for name, part in supervisor.parts.items():
        yield _gauge("part_running", "1 while a part of the peer runs.", float(part.running), part=name)
    for name, part in supervisor.parts.items():
        yield _gauge("part_crashes", "Crashes of a part since it last ran calmly.", part.crashes, part=name)


def _routing(stats: RoutingStats | None) -> Iterator[Metric]:
    if stats is None:
        return
    help = "Predictions that other peers were asked for, by what became of them."
    yield _counter("predictions_forwarded", help, stats.forwarded, result="answered")
    yield _counter("predictions_forwarded", help, stats.unanswered, result="unanswered")
    help = "Peers asked beside the first one of a prediction, by the reason."
    yield _counter("predictions_asked_again", help, stats.extra, reason="slow")
    yield _counter("predictions_asked_again", help, stats.again, reason="failed")
    yield _counter("predictions_served", "Predictions answered for other peers.", stats.served)


def _audit(audit: Audit | None) -> Iterator[Metric]:
    if audit is not None:
        help = "Predictions for the audit log, lost ones not written."
        yield _counter("audit_entries", help, audit.written, result="written")
        yield _counter("audit_entries", help, audit.lost, result="lost")
