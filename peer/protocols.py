"""The gossip protocols by name: what `gossipml.peer.gossip` asks about whom to send to, what goes, and how it merges.

A protocol is a choice in each of a few independent questions; the state that some need lies in files of their own
(`token_account`, `push_sum`, `fixed_graph`). Admission, ages, conduct and timing are the same for all.

| name | N | source |
|---|---|---|
| `push:N` | receivers [4] | epidemic learning: de Vos, Farhadkhani, Guerraoui, Kermarrec, Pires, Sharma (NeurIPS 2023) |
| `push-pull:N` | receivers [2] | Boyd, Ghosh, Prabhakar, Shah: Randomized gossip algorithms (IEEE TIT 2006): a pair of peers averages what both had before, which keeps its mean |
| `pull:N` | peers asked [4] | Demers et al.: Epidemic algorithms (PODC 1987) |
| `merge-update:N` | receivers [1] | Ormandi, Hegedus, Jelasity: Gossip learning with linear models on fully distributed data (CCPE 2013), weighted by age: Hegedus, Danner, Jelasity (JPDC 2021) |
| `update-merge:N` | receivers [1] | the same: what comes in waits until the round is over; the merge is what is sent |
| `push-sum:N` | receivers [2] | `push_sum` |
| `token-account[-STRATEGY]:N` | capacity [20] | `token_account`; N is twice the reactivity. Strategies: randomized, generalized, simple, proactive |
| `partitioned:N` | fragments [8] | Hegedus, Danner, Jelasity 2021; as N receivers of one fragment each: Biswas et al., DivShare (2025) |
| `sub-sampled:N` | one in N goes [8] | Hegedus, Danner, Jelasity 2021; N receivers of other coordinates each |
| `d-psgd:N` | degree, even [4] | `fixed_graph` |

Left out of update-merge: the papers train a copy of each incoming model on the local data, too, before the merge;
here it is merged as its sender trained it. Leaves out: everything with state.
"""  # noqa: E501 a table row is one line

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from gossipml.errors import UserError
from gossipml.peer.token_account import Strategy, TokenConfig
from gossipml.peer.view import Rng

MAX_NUMBER = 64  # sessions of a peer: more receivers would be dialled anew each time

Wish = Literal["unheard", "always", "never"]
Weighing = Literal["round", "pair", "mass", "edge"]
Part = Literal["whole", "fragment", "sample"]


@dataclass(frozen=True)
class GossipProtocol:
    """The answers of one protocol."""

    name: str = "push"
    fanout: int = 4
    """Receivers at the end of a round. Non-IID MNIST with 100 peers: 1 gives 0.837, 2 0.882, 4 0.921, 7 0.932 mean
    accuracy."""
    wish: Wish = "unheard"
    """Whose model is wished for in return: of receivers not heard from in the round before, of all, of none."""
    asks: bool = False
    """Whether receivers get a request in place of our model."""
    weighing: Weighing = "round"
    """round: the mean by age of all models of a round; pair: of two models by age, each time; mass: push-sum; edge: W
    of the fixed graph."""
    part: Part = "whole"
    """What goes of the model: all; one of `parts` stretches, in turn; one in `parts` coordinates, at random."""
    parts: int = 1
    waits: bool = False
    """Whether what comes in during a round is merged at its end."""
    cycles: int = 0
    """Rings of the fixed graph; 0: receivers are random."""
    tokens: TokenConfig | None = None

    @property
    def sends_rounds(self) -> bool:
        """Whether the whole model as the round leaves it is sent at the end of every round."""
        return not (self.asks or self.waits or self.tokens) and self.part == "whole"

    @property
    def share(self) -> float:
        """Of the parameters that go in one message."""
        return 1.0 / self.parts

    def part_name(self, step: int, rng: Rng) -> str:
        """What the name of the encoding gets at its end for the step-th part that is sent; nothing for all."""
        match self.part:
            case "whole":
                return ""
            case "fragment":
                return f"-{step % self.parts + 1}of{self.parts}"
            case "sample":
                return f"-1in{self.parts}-{int(rng.random() * 2**32):08x}"


