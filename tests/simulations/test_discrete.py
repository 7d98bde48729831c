"""The discrete engine: whole daemons follow a scenario, the same way for the same seed."""

from __future__ import annotations

import pytest

from gossipml.errors import UserError
from gossipml.simulations.discrete import check, run
from gossipml.simulations.result import Row
from gossipml.simulations.scenario import Byzantine, Churn, Late, Network, Partition, Scenario, Train

SMALL = Scenario(
    "small",
    engine="discrete",
    peers=5,
    rounds=8,
    round_seconds=30.0,
    model="logistic",
    data="digits",
    split="labels:2",
    train=Train(steps=10),
    chosen="push",
)


def rows_of(scenario: Scenario, seed: int = 1) -> list[Row]:
    assert check(scenario, "cpu") == []
    return [each for each in run(scenario, seed, "cpu") if isinstance(each, Row)]


def test_daemons_with_two_digits_each_learn_all_ten_and_again_the_same() -> None:
    lossy = Scenario(**{**vars(SMALL), "network": Network(delay="uniform", seconds=0.05, loss=0.1)})
    rows = rows_of(lossy)
    assert [row.round for row in rows] == list(range(9))
    first, last = rows[0], rows[-1]
    assert (round(first.seconds), last.seconds) == (0, 240.0)
    assert first.accuracy < 0.2 and last.accuracy > 0.85
    assert last.accuracy_min - 1e-9 <= last.accuracy <= last.accuracy_max + 1e-9
    assert last.updates == 5 * 8
    assert last.messages > 8 and last.bytes > last.messages * 650, "int8 of 650 parameters"
    assert rows == rows_of(lossy)
    assert rows != rows_of(lossy, seed=2)


def test_peers_come_late_die_and_are_cut_off() -> None:
    trouble = Scenario(
        **{
            **vars(SMALL),
            "peers": 6,
            "late": Late(share=0.34, seconds=45.0),
            "churn": Churn(up=200.0, down=20.0),
            "partition": (Partition(60.0, 120.0),),
        }
    )
    rows = rows_of(trouble)
    assert rows[0].alive == 4
    assert max(row.alive for row in rows) == 6
    assert min(row.alive for row in rows[3:]) < 6
    assert [row.updates for row in rows] == sorted(row.updates for row in rows), "what a dead peer did counts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "digits-mlp"}, "model 'digits-mlp' is not 'logistic'"),
        ({"data": ""}, "data is not given"),
        ({"peers": 1000}, "above 500"),
        ({"byzantine": Byzantine("zero", 0.2)}, "does not lie"),
        ({"churn": Churn(misses=0.1)}, "misses"),
        ({"settle": 10.0}, "settle is given"),
    ],
)
def test_what_whole_daemons_cannot_do_is_said_before_the_start(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*population engine"):
        check(Scenario(**{**vars(SMALL), **changes}), "cpu")


def test_an_engine_that_nobody_listens_to_any_more_stops() -> None:
    rows = run(Scenario(**{**vars(SMALL), "rounds": 100_000}), 1, "cpu")
    next(rows)
    rows.close()  # type: ignore[attr-defined]  # joins the thread: the test hangs where it goes on
