"""The content of a version: a safetensors file. Its header is read and checked here without torch.

    8 bytes little endian: length of the header | header, JSON | the tensors' bytes, without a gap

https://huggingface.co/docs/safetensors, "Format". The header is at most 1 MiB here, with at most 10,000 tensors; each
way in which it can be wrong has an error of its own. What gossipml adds to the metadata is one entry of JSON: several
entries would be written in another order each time, and equal parameters shall be equal files, which are stored once.

Left out: the values. Whoever loads them checks that they are finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from gossipml.errors import RemoteError, UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

PREFIX = 8
MAX_HEADER = 1 << 20
MAX_TENSORS = 10_000
MAX_TENSOR_NAME = 512
MAX_RANK = 16
MAX_METADATA = 1000
INFO = "gossipml"
"""The metadata entry of files that gossipml writes."""

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
"""Bits of an element of each type, as safetensors 0.8 names them."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in the file."""
    end: int


@dataclass(frozen=True)
class Header:
    tensors: tuple[TensorInfo, ...]
    """In the order of their bytes."""
    metadata: Mapping[str, str]

    @property
    def info(self) -> dict[str, str]:
        """What `pack` noted; empty for a file from elsewhere."""
        try:
            found = json.loads(self.metadata.get(INFO, "{}"))
        except (ValueError, RecursionError):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, str)} if type(found) is dict else {}

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def header_size(start: bytes | memoryview, size: int) -> int:
    """How many bytes of a file of `size` bytes `read_header` needs, from its first 8. RemoteError when too many."""
    if len(start) < PREFIX or size < PREFIX + 2:
        raise RemoteError(f"a file of {min(size, len(start))} bytes is no safetensors file")
    length = int.from_bytes(start[:PREFIX], "little")
    if length > MAX_HEADER:
        raise RemoteError(f"the safetensors header claims {length} bytes; the limit is {MAX_HEADER}")
    if length > size - PREFIX:
        raise RemoteError(f"the safetensors header claims {length} bytes of a file of {size}")
    return PREFIX + length


def read_header(start: bytes | memoryview, size: int) -> Header:
    """Names, types and shapes of a safetensors file of `size` bytes, from its first `header_size` bytes (more may
    follow). RemoteError, one for each malformation."""
    end = header_size(start, size)
    if len(start) < end:
        raise RemoteError(f"the safetensors header takes {end} bytes, {len(start)} are there")
    raw = bytes(start[PREFIX:end])
    if not raw.startswith(b"{"):
        raise RemoteError("the safetensors header does not begin with {")
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise RemoteError("the safetensors header is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"the safetensors header is not JSON: {error or 'nested too deep'}") from None
    metadata = _metadata(fields.pop("__metadata__", {}))
    if len(fields) > MAX_TENSORS:
        raise RemoteError(f"{len(fields)} tensors; the limit is {MAX_TENSORS}")
    tensors = sorted(
        (_tensor(name, value, end) for name, value in fields.items()), key=lambda tensor: (tensor.start, tensor.end)
    )
    position = end
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the one before it" if tensor.start < position else "leaves a hole before it"
            raise RemoteError(f"the tensor {tensor.name!r:.100} {what}, at offset {tensor.start}")
        position = tensor.end
    if position != size:
        raise RemoteError(f"the tensors end at {position}, the file at {size}")
    return Header(tuple(tensors), metadata)


def read_file_header(path: Path) -> Header:
    """The header of a user's file. UserError when it is no safetensors file or cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(PREFIX)
            start += file.read(header_size(start, size) - PREFIX)
        return read_header(start, size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except RemoteError as error:
        raise UserError(f"{path} cannot be used: {error}; save it with the safetensors package") from None


def pack(tensors: Mapping[str, torch.Tensor], info: Mapping[str, str]) -> bytes:
    """A safetensors file of these tensors; `info` becomes the one entry of its metadata. The same in, the same out.

    UserError when the file would be refused by `read_header`. The only function here that needs torch.
    """
    from safetensors.torch import save  # imports torch

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    data = save(whole, {INFO: json.dumps(dict(info), sort_keys=True)})
    try:
        read_header(memoryview(data)[: header_size(memoryview(data)[:PREFIX], len(data))], len(data))
    except RemoteError as error:
        raise UserError(f"this model cannot be stored: {error}") from None
    return data


def _tensor(name: str, value: object, base: int) -> TensorInfo:
    what = f"the tensor {name!r:.100}"
    if not name or len(name) > MAX_TENSOR_NAME:
        raise RemoteError(f"a tensor's name has {len(name)} characters; 1 to {MAX_TENSOR_NAME} are allowed")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise RemoteError(f"{what} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise RemoteError(f"{what} has the unknown type {dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(length) for length in shape):
        raise RemoteError(f"{what} has no shape of at most {MAX_RANK} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise RemoteError(f"{what} has no two offsets")
    start, end = offsets
    bits = BITS[dtype] * math.prod(shape)
    if start > end or bits % 8 or bits // 8 != end - start:
        raise RemoteError(f"{what} of shape {shape!s:.100} and type {dtype} does not take the bytes {start} to {end}")
    return TensorInfo(name, dtype, tuple(shape), base + start, base + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48  # far above any file; bounds the products


def _metadata(value: object) -> dict[str, str]:
    if (
        not isinstance(value, dict)
        or len(value) > MAX_METADATA
        or not all(isinstance(text, str) for text in value.values())
    ):
        raise RemoteError(f"the safetensors metadata is not a map of at most {MAX_METADATA} texts")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name stands there twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
