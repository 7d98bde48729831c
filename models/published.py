"""A published version as one safetensors file: the tensors of the module's `state_dict`, by their names.

The file loads with the safetensors package alone, and into a plain torch module with `load_state_dict`. Its one
metadata entry names model and layout for a person; what counts when it is read are names, shapes and values (see
`FlatModule.vector_of`), so that files from elsewhere can be imported.

Bytes from peers are hostile: `gossipml.models.artifact` has judged the header before a file comes here; the bound
is checked again because the library allows a hundred times as much.
"""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from gossipml.errors import UserError
from gossipml.models.trainer import Layout

METADATA = "gossipml"
MAX_HEADER = 1 << 20  # THREATS.md


def pack(tensors: dict[str, torch.Tensor], layout: Layout) -> bytes:
    """The file's bytes; the same tensors give the same."""
    # One entry: the library writes several in an order that is not the same each time.
    return save(tensors, {METADATA: json.dumps({"digest": layout.digest, "model": layout.model})})


def unpack(content: bytes) -> dict[str, torch.Tensor]:
    """The tensors by name. UserError when it is no safetensors file."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(MAX_HEADER, len(content) - 8):
        raise UserError(
            f"it is no safetensors file: its header claims {size} of {len(content)} bytes, at most {MAX_HEADER}"
        )
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"it is no safetensors file ({type(error).__name__}: {error})") from None
