"""What a user may set for a peer, and where each value comes from.

Later sources win: default, HOME/config.toml, GOSSIPML_... environment variable, option of `gossipml peer
start`. The join token is none of these: a secret never stands in an argument or in the environment.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import platformdirs

from gossipml.errors import UserError
from gossipml.ids import Address, parse_address

LISTEN = Address("0.0.0.0", 8711)
API = Address("127.0.0.1", 8710)
DEVICES = ("auto", "cpu", "cuda")
LOG_FORMATS = ("text", "json")
MAX_NAME = 64
MAX_WORKERS = 64  # a share of a batch of less than some samples gains nothing
MAX_NICE = 19  # of POSIX
MAX_REPLICAS = 64  # as many as a key of the DHT lists
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class PeerConfig:
    """The options of `gossipml peer start`, checked."""

    model: str = "digits-mlp"
    data: str = ""
    """A SOURCE; empty for the model's own default."""
    split: str = "iid"
    part: tuple[int, int] = (1, 1)
    """This peer's part and the number of parts, counted from 1."""
    listen: Address = LISTEN
    """For other peers: TCP and UDP on one port."""
    api: Address = API
    """For predictions and status."""
    device: str = "auto"
    threads: int = 1
    """Cores that training may use: one leaves the machine usable."""
    workers: int = 0
    """Processes that share each step; 0: as the worker finds out to be fastest (see `kernels_split`)."""
    target_accuracy: float | None = None
    max_rounds: int | None = None
    seed: int = 0
    """Decides the parts of the data: the same seed gives the same parts on every peer."""
    name: str = ""
    train: bool = True
    """False: serve the newest published version, train nothing."""
    lan: bool = True
    """Find peers on the same local network by beacons."""
    replicas: int = 12
    """Copies of each version that the network keeps (THREATS: R = 12)."""
    keep: int = 5
    """Versions of each name that this peer keeps beside pinned ones and the newest (guess)."""
    quota: int = 0
    """Bytes that the model store may take; 0 for as much as the disk has."""
    upload_rate: int = 0
    """Bytes per second for uploads of models; 0 for no limit."""
    protocol: str = "push"
    """How models are exchanged (`gossipml.peer.protocols`); push is epidemic learning with 4 receivers."""
    merge: str = "clipping"
    """How incoming models are merged with ours (`gossipml.models.merge_rules`)."""
    compression: str = "int8"
    """In which form models are sent (`gossipml.models.compression`); auto: what each link carries."""
    optimiser: str = ""
    """By its name in torch.optim, in small letters; empty: the model's own, as with the next four."""
    learning_rate: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    batch: int | None = None
    """Samples of an optimiser step."""
    local_steps: str = "auto"
    """Optimiser steps of a round; 30%: of one pass over the data; auto: as many as this machine does in the time that a
    round takes."""
    outer: str = ""
    """An outer step over the gossip average (`gossipml.models.tuning`), for example nesterov; empty: none."""
    pull_after: int = 100
    """Predictions of a model that is not here, within a minute, after which it is fetched; 0: never (guess)."""
    publish_seconds: float = 300.0
    """A trainer publishes at most this often, and when its model improved (guess)."""
    pause_on_battery: bool = False
    """Train only on mains."""
    pause_on_load: float = 0.0
    """Per cent of the machine's CPU, used by others, at which training pauses; 0: never."""
    schedule: str = ""
    """When to train, for example `mon-fri 18:00-07:00`, in local time; empty: always. See gossipml.daemon.schedule."""
    nice: int = 10
    """Of the training process: others come first, and predictions keep their latency."""
    log_format: str = "text"
    """Of HOME/log/peer.log and of standard error: text or json."""
    audit: bool = True
    """Record every prediction in HOME/audit.sqlite."""
    audit_inputs: bool = False
    """Record the inputs of predictions themselves, not only their digests."""
    audit_days: float = 90.0
    """How long records are kept, at least (guess)."""

    def __post_init__(self) -> None:
        index, parts = self.part
        if not (1 <= index <= parts):
            raise UserError(f"part {index}/{parts} does not exist; write I/N with 1 <= I <= N, for example 1/4")
        if self.device not in DEVICES:
            raise UserError(f"device {self.device!r} is unknown; choose one of {', '.join(DEVICES)}")
        if not 1 <= self.threads <= 1024:
            raise UserError(f"threads {self.threads} is not between 1 and 1024")
        if not 0 <= self.workers <= MAX_WORKERS:
            raise UserError(f"workers {self.workers} is not between 1 and {MAX_WORKERS}; auto finds the best number")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise UserError(f"target accuracy {self.target_accuracy:g} is not above 0 and at most 1; 0.95 means 95 %")
        if self.max_rounds is not None and self.max_rounds < 1:
            raise UserError(f"max rounds {self.max_rounds} is not at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is not between 0 and {2**63 - 1}")
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise UserError(f"replicas {self.replicas} is not between 1 and {MAX_REPLICAS}")
        if not 1 <= self.keep <= 1000:
            raise UserError(f"keep {self.keep} is not between 1 and 1000 versions")
        if self.pull_after < 0:
            raise UserError(f"pull after {self.pull_after} is not at least 0 predictions; 0 means never")
        if self.publish_seconds < 1:
            raise UserError(f"publish seconds {self.publish_seconds:g} is not at least 1")
        if not 0 <= self.pause_on_load <= 100:
            raise UserError(f"pause on load {self.pause_on_load:g} is not from 0 to 100 % of the CPU; 0 means never")
        if not 0 <= self.nice <= MAX_NICE:
            raise UserError(f"nice {self.nice} is not between 0 and {MAX_NICE}; more is nicer to others")
        if self.log_format not in LOG_FORMATS:
            raise UserError(f"log format {self.log_format!r} is unknown; choose one of {', '.join(LOG_FORMATS)}")
        if self.audit_days <= 0:
            raise UserError(f"audit days {self.audit_days:g} is not above 0; --no-audit records nothing")
        if len(self.name) > MAX_NAME or not self.name.isprintable():
            raise UserError(f"the name has {len(self.name)} characters; at most {MAX_NAME} printable ones")


