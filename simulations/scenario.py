"""A scenario: what is simulated, checked. One TOML file, frozen here; `scenario_file` reads and writes it.

    name = "two protocols"
    peers = 100
    rounds = 60
    split = "dirichlet:0.1"

    [network]
    delay = "heavy-tailed"
    seconds = 0.05
    loss = 0.1

    [[variant]]
    name = "push, 2 receivers"
    protocol = "push:2"

    [[variant]]
    name = "on a ring"
    topology.kind = "ring"

Time is virtual: a round of a peer of speed 1 takes `round_seconds`, training and sending with it. Every field says
what its default is; names of models, data, splits, protocols, merges and compressions are those of the daemon.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from gossipml.errors import UserError
from gossipml.models.compression import parse_choice
from gossipml.models.merge_rules import parse_merge
from gossipml.models.partition import parse_rule
from gossipml.models.registry import nearest
from gossipml.peer.protocols import parse_protocol

ENGINES: Final = ("population", "discrete")
BASELINES: Final = ("local", "central", "fedavg", "allreduce")
TOPOLOGIES: Final = (
    "peer-sampling",
    "complete",
    "ring",
    "torus",
    "k-regular",
    "small-world",
    "erdos-renyi",
    "scale-free",
    "edges",
)
DELAYS: Final = ("none", "fixed", "uniform", "heavy-tailed", "trace")
SPEEDS: Final = ("same", "uniform", "log-normal")
LIES: Final = ("none", "nan", "sign-flip", "scale", "noise", "zero", "stale", "inliers", "label-flip", "silent")
OPTIMISERS: Final = ("model", "sgd", "adam")
MOST_PEERS: Final = 1_000_000  # a slip of the finger; memory is estimated by the engine before it starts
MOST_ROUNDS: Final = 1_000_000
_VECTOR: Final = re.compile(r"vector:([1-9][0-9]{0,8})", re.ASCII)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{what} {value!r} is unknown; {nearest(value, known)}")


def _at_least(what: str, value: float, least: float, remark: str = "") -> None:
    if not value >= least:
        raise UserError(f"{what} {value:g} is below {least:g}" + (f"; {remark}" if remark else ""))


def _between(what: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN compares false
        raise UserError(f"{what} {value:,.10g} is not from {least:g} to {most:,.10g}")


@dataclass(frozen=True)
class Train:
    """Local training. Zero, or "model", stands for what the model's own specification says."""

    batch: int = 0
    epochs: float = 1.0
    """Passes over the local data in a round; not used when `steps` is given."""
    steps: int = 0
    """Optimiser steps in a round."""
    optimiser: str = "model"
    learning_rate: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _at_least("train.batch", self.batch, 0, "0 is the model's own")
        _between("train.epochs", self.epochs, 0, 10_000)
        _at_least("train.steps", self.steps, 0, "0 means whole epochs")
        _one_of("train.optimiser", self.optimiser, OPTIMISERS)
        _between("train.learning_rate", self.learning_rate, 0, 1000)
        _between("train.momentum", self.momentum, 0, 0.9999)
        _between("train.weight_decay", self.weight_decay, 0, 1000)
        if self.optimiser == "model" and (self.momentum or self.weight_decay) and not self.learning_rate:
            raise UserError("train.momentum and train.weight_decay need a train.learning_rate beside them")
        if self.optimiser != "model" and not self.learning_rate:
            raise UserError(f"train.optimiser {self.optimiser!r} needs a train.learning_rate, for example 0.05")

    @property
    def own_optimiser(self) -> bool:
        """Whether the optimiser is the scenario's (SGD unless it says "adam"), not the model's."""
        return self.learning_rate > 0


