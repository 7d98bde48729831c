"""Scenario files: what is right reads back, what is wrong is said with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossipml.errors import UserError
from gossipml.simulations.scenario import Partition, Scenario, Topology
from gossipml.simulations.scenario_file import (
    load_scenario,
    override,
    parse_scenario,
    parse_setting,
    shipped_scenarios,
    write_scenario,
)
from gossipml.simulations.traces import read_delays, read_presence

FULL = """
name = 'all "fields" \\ here'
peers = 40
seeds = [1, 2]
baselines = ["local", "fedavg:10"]
split = "dirichlet:0.1"
[topology]
kind = "small-world"
degree = 6
[network]
delay = "heavy-tailed"
seconds = 0.05
[reference]
title = "A paper"
[[partition]]
start = 10
end = 20
[[figure]]
what = "accuracy"
published = "not stated"
[[variant]]
name = "one"
[[variant]]
name = "other"
protocol = "push:2"
topology.kind = "ring"
topology.degree = 2
partition = [{ start = 1.0, end = 2.0, groups = [0.25, 0.75] }]
"""


def test_a_scenario_reads_back_as_it_was_written() -> None:
    scenario = parse_scenario(FULL, "f.toml")
    assert scenario.partition == (Partition(10.0, 20.0),)
    assert parse_scenario(write_scenario(scenario), "f.toml") == scenario


@pytest.mark.parametrize("name", shipped_scenarios())
def test_a_shipped_scenario_is_right_and_reads_back(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.description
    assert parse_scenario(write_scenario(scenario), name) == scenario


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quick").mkdir()  # the results of `--out quick`
    monkeypatch.chdir(tmp_path)
    assert load_scenario("quick").name == "quick"


def test_variants_override_fields_and_baselines_stand_beside_them() -> None:
    one, other, local, fedavg = parse_scenario(FULL, "f.toml").variants()
    assert (one.chosen, one.protocol, one.topology.kind) == ("one", "push", "small-world")
    assert (other.chosen, other.protocol) == ("other", "push:2")
    assert other.topology == Topology("ring", 2)
    assert (local.chosen, local.baseline) == ("local", "local")
    assert (fedavg.baseline, fedavg.clients, fedavg.partition) == ("fedavg", 10, ())
    assert not any(each.variant or each.baselines for each in (one, other, local, fedavg))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peerz = 3", "there is no field peerz; did you mean peers"),
        ("[netwrk]\nloss = 1", "there is no field netwrk; did you mean network"),
        ("[network]\nlos = 1", "network.los; did you mean network.loss"),
        ("[network]\nloss = 2", "network.loss 2 is not from 0 to 1"),
        ("network = 3", r"network is 3, not a table; write \[network\]"),
        ("peers = 'x'", "peers is 'x', which is not a whole number"),
        ("peers = true", "peers is True, which is not a whole number"),
        ("peers = 0", "peers 0 is not from 1"),
        ("protocol = 'psh'", "did you mean 'push'.*or a baseline"),
        ("protocol = 'fedavg:200'", "1 to 100 clients"),
        ("baselines = ['locl']", "did you mean 'local'"),
        ("seeds = [1, 1]", "different whole numbers"),
        ("split = 'iidd'", "no split rule"),
        ("merge = 'krum'", "how many models may lie"),
        ("compression = 'int3'", "no compression"),
        ("model = 'vector:0'", "vector:P"),
        ("model = 'vector:9'\ndata = 'digits'", "trains nothing"),
        ("[topology]\nkind = 'k-regular'\ndegree = 100", "the most is 99"),
        ("peers = 7\n[topology]\nkind = 'k-regular'\ndegree = 3", "one of both must be even"),
        ("[topology]\nkind = 'edges'", "belong together"),
        ("[network]\ndelay = 'fixed'", "needs network.seconds"),
        ("[churn]\nup = 3", "belong together"),
        ("[byzantine]\nshare = 0.1", "a kind and a share"),
        ("[[partition]]\nstart = 3\nend = 3", "never is"),
        ("[[partition]]\nstart = 3", "partition.end is missing"),
        ("[[partition]]\nstart = 3\nend = 4\ngroups = [0.5, 0.6]", "make 1"),
        ("[train]\noptimiser = 'adam'", "needs a train.learning_rate"),
        ("variant = 3", r"write \[\[variant\]\]"),
        ("[[variant]]\nprotocol = 'push'", "number 1 has no name"),
        ("[[variant]]\nname = 'a'\n[[variant]]\nname = 'a'", "two variants are called 'a'"),
        ("[[variant]]\nname = 'a'\ntopology.degre = 2", "variant 'a': there is no field topology.degre; did you mean"),
        ("peers = ", "is not TOML"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s)^f.toml.*{message}"):
        parse_scenario(f"name = 'x'\n{text}", "f.toml")


def test_an_unknown_scenario_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'quick'"):
        load_scenario("quik")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_scenario(str(tmp_path / "none.toml"))
    (tmp_path / "big.toml").write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(UserError, match="larger than"):
        load_scenario(str(tmp_path / "big.toml"))


def test_a_setting_of_the_command_line_overrides_a_field() -> None:
    scenario = Scenario("x")
    assert override(scenario, [parse_setting("network.loss=0.25")], "--set").network.loss == 0.25
    assert override(scenario, [parse_setting("protocol=push:2")], "--set").protocol == "push:2"
    assert override(scenario, [parse_setting("seeds=[3, 4]")], "--set").seeds == (3, 4)
    with pytest.raises(UserError, match="field=value"):
        parse_setting("loss")


def test_a_trace_with_a_hole_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("seconds\n0.1\n0.25\n")
    assert read_delays(str(file)).tolist() == [0.1, 0.25]
    for hole in ("\n", "nan\n", "x\n"):
        file.write_text(f"0.1\n{hole}0.2\n")
        with pytest.raises(UserError, match="line 2, holds"):
            read_delays(str(file))
    file.write_text("seconds\n")
    with pytest.raises(UserError, match="is empty"):
        read_delays(str(file))
    file.write_text("-0.1\n")
    with pytest.raises(UserError, match="not below 0"):
        read_delays(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_delays(str(tmp_path / "none"))


def test_times_of_presence_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "churn.csv"
    file.write_text("peer,from,to\n3,50,60\n3,0,10\n1,0,5\n")
    assert read_presence(str(file), 4) == {3: [(0, 10), (50, 60)], 1: [(0, 5)]}
    for lines, message in [
        ("4,0,1", "no peer 4"),
        ("1.5,0,1", "no peer 1.5"),
        ("1,2,1", "is no time"),
        ("1,0", "3 numbers"),
        ("1,0,5\n1,4,6", "comes at 4 s while"),
    ]:
        file.write_text(lines)
        with pytest.raises(UserError, match=message):
            read_presence(str(file), 4)
