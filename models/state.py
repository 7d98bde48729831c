"""A trainer's state as one safetensors file: tensors by name, and how far it was in the metadata.

Files on disk get damaged and mixed up: everything is checked before anything is used.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gossipml.errors import UserError
from gossipml.models.trainer import Layout

FORMAT = "gossipml-state-1"
MAX_HEADER = 1 << 20  # names of 10,000 optimiser tensors


@dataclass(frozen=True)
class Progress:
    """What is not a tensor."""

    digest: str
    model: str
    steps: int
    serve_average: bool
    averaged: float
    """How many merges the average has seen."""
    rounds_alone: int
    order: str
    optimiser: str
    optimiser_kind: str


def pack(tensors: dict[str, torch.Tensor], progress: Progress) -> bytes:
    """The file's bytes."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: the order of several is not the same each time, and equal states shall be equal files.
    return save(whole, {FORMAT: json.dumps(asdict(progress))})


def unpack(data: bytes, layout: Layout) -> tuple[dict[str, torch.Tensor], Progress]:
    """Tensors and progress. UserError when damaged, or saved by another model than `layout` says."""
    remedy = "remove the file to start from the beginning"
    try:
        size = int.from_bytes(data[:8], "little")
        if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
            raise ValueError(f"its header claims {size} bytes")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        fields = json.loads(metadata[FORMAT])
        progress = Progress(
            digest=str(fields["digest"]),
            model=str(fields["model"]),
            steps=int(fields["steps"]),
            serve_average=bool(fields["serve_average"]),
            averaged=float(fields["averaged"]),
            rounds_alone=int(fields["rounds_alone"]),
            order=str(fields["order"]),
            optimiser=str(fields["optimiser"]),
            optimiser_kind=str(fields["optimiser_kind"]),
        )
        if progress.steps < 0 or not 0 <= progress.averaged < math.inf:
            raise ValueError("its counters are out of range")
        if (progress.model, progress.digest) == (layout.model, layout.digest):
            tensors = load(data)
            for name in ("parameters", "average"):
                tensor = tensors[name]
                if tensor.shape != (layout.size,) or tensor.dtype != torch.float32:
                    raise ValueError(f"{name} has shape {list(tensor.shape)} and type {tensor.dtype}")
                if not math.isfinite(float(tensor.sum())):
                    raise ValueError(f"{name} is not finite")
            return tensors, progress
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"the saved state is damaged ({type(error).__name__}: {error}); {remedy}") from None
    raise UserError(
        f"the saved state is of the model {progress.model!r:.64} ({progress.digest[:12]}), this peer trains "
        f"{layout.model!r} ({layout.digest[:12]}); start with the former model, or {remedy}"
    )
