"""A fifth of the peers lies, and of models goes what changed most, or a sample: the others learn as if nobody did."""

from __future__ import annotations

from dataclasses import replace

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
    ],
)
def test_lies_about_some_parameters_cost_little(protocol: str, form: str, kinds: tuple[str, ...]) -> None:
    clean = accuracy(protocol, form, Byzantine())
    assert clean > 0.9
    for kind in kinds:
        assert accuracy(protocol, form, Byzantine(kind, 0.2)) > clean - 0.03, kind


def accuracy(protocol: str, form: str, lies: Byzantine) -> float:
    scenario = replace(PEERS, protocol=protocol, compression=form, byzantine=lies)
    return [row for row in population.run(scenario, 1, "cpu") if isinstance(row, Row)][-1].accuracy
