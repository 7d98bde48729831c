"""What a population takes in memory, before anything is allocated: an estimate, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from gossipml.errors import UserError

SHARE = 0.9  # of what is free: the rest is for chunks, evaluation and everybody else
STATE = 20_000  # bytes of a peer's state machine (measured: 12 to 18 kB with 60 remembered claims)
UNDER_WAY = 2.0  # copies of a model: the latest sent, and one that is still on its way or waits to be read


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, by what they are for."""

    models: int
    optimiser: int
    messages: int
    samples: int
    peers: int
    averages: int = 0

    @property
    def total(self) -> int:
        return self.models + self.optimiser + self.messages + self.samples + self.peers + self.averages


def estimate(
    peers: int, size: int, *, optimiser_copies: int, samples: int, delay_rounds: float = 0.0, averages: int = 0
) -> Memory:
    """Of N peers with models of `size` float32; `samples` is the bytes of training and test data; `averages` over time
    are kept of so many peers."""
    models = 4 * peers * size
    messages = int(models * (UNDER_WAY + delay_rounds))
    return Memory(models, optimiser_copies * models, messages, samples, STATE * peers, 4 * averages * size)


def check_memory(needed: Memory, peers: int, device: torch.device, free: int | None = None) -> None:
    """UserError, with what would fit, where it does not. `free`: bytes; asked for where not given."""
    if free is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    room = int(free * SHARE)
    if needed.total <= room:
        return
    each = (needed.total - needed.samples) / peers
    fit = int((room - needed.samples) / each)
    parts = ", ".join(
        f"{name} {_gib(count)}"
        for name, count in (
            ("models", needed.models),
            ("optimiser", needed.optimiser),
            ("messages", needed.messages),
            ("averages", needed.averages),
            ("samples", needed.samples),
        )
    )
    remedy = f"at most {fit} peers fit" if fit > 0 else "not even one peer fits; take a smaller model or less data"
    raise UserError(
        f"{peers} peers take {_gib(needed.total)} ({parts}) and {_gib(room)} are free on {device}: {remedy}"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
