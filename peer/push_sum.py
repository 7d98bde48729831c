"""Push-sum: averages over one-way links without knowing who hears us, by a weight that travels with the model.

Kempe, Dobra, Gehrke: Gossip-based computation of aggregate information (FOCS 2003); as stochastic gradient push:
Assran, Loizou, Ballas, Rabbat (ICML 2019). Each peer holds a sum s and a weight w, 1 at first; z = s / w is its model.
A push to k receivers splits both into k + 1 equal parts, one of which stays. Whoever receives adds them to its own:

    z <- (w z + w_m z_m) / (w + w_m),  w <- w + w_m

so what is kept here, sent and merged is z, and the weight is one number in the header: the sum of w z over all peers
and messages under way stays the same, and with it what all z tend to. Gradients step on z.

Loss. Weights that vanish with their messages would leave fewer and fewer. As in Hadjicostis, Vaidya,
Dominguez-Garcia (Robust distributed average consensus via exchange of running sums, IEEE TAC 2016) a message
carries the sum of all weight ever sent to its receiver, which takes the difference to the sum that it knew: what was
lost comes with the next message, a copy brings nothing, and one that was overtaken neither. (Running sums of the
models would take one vector per neighbour; here a lost weight arrives with the newer model instead.) What is
known not to have been taken is put back at once. Both sides count from an epoch that is drawn when the count begins:
when either has lost its memory, in a restart, a new one begins, and what was under way is gone with the peer.

Weights are claims, as ages are: at most MAX_CREDIT is taken from one message. Leaves out: detecting liars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from gossipml.ids import PeerId
from gossipml.peer.view import Rng

T = TypeVar("T")

MAX_CREDIT: Final = 4.0  # of one message: weights are 1 on average, and a push gives a receiver half of one at most
MAX_WEIGHT: Final = 2.0**20  # on the wire: as much as a million peers have
EPOCHS: Final = 2**32
LEDGERS: Final = 4096  # peers to whom, and from whom, weight is counted: eight views full; two of more meet seldom


@dataclass(frozen=True)
class Mass:
    """What travels with a model."""

    total: float
    """All the weight that was sent to its receiver in this epoch, with that of this message."""
    epoch: int


@dataclass
class _Sent:
    epoch: int
    total: float = 0.0
    share: float = 0.0  # of the latest message


@dataclass(frozen=True)
class _Heard:
    epoch: int
    total: float


class PushSum:
    """The weight of one peer, and the ledgers of what was sent and taken."""

    def __init__(self) -> None:
        self.weight = 1.0
        self._sent: dict[PeerId, _Sent] = {}
        self._heard: dict[PeerId, _Heard] = {}
        self._lives: dict[PeerId, bytes] = {}

    def met(self, peer: PeerId, boot: bytes) -> None:
        """A session with the peer has begun; another `boot` than the last time means that it was started anew."""
        if self._lives.pop(peer, boot) != boot:
            self._sent.pop(peer, None)  # it has forgotten what it took
        self._lives[peer] = boot
        _bound(self._lives)

    def split(self, receivers: Sequence[PeerId], rng: Rng) -> list[Mass]:
        """The weights for a push to these receivers; ours is less by them."""
        share = self.weight / (len(receivers) + 1)
        masses = []
        for peer in receivers:
            sent = self._sent.pop(peer, None) or _Sent(int(rng.random() * EPOCHS))
            if sent.total + share > MAX_WEIGHT:  # nearly all of it was taken long ago
                sent = _Sent(int(rng.random() * EPOCHS))
            self._sent[peer] = sent
            sent.total += share
            sent.share = share
            self.weight -= share
            masses.append(Mass(sent.total, sent.epoch))
        _bound(self._sent)
        return masses

    def put_back(self, peer: PeerId, total: float | None = None) -> None:
        """The latest message to the peer, or the one with that total if it is the latest, will never be taken."""
        sent = self._sent.get(peer)
        if sent is not None and total in (None, sent.total):
            self.weight += sent.share
            sent.total -= sent.share
            sent.share = 0.0

    def credit(self, peer: PeerId, mass: Mass) -> float:
        """The weight that a message of the peer brings now; more than MAX_CREDIT waits for its next ones."""
        return min(max(mass.total - self._known(peer, mass), 0.0), MAX_CREDIT)

    def merged(self, peer: PeerId, mass: Mass) -> None:
        """The message was taken."""
        credit = self.credit(peer, mass)
        self.weight += credit
        heard = _Heard(mass.epoch, self._known(peer, mass) + credit)
        self._heard.pop(peer, None)
        self._heard[peer] = heard
        _bound(self._heard)

    def _known(self, peer: PeerId, mass: Mass) -> float:
        """What was taken of all that the peer has sent us, before this message."""
        heard = self._heard.get(peer)
        return heard.total if heard is not None and heard.epoch == mass.epoch else 0.0


def _bound(ledgers: dict[PeerId, T]) -> None:
    while len(ledgers) > LEDGERS:
        del ledgers[next(iter(ledgers))]