@dataclass(frozen=True)
class Topology:
    """Who can send to whom. `peer-sampling` is what the daemon does: any peer, drawn anew for each message."""

    kind: str = "peer-sampling"
    degree: int = 4
    """Of k-regular and small-world (even there); edges of each new peer in scale-free."""
    probability: float = 0.1
    """Of an edge in erdos-renyi; of rewiring one in small-world."""
    file: str = ""
    """Of kind `edges`: two numbers of peers a line, counted from 0."""
    every: int = 0
    """Rounds after which the graph is drawn anew (time-varying); 0: never."""

    def __post_init__(self) -> None:
        _one_of("topology.kind", self.kind, TOPOLOGIES)
        _at_least("topology.degree", self.degree, 1)
        _between("topology.probability", self.probability, 0, 1)
        _at_least("topology.every", self.every, 0, "0 means never")
        if self.kind == "small-world" and self.degree % 2:
            raise UserError(
                f"topology.degree {self.degree} of a small world is odd; it begins as a ring, write an even"
            )
        if (self.kind == "edges") != bool(self.file):
            raise UserError(
                f"topology.kind {self.kind!r} with topology.file {self.file!r}: the kind 'edges' and a file belong "
                "together"
            )


@dataclass(frozen=True)
class Network:
    """What happens to a message."""

    delay: str = "none"
    seconds: float = 0.0
    """fixed: the delay; uniform: its middle; heavy-tailed: its median (log-normal)."""
    spread: float = 0.5
    """uniform: from (1 - spread) to (1 + spread) times `seconds`; heavy-tailed: sigma of the logarithm."""
    file: str = ""
    """trace: a CSV with one measured delay in seconds a line, drawn from at random."""
    loss: float = 0.0
    """Share of messages that vanish."""
    bandwidth: float = 0.0
    """Bytes a second of each link in each direction; 0: no limit."""

    def __post_init__(self) -> None:
        _one_of("network.delay", self.delay, DELAYS)
        _between("network.seconds", self.seconds, 0, 1e6)
        _between("network.spread", self.spread, 0, 1 if self.delay == "uniform" else 10)
        _between("network.loss", self.loss, 0, 1)
        _between("network.bandwidth", self.bandwidth, 0, 1e15)
        if self.delay in ("fixed", "uniform", "heavy-tailed") and not self.seconds:
            raise UserError(f"network.delay {self.delay!r} needs network.seconds, for example 0.05")
        if (self.delay == "trace") != bool(self.file):
            raise UserError(f"network.delay {self.delay!r} with network.file {self.file!r}: a trace needs its file")


@dataclass(frozen=True)
class Compute:
    """How fast peers are: a peer of speed 2 does a round in half of `round_seconds`."""

    speed: str = "same"
    spread: float = 0.5
    """uniform: from 1 - spread to 1 + spread; log-normal: sigma, with median 1."""
    together: bool = True
    """Whether all peers begin their first round at the same time, or at a random moment of it."""

    def __post_init__(self) -> None:
        _one_of("compute.speed", self.speed, SPEEDS)
        _between("compute.spread", self.spread, 0, 0.99 if self.speed == "uniform" else 3)


@dataclass(frozen=True)
class Churn:
    """Peers that go and come back with what they had. Times are exponential, or from a trace."""

    up: float = 0.0
    """Mean seconds between coming and going; 0: nobody goes."""
    down: float = 0.0
    """Mean seconds away."""
    misses: float = 0.0
    """The chance that a peer fails for one round: it trains, sends and receives nothing in it."""
    file: str = ""
    """A CSV of lines `peer,from,to`: seconds during which that peer is there. Others are there all the time."""

    def __post_init__(self) -> None:
        _between("churn.up", self.up, 0, 1e9)
        _between("churn.down", self.down, 0, 1e9)
        _between("churn.misses", self.misses, 0, 1)
        if (self.up > 0) != (self.down > 0):
            raise UserError(f"churn.up {self.up:g} and churn.down {self.down:g} belong together; give both in seconds")
        if self.file and self.up:
            raise UserError("churn has a trace file and exponential times; give one of them")


@dataclass(frozen=True)
class Partition:
    """The network falls apart for a while, then heals."""

    start: float
    end: float
    """Virtual seconds."""
    groups: tuple[float, ...] = (0.5, 0.5)
    """Shares of the peers, in the order of their numbers."""

    def __post_init__(self) -> None:
        _between("partition.start", self.start, 0, 1e12)
        if not self.end > self.start:
            raise UserError(f"a partition from {self.start:g} s to {self.end:g} s never is; let it end after it starts")
        if len(self.groups) < 2 or min(self.groups) <= 0 or not math.isclose(sum(self.groups), 1, abs_tol=1e-6):
            raise UserError(
                f"partition.groups {list(self.groups)} are not at least two shares above 0 that make 1, for example "
                "[0.5, 0.5]"
            )


