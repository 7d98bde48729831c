"""Reads the files of CIFAR-10's "python version" without unpickling them.

They are pickles of protocol 2, written by Python 2: one dictionary with the class numbers, the file names and one
numpy array of bytes (https://www.cs.toronto.edu/~kriz/cifar.html). A pickle is a program for a stack machine that may
call anything; this is a machine of its own for the 26 instructions that these files use. Nothing is ever imported or
called: the three names that numpy's arrays need are constants here, and where the program calls one of them the
machine builds a plain value. Everything else is refused.

Bounds: the file is read whole and limited (`MAX_FILE`), and so is the number of instructions, none of which makes
more than its own bytes and one small object (a stored value is taken up again by reference). Nothing walks a value
recursively. The result is a dictionary of bytes, int, list and `Pixels`.

Not here: other protocols. Who has repacked the files can use the binary version.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gossipml.errors import UserError

MAX_FILE: Final = 64 << 20  # bytes; a batch of 10,000 pictures has 31 MB
MAX_STEPS: Final = 400_000  # instructions; a batch has some 60,000


@dataclass(frozen=True)
class _Name:
    """One of the three callables, as a constant."""

    path: Literal["_reconstruct", "ndarray", "dtype"]


@dataclass
class Pixels:
    """A numpy array of bytes; empty until its BUILD."""

    values: NDArray[np.uint8] | None = None


class _ByteType:
    """numpy's dtype of unsigned bytes."""


class _Mark: ...


Value: TypeAlias = (
    "bytes | int | list[Value] | dict[str, Value] | tuple[Value, ...] | _Name | Pixels | _ByteType | _Mark | None"
)

NAMES: Final = {
    b"numpy.core.multiarray\n_reconstruct": _Name("_reconstruct"),
    b"numpy\nndarray": _Name("ndarray"),
    b"numpy\ndtype": _Name("dtype"),
}


class Refused(Exception):
    """What is wrong with the program, in a few words."""


