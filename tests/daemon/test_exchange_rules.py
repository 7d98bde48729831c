"""Names of protocol, merge and compression, together, as a person writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gossipml.config import PeerConfig, load_config
from gossipml.daemon.exchange_rules import gossip_config
from gossipml.errors import UserError


def test_the_defaults_are_what_was_measured() -> None:
    config = gossip_config(PeerConfig())
    assert (config.encoding, config.stack, config.ages.equal, config.protocol.fanout) == ("int8", 0, False, 4)


def test_each_name_means_something() -> None:
    assert gossip_config(PeerConfig(compression="auto")).encoding == "auto"
    assert gossip_config(PeerConfig(compression="fp16")).encoding == "float16"
    assert gossip_config(PeerConfig(compression="int8-top10")).encoding == "int8-top10"
    fragments = gossip_config(PeerConfig(compression="int4-of8"))
    assert (fragments.encoding, fragments.protocol.part, fragments.protocol.parts) == ("int4", "fragment", 8)
    assert gossip_config(PeerConfig(merge="mean")).ages.equal
    assert gossip_config(PeerConfig(merge="median")).stack == 2
    many = gossip_config(PeerConfig(merge="krum:4"))
    assert (many.stack, many.incoming) == (10, 10)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"protocol": "pushpull"}, "did you mean 'push-pull'"),
        ({"merge": "medain"}, "did you mean 'median'"),
        ({"merge": "krum"}, "for example krum:1"),
        ({"merge": "trimmed-mean:0"}, "from 1 to 1000"),
        ({"merge": "clipping:0"}, "for example clipping:1.5"),
        ({"compression": "in8"}, "did you mean 'int8'"),
        ({"compression": "int8-top90"}, "1 to 50 %"),
        ({"compression": "zip"}, "choose auto, float32"),
        ({"merge": "median", "compression": "int8-top10"}, "sends parts of them"),
        ({"merge": "median", "compression": "auto"}, "sends parts of them"),
        ({"merge": "krum:1", "protocol": "push-sum"}, "compares whole models"),
        ({"merge": "median", "protocol": "partitioned"}, "compares whole models"),
        ({"protocol": "sub-sampled", "compression": "int8-of4"}, "does so, too"),
    ],
)
def test_what_does_not_exist_or_not_go_together_is_said_with_a_remedy(given: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        gossip_config(PeerConfig(**given))  # type: ignore[arg-type]  # all are text
    assert (
        "choose" in str(caught.value)
        or "known are" in str(caught.value)
        or "for example" in str(caught.value)
        or ("top takes" in str(caught.value))
    )


def test_file_environment_and_command_line_give_them(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('merge = "slerp"\ncompression = "int4"\n')
    assert load_config(tmp_path, {}, {}).merge == "slerp"
    config = load_config(tmp_path, {"compression": "auto"}, {**os.environ, "GOSSIPML_MERGE": "median"})
    assert (config.merge, config.compression) == ("median", "auto")
