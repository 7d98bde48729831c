"""`state/resume`: what a peer needs to go on after any kind of end, as one file written atomically.

    4 bytes big endian: length of the header | header, canonical msgpack | the trainer's own state

The header holds the model's digest, the age, the round, counters, and a SHA-256 of the trainer's state, so that
a file that a broken disk has changed is noticed and set aside instead of merged into the network.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from dataclasses import dataclass

from gossipml import codec
from gossipml.env import Disk, Env, write_atomic
from gossipml.errors import RemoteError
from gossipml.models.trainer import Layout

log = logging.getLogger("gossipml.learner")

PATH = "state/resume"
MAX_HEADER = 4096
MAX_STATE = 64 << 30  # no model that one machine trains is larger
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Resume:
    age: float
    round: int
    samples: int
    seconds: float
    trainer: bytes
    """What `Trainer.save` gave."""


async def save_resume(env: Env, layout: Layout, resume: Resume) -> None:
    """OSError when the disk does not take it; the former state is then still there."""
    await write_atomic(env.disk, PATH, await env.compute.run(_encode, layout, resume))


async def load_resume(env: Env, layout: Layout) -> Resume | None:
    """The state of the last run of this model. A damaged one, or one of another model, is set aside."""
    try:
        data = await env.disk.read(PATH, limit=MAX_STATE)
    except FileNotFoundError:
        return None
    try:
        resume, model, digest = await env.compute.run(_decode, data)
    except RemoteError as error:
        await _set_aside(env.disk, f"{PATH}.damaged", f"is damaged ({error})")
        return None
    if digest != layout.digest:
        await _set_aside(env.disk, f"{PATH}.{digest[:12]}", f"is of another model ({model})")
        return None
    return resume


def _encode(layout: Layout, resume: Resume) -> bytes:
    header = codec.pack(
        {
            "model": layout.model,
            "digest": layout.digest,
            "age": float(resume.age),
            "round": resume.round,
            "samples": resume.samples,
            "seconds": float(resume.seconds),
            "sha256": hashlib.sha256(resume.trainer).digest(),
        }
    )
    return b"".join((_LENGTH.pack(len(header)), header, resume.trainer))


def _decode(data: bytes) -> tuple[Resume, str, str]:
    """The state, the model's name and its digest; RemoteError when the file is not what `_encode` gave."""
    if len(data) < _LENGTH.size:
        raise RemoteError("the file is cut off")
    (length,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size + length
    fields = codec.as_map(codec.unpack(data[_LENGTH.size : start], limit=MAX_HEADER))
    state = data[start:]
    if hashlib.sha256(state).digest() != codec.get_bytes(fields, "sha256", size=32):
        raise RemoteError("its checksum does not fit")
    resume = Resume(
        codec.get_float(fields, "age"),
        codec.get_int(fields, "round"),
        codec.get_int(fields, "samples"),
        codec.get_float(fields, "seconds"),
        state,
    )
    return resume, codec.get_str(fields, "model"), codec.get_str(fields, "digest", limit=64)


async def _set_aside(disk: Disk, name: str, why: str) -> None:
    log.warning("%s %s; it is kept as %s and training starts anew", PATH, why, name)
    await disk.rename(PATH, name)
    await disk.fsync_folder("state")
