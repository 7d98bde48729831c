"""A fifth of the peers lies, and of models goes what changed most, a sample, or a fragment: the others learn as if
nobody did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gossipml.simulations import population
from gossipml.simulations.result import Row
from gossipml.simulations.scenario import Byzantine, Scenario

pytestmark = pytest.mark.slow

PEERS = Scenario(
    "liars in parts", peers=20, rounds=25, settle=200.0, model="digits-mlp", split="dirichlet:0.5", evaluate_every=25
)


@pytest.mark.parametrize(
    ("protocol", "form", "kinds"),
    [
        ("push:4", "int8-top10", ("sign-flip", "noise", "stale")),
        ("sub-sampled:8", "int8", ("sign-flip", "noise")),
        ("partitioned:8", "int8", ("sign-flip", "noise", "stale")),
        ("push:4", "int8-of4", ("sign-flip", "noise", "stale")),
    ],
)
def test_lies_about_some_parameters_cost_little(protocol: str, form: str, kinds: tuple[str, ...]) -> None:
    clean = accuracy(protocol, form, Byzantine())
    assert clean > 0.9
    for kind in kinds:
        assert accuracy(protocol, form, Byzantine(kind, 0.2)) > clean - 0.03, kind


def test_peers_at_rest_are_not_drawn_to_a_stale_model_little_by_little() -> None:
    """After so short a training it is less than half of their norm away."""
    short, long = (
        accuracy("push:4", "int8", Byzantine("stale", 0.2), rounds=10, settle=settle) for settle in (40.0, 1000.0)
    )
    assert short > 0.7
    assert long > short - 0.02


def accuracy(protocol: str, form: str, lies: Byzantine, **changes: Any) -> float:
    scenario = replace(PEERS, protocol=protocol, compression=form, byzantine=lies, **changes)
    return [row for row in population.run(scenario, 1, "cpu") if isinstance(row, Row)][-1].accuracy