@dataclass(frozen=True)
class Late:
    """Peers that join later, the ones with the highest numbers."""

    share: float = 0.0
    seconds: float = 0.0
    """When they come."""

    def __post_init__(self) -> None:
        _between("late.share", self.share, 0, 0.999)
        _between("late.seconds", self.seconds, 0, 1e12)


@dataclass(frozen=True)
class Byzantine:
    """Peers that lie in every message they send."""

    kind: str = "none"
    """nan: not finite; stale: the first model it had; sign-flip: -x; scale: `factor` x; noise: normal, of the norm of
    x; zero; inliers: the honest mean plus `factor` standard deviations; label-flip: trained on labels C - 1 - y;
    silent: sends nothing."""
    share: float = 0.0
    factor: float = 0.0
    """0: 100 for scale, 1.5 for inliers."""

    def __post_init__(self) -> None:
        _one_of("byzantine.kind", self.kind, LIES)
        _between("byzantine.share", self.share, 0, 0.999)
        _between("byzantine.factor", self.factor, -1e9, 1e9)
        if (self.kind == "none") != (self.share == 0):
            raise UserError(
                f"byzantine.kind {self.kind!r} with byzantine.share {self.share:g}: give a kind and a share above 0"
            )


@dataclass(frozen=True)
class Reference:
    """What was published, if the scenario is from a paper."""

    title: str = ""
    authors: str = ""
    year: int = 0
    where: str = ""
    """Conference, journal or address."""
    differs: str = ""
    """How our setting differs from theirs, in a sentence."""

    @property
    def cited(self) -> str:
        """What is known of authors, title and year."""
        head = f"{self.authors}: {self.title}" if self.authors else self.title
        return f"{head}, {self.year}" if self.year else head


@dataclass(frozen=True)
class Figure:
    """A published number, printed beside ours."""

    what: str
    published: str
    """As they write it; "not stated" where the paper gives none."""
    column: str = "accuracy"
    """Of the rows; ours is the mean over seeds of the last row of each."""
    below: float = 0.0
    """If given, ours is instead the first round at which the column is below this."""
    variant: str = ""
    """Empty: every variant."""
    differs: str = ""
    """Where the setting differs for this figure."""


@dataclass(frozen=True)
class Variant:
    """One of the settings that a scenario compares: its name and the fields that it overrides, as in the TOML."""

    name: str
    overrides: tuple[tuple[str, object], ...]
    """Paths such as `topology.degree`, and values."""