def part_of(encoding: str) -> tuple[str, float]:
    """What an encoding's name says of what is sent: which fragment, "" for none, and the share of the parameters."""
    match = _PART.search(encoding)
    if match is None:
        return "", 1.0
    fragments, one_in, percent = match.groups()
    if fragments:
        return match[0], 1.0 / int(fragments)
    return "", 1.0 / int(one_in) if one_in else int(percent) / 100


_PART = re.compile(r"-(?:[0-9]+of([1-9][0-9]*)|1in([1-9][0-9]*)-[0-9a-f]{8}|top([1-9][0-9]*))\Z", re.ASCII)


@dataclass(frozen=True)
class _Family:
    number: int
    make: Callable[[int], GossipProtocol]
    least: int = 1
    what: str = "receivers"


def _account(strategy: Strategy, n: int) -> GossipProtocol:
    tokens = TokenConfig(strategy, capacity=n, reactivity=max(1, n // 2))
    return GossipProtocol(fanout=1, wish="never", weighing="pair", tokens=tokens)


_FAMILIES: dict[str, _Family] = {
    "push": _Family(4, lambda n: GossipProtocol(fanout=n)),
    "push-pull": _Family(2, lambda n: GossipProtocol(fanout=n, wish="always", weighing="pair")),
    "pull": _Family(4, lambda n: GossipProtocol(fanout=n, asks=True)),
    "merge-update": _Family(1, lambda n: GossipProtocol(fanout=n, wish="never", weighing="pair")),
    "update-merge": _Family(1, lambda n: GossipProtocol(fanout=n, wish="never", weighing="pair", waits=True)),
    "push-sum": _Family(2, lambda n: GossipProtocol(fanout=n, wish="never", weighing="mass")),
    "token-account": _Family(20, lambda n: _account("randomized", n), what="tokens"),
    "token-account-generalized": _Family(20, lambda n: _account("generalized", n), what="tokens"),
    "token-account-simple": _Family(20, lambda n: _account("simple", n), what="tokens"),
    "token-account-proactive": _Family(20, lambda n: _account("proactive", n), what="tokens"),
    "partitioned": _Family(
        8, lambda n: GossipProtocol(fanout=n, wish="never", part="fragment", parts=n), least=2, what="fragments"
    ),
    "sub-sampled": _Family(
        8,
        lambda n: GossipProtocol(fanout=n, wish="never", weighing="pair", part="sample", parts=n),
        least=2,
        what="as the share, one in so many,",
    ),
    "d-psgd": _Family(
        4,
        lambda n: GossipProtocol(fanout=n, wish="never", weighing="edge", cycles=n // 2),
        least=2,
        what="neighbours",
    ),
}

PROTOCOLS = tuple(_FAMILIES)


def parse_protocol(text: str) -> GossipProtocol:
    """The protocol that a person named, `NAME` or `NAME:N`. UserError when there is none."""
    name, colon, argument = text.partition(":")
    family = _FAMILIES.get(name)
    if family is None:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.5)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise UserError(f"there is no gossip protocol {name[:40]!r};{hint} known are {', '.join(PROTOCOLS)}")
    number = family.number
    if colon:
        number = int(argument) if re.fullmatch(r"[0-9]{1,3}", argument) else -1
        if not family.least <= number <= MAX_NUMBER:
            raise UserError(
                f"{text[:60]!r}: {name} takes {family.least} to {MAX_NUMBER} {family.what}, for example "
                f"{name}:{family.number}"
            )
        if name == "d-psgd" and number % 2:
            raise UserError(f"{text!r}: each of its rings gives a peer 2 neighbours; write an even number")
    return replace(family.make(number), name=name if number == family.number else f"{name}:{number}")
