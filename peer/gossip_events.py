"""What gossip hears and what it answers: the events that `gossip.Gossip` handles, and the actions that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gossipml.ids import PeerId
from gossipml.peer.push_sum import Mass
from gossipml.peer.wire import Update


@dataclass(frozen=True)
class ModelFacts:
    """What gossip must know about the model: never the model itself."""

    model: str
    digest: str
    parameters: int
    body_length: Callable[[str], int | None]
    """Bytes of a body in an encoding; None for an encoding that is not known here."""
    choose: Callable[[str, float | None, float], str] = lambda now, bandwidth, seconds: now
    """For AUTO: the encoding of the next send over a link, from that of the last one ("" before the first), the
    link's bytes a second (None before the first) and the seconds that a send may take."""


# Events.


@dataclass(frozen=True)
class LearnerReady:
    """The model is loaded: updates can be made and merged."""

    facts: ModelFacts


@dataclass(frozen=True)
class LearnerGone:
    """The worker has died or is being replaced. What was waiting for it is lost."""


@dataclass(frozen=True)
class Restored:
    """The learner has loaded a model from the disk, with the age and round that belong to it."""

    age: float
    round: int


@dataclass(frozen=True)
class RoundFinished:
    samples: int
    round: int


@dataclass(frozen=True)
class TrainingFinished:
    """Enough accuracy or enough rounds: from here on only averaging. TrainingResumed or a RoundFinished ends that."""


@dataclass(frozen=True)
class TrainingResumed:
    """The first round after a rest begins: from here on our model is no average any more."""


@dataclass(frozen=True)
class UpdateOffered:
    """The header of an update has come; its body has not been read."""

    sender: PeerId
    update: Update


@dataclass(frozen=True)
class Asked:
    """A peer asks for our model without sending its own."""

    sender: PeerId
    update: Update


@dataclass(frozen=True)
class UpdateReceived:
    """The body of an accepted update is complete."""

    sender: PeerId


@dataclass(frozen=True)
class UpdateLost:
    """The body of an accepted update will not be complete: the session broke."""

    sender: PeerId


@dataclass(frozen=True)
class MergeDone:
    """The learner has taken in an update, or refused it for what it holds."""

    sender: PeerId
    applied: bool
    reason: str
    distance: float
    fault: bool = True
    """Refused for what no honest peer sends."""


@dataclass(frozen=True)
class MergeFailed:
    """The learner could not judge the update: our trouble, not the sender's."""

    sender: PeerId


@dataclass(frozen=True)
class SendDone:
    """A SendUpdate, AskUpdate or ReplyUpdate has come to its end, well or not."""

    peer: PeerId
    ok: bool
    reason: str
    in_doubt: bool = False
    """Not ok, and yet it may have arrived."""


@dataclass(frozen=True)
class SendRefused:
    """The peer did not merge a model of ours that it received."""

    peer: PeerId
    mass_total: float
    """Which one: that of its mass; push-sum alone wants to know."""


@dataclass(frozen=True)
class Met:
    """A session with the peer has begun. `boot` is another one when the peer was started anew."""

    peer: PeerId
    boot: bytes


@dataclass(frozen=True)
class Misbehaved:
    """The peer broke the protocol outside of what gossip sees."""

    peer: PeerId
    reason: str


@dataclass(frozen=True)
class Tick:
    """The time that `next_deadline` named may have come."""


Event: TypeAlias = (
    LearnerReady
    | LearnerGone
    | Restored
    | RoundFinished
    | TrainingFinished
    | TrainingResumed
    | UpdateOffered
    | Asked
    | UpdateReceived
    | UpdateLost
    | MergeDone
    | MergeFailed
    | SendDone
    | SendRefused
    | Met
    | Misbehaved
    | Tick
)


# Actions.


@dataclass(frozen=True)
class SendUpdate:
    """Push our current model; answer with SendDone."""

    to: PeerId
    reply_wanted: bool
    part: str = ""
    """The end of the encoding's name: which part of the model is sent; "" for all of it."""
    mass: Mass | None = None
    """For the header."""


@dataclass(frozen=True)
class AskUpdate:
    """Ask for the peer's model; answer with SendDone when the question is on its way."""

    to: PeerId


@dataclass(frozen=True)
class ReplyUpdate:
    """Send our model as the answer to a push or a question; answer with SendDone."""

    to: PeerId
    part: str = ""


@dataclass(frozen=True)
class Accept:
    """Read the offered body; answer with UpdateReceived or UpdateLost."""

    sender: PeerId


@dataclass(frozen=True)
class Refuse:
    """Do not store the offered body."""

    sender: PeerId
    reason: str
    fault: bool
    """Whether the header can not come from an honest peer that has seen our hello."""


@dataclass(frozen=True)
class Merge:
    """Apply the sender's body, x <- (1 - weight) x + weight m; answer with MergeDone or MergeFailed."""

    sender: PeerId
    weight: float


@dataclass(frozen=True)
class MergeTogether:
    """Apply the bodies of all these senders at once; answer with MergeDone or MergeFailed for each."""

    senders: tuple[PeerId, ...]


@dataclass(frozen=True)
class Settle:
    """Nobody around trains any more: our model becomes its average over time, for all to agree on. No answer."""


@dataclass(frozen=True)
class Forget:
    """The sender's body, which waits to be merged with others, is let go: it has become stale meanwhile."""

    sender: PeerId


@dataclass(frozen=True)
class Quarantine:
    """Have nothing to do with the peer until then."""

    peer: PeerId
    until: float
    reason: str


Send: TypeAlias = SendUpdate | AskUpdate | ReplyUpdate
Action: TypeAlias = Send | Accept | Refuse | Merge | MergeTogether | Settle | Forget | Quarantine