@dataclass(frozen=True)
class Scenario:
    """All that decides a simulation but the seed."""

    name: str
    description: str = ""
    engine: str = "population"
    seeds: tuple[int, ...] = (1,)
    peers: int = 100
    rounds: int = 20
    """Rounds of a peer of speed 1; the simulation lasts `rounds * round_seconds` virtual seconds, and `settle`."""
    settle: float = 0.0
    """Virtual seconds after training in which peers average, as daemons do whose training is over."""
    round_seconds: float = 10.0
    model: str = "digits-mlp"
    """Of the registry; or `vector:P` for averaging without training: P values a peer, normal with variance 1."""
    data: str = ""
    """A SOURCE; empty: the model's own. `~` and `$NAME` are replaced."""
    split: str = "iid"
    protocol: str = "push"
    """A gossip protocol, or a baseline: local, central, fedavg[:CLIENTS], allreduce."""
    merge: str = ""
    """Empty: the daemon's, differences clipped and weighted by age."""
    compression: str = "int8"
    evaluate_every: int = 1
    """Rounds between two rows."""
    evaluate_peers: int = 0
    """Peers whose accuracy is measured, drawn once; 0: all."""
    baselines: tuple[str, ...] = ()
    """Run beside the variants, on the same data and training."""
    train: Train = Train()
    topology: Topology = Topology()
    network: Network = Network()
    compute: Compute = Compute()
    churn: Churn = Churn()
    late: Late = Late()
    byzantine: Byzantine = Byzantine()
    partition: tuple[Partition, ...] = ()
    reference: Reference = Reference()
    figure: tuple[Figure, ...] = ()
    variant: tuple[Variant, ...] = ()
    chosen: str = field(default="", metadata={"file": False})
    """In a resolved scenario, which variant or baseline it is."""

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.name.isprintable() or len(self.name) > 100:
            raise UserError(f"the name {self.name[:100]!r} of a scenario is not 1 to 100 printable characters")
        _one_of("engine", self.engine, ENGINES)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds {list(self.seeds)} are not different whole numbers from 0, for example [1, 2, 3]")
        _between("peers", self.peers, 1, MOST_PEERS)
        _between("rounds", self.rounds, 1, MOST_ROUNDS)
        _between("settle", self.settle, 0, 1e9)
        _between("round_seconds", self.round_seconds, 1e-6, 1e9)
        _at_least("evaluate_every", self.evaluate_every, 1)
        _between("evaluate_peers", self.evaluate_peers, 0, self.peers)
        parse_rule(self.split)
        parse_choice(self.compression)
        if self.merge:
            parse_merge(self.merge)
        if self.baseline:
            self._check_baseline(self.protocol)
        else:
            try:
                parse_protocol(self.protocol)
            except UserError as error:
                raise UserError(f"{error}; or a baseline: {', '.join(BASELINES)}") from None
        for baseline in self.baselines:
            _one_of("baselines", baseline.partition(":")[0], BASELINES)
            self._check_baseline(baseline)
        if self.topology.kind in ("k-regular", "small-world", "scale-free") and self.topology.degree >= self.peers:
            raise UserError(
                f"topology.degree {self.topology.degree} is not below the number of peers, {self.peers}; "
                f"the most is {self.peers - 1}"
            )
        if self.topology.kind == "k-regular" and self.topology.degree * self.peers % 2:
            raise UserError(
                f"no graph of {self.peers} peers has {self.topology.degree} neighbours each: one of both must be even"
            )
        if self.model.startswith("vector") and not self.vector:
            raise UserError(f"model {self.model!r} is not vector:P with P values, for example vector:512")
        if self.vector and (self.data or self.baselines):
            raise UserError(f"model {self.model!r} trains nothing: leave data and baselines away")
        names = [variant.name for variant in self.variant] + list(self.baselines)
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two variants are called {name!r}; give each its own name")

    @property
    def seconds(self) -> float:
        """Virtual seconds that are simulated."""
        return self.training_seconds + self.settle

    @property
    def training_seconds(self) -> float:
        return self.rounds * self.round_seconds

    @property
    def baseline(self) -> str:
        """Which baseline the protocol is; empty for gossip."""
        name = self.protocol.partition(":")[0]
        return name if name in BASELINES else ""

    @property
    def clients(self) -> int:
        """Of `fedavg:CLIENTS`: peers drawn for each round; all without a number."""
        return int(self.protocol.partition(":")[2] or self.peers)

    @property
    def vector(self) -> int:
        """P of the model `vector:P`; 0 for a model that trains."""
        match = _VECTOR.fullmatch(self.model)
        return int(match[1]) if match else 0

    def variants(self) -> Iterator[Scenario]:
        """Each setting by itself, `chosen` being its name: variants (or the one that there is), then baselines."""
        from gossipml.simulations.scenario_file import override

        alone = replace(self, variant=(), baselines=(), chosen=self.protocol)
        if not self.variant:
            yield alone
        for variant in self.variant:
            yield replace(override(alone, variant.overrides, f"variant {variant.name!r}"), chosen=variant.name)
        for baseline in self.baselines:
            # Without what only gossip has: liars, late ones, settling. The discrete engine knows gossip alone.
            yield replace(
                alone,
                engine="population",
                protocol=baseline,
                chosen=baseline,
                merge="",
                settle=0.0,
                byzantine=Byzantine(),
                late=Late(),
                partition=(),
            )

    def _check_baseline(self, text: str) -> None:
        name, colon, argument = text.partition(":")
        if not colon:
            return
        if name != "fedavg":
            raise UserError(f"the baseline {text!r} takes nothing after a colon; write {name!r}")
        if not (argument.isascii() and argument.isdigit() and 1 <= int(argument) <= self.peers):
            raise UserError(f"{text!r}: a round of fedavg has 1 to {self.peers} clients, for example fedavg:10")


def field_names(cls: type) -> list[str]:
    """What may stand in a table of the file for this dataclass."""
    return [each.name for each in dataclasses.fields(cls) if each.metadata.get("file", True)]