def default_home() -> Path:
    return Path(os.environ.get("GOSSIPML_HOME") or platformdirs.user_data_dir("gossipml", appauthor=False))


def load_config(home: Path, options: Mapping[str, object], environ: Mapping[str, str]) -> PeerConfig:
    """The configuration of the peer of `home`; `options` are command-line values, None where not given.

    Raises UserError, naming the source of a wrong value.
    """
    config = PeerConfig()
    path = home / "config.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        table = {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    config = _apply(config, table, str(path))
    variables = {
        field.name: environ[variable]
        for field in fields(PeerConfig)
        if (variable := f"GOSSIPML_{field.name.upper()}") in environ
    }
    config = _apply(config, variables, "the environment")
    return _apply(config, {k: v for k, v in options.items() if v is not None}, "the command line")


def with_full_paths(config: PeerConfig) -> PeerConfig:
    """The same with whole paths, `~` too, so that a later start from another folder finds model and data again."""
    model, data = config.model, config.data
    path, colon, attribute = model.rpartition(":")
    if path.endswith(".py"):
        model = f"{Path(path).expanduser().absolute()}{colon}{attribute}"
    name, colon, argument = data.partition(":")
    if argument:
        data = f"{name}{colon}{Path(argument).expanduser().absolute()}"
    return replace(config, model=model, data=data)


def write_config(config: PeerConfig) -> str:
    """The configuration as TOML text that `load_config` reads back."""
    lines = ["# Options of `gossipml peer start` for this home; options on the command line win."]
    for field in fields(PeerConfig):
        value = getattr(config, field.name)
        if value is None or value == "":
            continue
        if field.name == "part":
            value = f"{value[0]}/{value[1]}"
        lines.append(f"{field.name.replace('_', '-')} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _apply(config: PeerConfig, values: Mapping[str, object], source: str) -> PeerConfig:
    known = {field.name for field in fields(PeerConfig)}
    changes: dict[str, object] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise UserError(f"{source} sets {key!r}, which is no option of a peer{hint}")
        try:
            changes[name] = _convert(name, value)
        except UserError as error:
            raise UserError(f"{error} (from {source})") from None
    try:
        return replace(config, **changes)  # type: ignore[arg-type]  # converted one by one above
    except UserError as error:
        raise UserError(f"{error} (from {source})") from None


def _convert(name: str, value: object) -> object:
    match name:
        case "listen" | "api":
            return value if isinstance(value, Address) else parse_address(str(value), what=f"{name} address")
        case "part":
            return value if isinstance(value, tuple) else parse_part(str(value))
        case "workers" if value == "auto":
            return 0
        case "workers" | "threads" | "seed" | "max_rounds" | "replicas" | "keep" | "pull_after" | "nice" | "batch":
            return _number(name, value, int)
        case "pause_on_load" if isinstance(value, str):
            return _number(name, value.strip().removesuffix("%").rstrip(), float)
        case "learning_rate" | "momentum" | "weight_decay":
            return _number(name, value, float)
        case "target_accuracy" | "publish_seconds" | "pause_on_load" | "audit_days":
            return _number(name, value, float)
        case "quota" | "upload_rate":
            return parse_size(value, what=name.replace("_", "-"))
        case "train" | "lan" | "pause_on_battery" | "audit" | "audit_inputs":
            return _switch(name, value)
        case _:
            if name == "local_steps" and isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if not isinstance(value, str):
                raise UserError(f"{name} must be text, not {value!r}")
            return value


def _number(name: str, value: object, kind: type[int] | type[float]) -> int | float:
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        if kind is int and isinstance(value, float):
            raise ValueError
        number = kind(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError:
        raise UserError(
            f"{name.replace('_', '-')} {value!r} is not {'a whole' if kind is int else 'a'} number"
        ) from None


def parse_size(value: object, *, what: str) -> int:
    """Bytes from a number or from text such as `500MB`, `20GB`, `1.5GiB`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?i?)b?", str(value).strip().lower())
    if match is None or match[2] not in UNITS:
        raise UserError(f"{what} {value!r} is not a size; write for example 500MB or 20GB, and 0 for no limit")
    return int(float(match[1]) * UNITS[match[2]])


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    try:
        return words[str(value).strip().lower()]
    except KeyError:
        raise UserError(f"{name} is {value!r}; write true or false") from None


def parse_part(text: str) -> tuple[int, int]:
    """`I/N`, counted from 1."""
    try:
        index, parts = (int(piece) for piece in text.split("/"))
    except ValueError:
        raise UserError(f"part {text!r} is not I/N; write for example 1/4 for the first of four") from None
    return index, parts