def read_batch(data: bytes, where: str) -> dict[str, Value]:
    """The dictionary in a file of the python version. UserError for anything else."""
    if len(data) > MAX_FILE:
        raise UserError(f"{where} has {len(data)} bytes, over {MAX_FILE}; {REMEDY}")
    try:
        result = _Machine(data).run()
        if not isinstance(result, dict):
            raise Refused("it holds no dictionary")
    except (Refused, struct.error, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not a file of CIFAR-10's python version: {error}; {REMEDY}") from None
    return result


REMEDY: Final = (
    "it is never unpickled, since a pickle can run any code; use the binary version (cifar-10-binary.tar.gz)"
)


class _Machine:
    """Stack, memory and program of one pickle."""

    def __init__(self, program: bytes) -> None:
        self._program = program
        self._at = 0
        self._stack: list[Value] = []
        self._memo: dict[int, Value] = {}

    def run(self) -> Value:
        """The value on the stack at STOP; Refused for what these files do not do."""
        if self._bytes(2) != b"\x80\x02":
            raise Refused("it is no pickle of protocol 2")
        steps = 0
        while (code := self._bytes(1)) != b".":
            steps += 1
            if steps > MAX_STEPS:
                raise Refused(f"it has over {MAX_STEPS} instructions")
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise Refused(f"instruction {code!r} at byte {self._at - 1} is not one that these files use")
            instruction(self)
        if len(self._stack) != 1 or self._at != len(self._program):
            raise Refused("it does not end with its STOP")
        return self._stack[0]

    def _bytes(self, count: int) -> bytes:
        if self._at + count > len(self._program):
            raise Refused("it is cut off")
        self._at += count
        return self._program[self._at - count : self._at]

    def _number(self, form: str) -> int:
        value: int
        (value,) = struct.unpack(form, self._bytes(struct.calcsize(form)))
        return value

    def _line(self) -> bytes:
        end = self._program.find(b"\n", self._at, self._at + 100)
        if end < 0:
            raise Refused("a name is too long")
        line = self._program[self._at : end]
        self._at = end + 1
        return line

    def _push(self, value: Value) -> None:
        self._stack.append(value)

    def _pop(self) -> Value:
        if not self._stack:
            raise Refused("its stack is empty")
        return self._stack.pop()

    def _since_mark(self) -> list[Value]:
        for place in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[place], _Mark):
                values = self._stack[place + 1 :]
                del self._stack[place:]
                return values
        raise Refused("a mark is missing")

    def _string(self, form: str) -> None:
        count = self._number(form)
        if count < 0:
            raise Refused(f"a text has {count} bytes")
        self._push(self._bytes(count))

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _put(self, form: str) -> None:
        if not self._stack:
            raise Refused("its stack is empty")
        self._memo[self._number(form)] = self._stack[-1]

    def _get(self, form: str) -> None:
        number = self._number(form)
        if number not in self._memo:
            raise Refused(f"nothing was stored as {number}")
        self._push(self._memo[number])

    def _append(self, values: list[Value]) -> None:
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, list) or not all(isinstance(value, int | bytes) for value in values):
            raise Refused("a list holds more than numbers and texts")
        target.extend(values)

    def _set_items(self) -> None:
        values = self._since_mark()
        target = self._stack[-1] if self._stack else None
        if not isinstance(target, dict) or len(values) % 2:
            raise Refused("a dictionary is malformed")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, bytes) or not isinstance(value, bytes | int | list | Pixels):
                raise Refused("a dictionary holds more than texts, numbers, lists and arrays")
            target[key.decode("ascii")] = value

    def _global(self) -> None:
        path = self._line() + b"\n" + self._line()
        if path not in NAMES:
            raise Refused(f"it names {path.decode('ascii', 'replace').replace(chr(10), '.')!r}")
        self._push(NAMES[path])

    def _call(self) -> None:
        """What the call would give, when it is one of the two that belong to arrays of bytes."""
        arguments, function = self._pop(), self._pop()
        if function == NAMES[b"numpy.core.multiarray\n_reconstruct"]:
            if arguments != (NAMES[b"numpy\nndarray"], (0,), b"b"):
                raise Refused("it makes something else than an array")
            self._push(Pixels())
        elif function == NAMES[b"numpy\ndtype"]:
            if arguments not in ((b"u1", 0, 1), (b"|u1", 0, 1)):
                raise Refused("it has an array of something else than bytes")
            self._push(_ByteType())
        else:
            raise Refused("it calls what is no function")

    def _build(self) -> None:
        """BUILD: the state of an array, or of the type of bytes (byte order and the like, which bytes have not)."""
        state, target = self._pop(), self._stack[-1] if self._stack else None
        if isinstance(target, _ByteType):
            return
        if not isinstance(target, Pixels) or target.values is not None:
            raise Refused("it builds something else than an array")
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("the state of an array is malformed")
        version, shape, kind, fortran, data = state
        if version != 1 or not isinstance(kind, _ByteType) or fortran or not isinstance(data, bytes):
            raise Refused("an array does not lie row by row in bytes")
        if not isinstance(shape, tuple) or len(shape) != 2:
            raise Refused("an array has not two dimensions")
        rows, columns = shape
        if not isinstance(rows, int) or not isinstance(columns, int) or min(rows, columns) < 1:
            raise Refused("an array has no size")
        if rows * columns != len(data):
            raise Refused(f"an array of {rows} x {columns} has {len(data)} bytes")
        target.values = np.frombuffer(data, dtype=np.uint8).reshape(rows, columns)


_INSTRUCTIONS: Final[dict[bytes, Callable[[_Machine], None]]] = {  # names and forms as in Python's pickletools
    b"(": lambda m: m._push(_Mark()),
    b"}": lambda m: m._push({}),  # EMPTY_DICT
    b"]": lambda m: m._push([]),  # EMPTY_LIST
    b")": lambda m: m._push(()),  # EMPTY_TUPLE
    b"N": lambda m: m._push(None),
    b"\x89": lambda m: m._push(0),  # NEWFALSE
    b"\x88": lambda m: m._push(1),  # NEWTRUE
    b"K": lambda m: m._push(m._number("<B")),  # BININT1
    b"M": lambda m: m._push(m._number("<H")),  # BININT2
    b"J": lambda m: m._push(m._number("<i")),  # BININT
    b"U": lambda m: m._string("<B"),  # SHORT_BINSTRING
    b"T": lambda m: m._string("<i"),  # BINSTRING
    b"q": lambda m: m._put("<B"),  # BINPUT
    b"r": lambda m: m._put("<I"),  # LONG_BINPUT
    b"h": lambda m: m._get("<B"),  # BINGET
    b"j": lambda m: m._get("<I"),  # LONG_BINGET
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"t": lambda m: m._push(tuple(m._since_mark())),  # TUPLE
    b"a": lambda m: m._append([m._pop()]),  # APPEND
    b"e": lambda m: m._append(m._since_mark()),  # APPENDS
    b"u": lambda m: m._set_items(),  # SETITEMS
    b"c": lambda m: m._global(),
    b"R": lambda m: m._call(),  # REDUCE
    b"b": lambda m: m._build(),
}
