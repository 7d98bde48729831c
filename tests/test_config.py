"""Options of a peer: where they come from, which source wins, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossipml.config import PeerConfig, load_config, with_full_paths, write_config
from gossipml.errors import UserError
from gossipml.ids import Address


def test_later_sources_win(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model = "xor"\nthreads = 2\nmax-rounds = 5\n')
    config = load_config(tmp_path, {"threads": 4, "seed": None}, {"GOSSIPML_MAX_ROUNDS": "7", "GOSSIPML_HOME": "x"})
    assert (config.model, config.threads, config.max_rounds, config.seed) == ("xor", 4, 7, 0)


def test_a_written_configuration_is_read_back(tmp_path: Path) -> None:
    config = PeerConfig(
        model='a b\\c"d.py:Spec',
        data="mnist:/x",
        part=(2, 3),
        listen=Address("::1", 5),
        target_accuracy=0.5,
        name="Zoë",
        lan=False,
        quota=3,
        pause_on_battery=True,
        pause_on_load=12.5,
        schedule="mon-fri 18:00-07:00, sat-sun 00:00-24:00",
        nice=0,
    )
    (tmp_path / "config.toml").write_text(write_config(config), encoding="utf-8")
    assert load_config(tmp_path, {}, {}) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('modle = "xor"', "did you mean 'model'"),
        ('join = "x"', "no option of a peer"),
        ("threads = 0", "threads 0 is not between 1 and 1024"),
        ("threads = 1.5", "not a whole number"),
        ("threads = true", "not a whole number"),
        ('part = "3/2"', "part 3/2 does not exist"),
        ('part = "x"', "not I/N"),
        ('listen = "here"', "not IP:PORT"),
        ('listen = "1.2.3.4:70000"', "not IP:PORT"),
        ('device = "tpu"', "choose one of auto, cpu, cuda"),
        ("target-accuracy = 95", "0.95 means 95 %"),
        ("target-accuracy = nan", "not a number"),
        ("max-rounds = 0", "not at least 1"),
        ("seed = -1", "not between 0"),
        ("model = 3", "must be text"),
        ('name = "a\\nb"', "printable"),
        ("model = ", "not TOML"),
        ("replicas = 0", "replicas 0 is not between 1 and 64"),
        ("keep = 0", "keep 0 is not between 1"),
        ('quota = "much"', "write for example 500MB"),
        ("quota = -1", "write for example 500MB"),
        ('train = "maybe"', "write true or false"),
        ("publish-seconds = 0", "not at least 1"),
        ("pause-on-load = 101", "pause on load 101 is not from 0 to 100 %"),
        ('pause-on-load = "much"', "pause-on-load 'much' is not a number"),
        ('pause-on-battery = "perhaps"', "write true or false"),
        ("schedule = 22", "must be text"),
        ("nice = 20", "nice 20 is not between 0 and 19"),
        ("nice = -1", "nice -1 is not between 0 and 19"),
    ],
)
def test_a_wrong_value_names_itself_its_bound_and_its_source(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        load_config(tmp_path, {}, {})
    assert "config.toml" in str(caught.value)


def test_sizes_and_switches_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('quota = "1.5GiB"\nlan = false\n')
    config = load_config(
        tmp_path, {"pause_on_load": "30 %"}, {"GOSSIPML_UPLOAD_RATE": "20 MB", "GOSSIPML_TRAIN": "off"}
    )
    assert config.pause_on_load == 30.0
    assert (config.quota, config.upload_rate, config.lan, config.train) == (3 * 2**29, 20_000_000, False, False)


def test_the_token_is_never_an_environment_variable(tmp_path: Path) -> None:
    config = load_config(tmp_path, {}, {"GOSSIPML_JOIN": "gml1-abc", "GOSSIPML_TOKEN": "gml1-abc"})
    assert "gml1" not in repr(config)


def test_paths_hold_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    full = with_full_paths(PeerConfig(model="my_model.py:Spec", data="mnist:~/mnist"))
    assert full.model == f"{tmp_path}/my_model.py:Spec"
    assert full.data == "mnist:/home/ada/mnist"
    for model, data in (("digits-mlp", ""), ("package.module:Spec", "digits")):
        assert with_full_paths(PeerConfig(model=model, data=data)) == PeerConfig(model=model, data=data)
