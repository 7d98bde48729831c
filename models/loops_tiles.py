"""Tiles of matrix products, whose sums stay in registers, for compiled loops (`loops_dense`).

In LLVM's language, since neither numba nor LLVM makes tiles of loops: those reach 80 to 105 GFLOP/s on one core where
these reach 140 to 170, as torch does with large matrices. Matrices are given by their addresses, and by how many bytes
apart their rows lie. Any: llvmlite is untyped.

Whoever changes this file removes what numba keeps of `loops_dense`: it does not know that one is made of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

# Of a tile of `add_tile`, which takes 20 registers for its sums where there are 32, and 10 of 16.
LANES, ROWS = (16, 10) if binding.get_host_cpu_features().get("avx512f") else (8, 5)
VECTORS: Final = 2
COLUMNS: Final = VECTORS * LANES
SAMPLES, OUTPUTS = 4, 5  # of one of `multiply_tile`

Term: TypeAlias = Callable[..., Iterator[tuple[Any, Any]]]

_INDEX = ir.IntType(32)
_REAL = ir.FloatType()
_VECTOR = ir.VectorType(_REAL, LANES)


def _type_add_tile(
    _: Any, c: int, c_row: int, a: int, a_row: int, a_column: int, b: int, b_row: int, count: int
) -> tuple[Any, Any]:
    """C (ROWS, COLUMNS) += A (ROWS, count) B (count, COLUMNS), count > 0; `a_column` apart lie the columns of A."""
    return types.void(*[types.intp] * 8), _write_add_tile


add_tile: Any = intrinsic(_type_add_tile)


def _write_add_tile(_: Any, builder: Any, __: Any, arguments: Sequence[Any]) -> None:
    c, c_row, a, a_row, a_column, b, b_row, count = arguments
    to = [_along(builder, start) for start in _apart(builder, c, c_row, ROWS)]
    left = _apart(builder, a, a_row, ROWS)

    def term(column: Any, row: Any) -> Iterator[tuple[Any, Any]]:
        right = [_read(builder, place, _VECTOR) for place in _along(builder, row)]
        for place in left:
            one = builder.insert_element(
                ir.Constant(_VECTOR, ir.Undefined), _read(builder, builder.add(place, column), _REAL), _INDEX(0)
            )
            each = _shuffled(builder, one, one, [0] * LANES)
            for vector in right:
                yield each, vector

    begin = [_read(builder, place, _VECTOR) for row in to for place in row]
    number = c.type
    sums = _sum(builder, begin, ((number(0), a_column), (b, b_row)), count, number(1), term)
    for place, total in zip([place for row in to for place in row], sums, strict=True):
        _write(builder, total, place)


def _type_multiply_tile(_: Any, c: int, c_row: int, a: int, b: int, row: int, count: int) -> tuple[Any, Any]:
    """C (SAMPLES, OUTPUTS) <- A B', for A (SAMPLES, count) and B (OUTPUTS, count); count > 0 is a multiple of LANES."""
    return types.void(*[types.intp] * 6), _write_multiply_tile


multiply_tile: Any = intrinsic(_type_multiply_tile)


def _write_multiply_tile(_: Any, builder: Any, __: Any, arguments: Sequence[Any]) -> None:
    c, c_row, a, b, row, count = arguments
    left, right = _apart(builder, a, row, SAMPLES), _apart(builder, b, row, OUTPUTS)

    def term(column: Any) -> Iterator[tuple[Any, Any]]:
        own = [_read(builder, builder.add(place, column), _VECTOR) for place in left]
        for place in right:
            vector = _read(builder, builder.add(place, column), _VECTOR)
            for sample in own:
                yield sample, vector

    nothing = [ir.Constant(_VECTOR, [0.0] * LANES)] * (SAMPLES * OUTPUTS)
    number = c.type
    sums = _sum(builder, nothing, ((number(0), number(4 * LANES)),), count, number(LANES), term)
    rows = _apart(builder, c, c_row, SAMPLES)
    for output in range(OUTPUTS):
        totals = _totals(builder, sums[output * SAMPLES : (output + 1) * SAMPLES])
        for sample in range(SAMPLES):
            place = builder.add(rows[sample], number(4 * output))
            _write(builder, builder.extract_element(totals, _INDEX(sample)), place)


def _sum(
    builder: Any,
    begin: Sequence[Any],
    moving: Sequence[tuple[Any, Any]],
    count: Any,
    step: Any,
    term: Term,
) -> list[Any]:
    """The sums, from `begin` on, of the products of the pairs that `term` gives, for 0, `step` and so on below `count`;
    it is given the values `moving`, each from its first one on, by its distance further each time."""
    number = count.type
    before, body, after = builder.block, builder.append_basic_block("terms"), builder.append_basic_block("sums")
    builder.branch(body)
    builder.position_at_end(body)
    at, *values = (builder.phi(number) for _ in range(1 + len(moving)))
    sums = [builder.phi(_VECTOR) for _ in begin]
    contract = ("contract",)
    after_term = [
        builder.fadd(total, builder.fmul(*pair, flags=contract), flags=contract)
        for total, pair in zip(sums, term(*values), strict=True)
    ]
    following = builder.add(at, step)
    for value, first, then in (
        (at, number(0), following),
        *((value, first, builder.add(value, by)) for value, (first, by) in zip(values, moving, strict=True)),
        *zip(sums, begin, after_term, strict=True),
    ):
        value.add_incoming(first, before)
        value.add_incoming(then, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    builder.position_at_end(after)
    return after_term


def _totals(builder: Any, vectors: Sequence[Any]) -> Any:
    """The sums of four vectors, or another power of two, as one vector: halves are added up, of two at once."""
    found, groups, size = list(vectors), 1, LANES  # how many lie in each of `found`, and how long they are
    while size > 1:
        pairs = list(zip(found[::2], found[1::2], strict=True)) if len(found) > 1 else [(found[0], found[0])]
        groups *= 1 + (len(found) > 1)
        halves = [[g * size + half + i for g in range(groups) for i in range(size // 2)] for half in (0, size // 2)]
        found = [
            builder.fadd(*(_shuffled(builder, *pair, half) for half in halves), flags=("reassoc",)) for pair in pairs
        ]
        size //= 2
    return found[0]


def _apart(builder: Any, start: Any, by: Any, count: int) -> list[Any]:
    """So many addresses."""
    return [builder.add(start, builder.mul(by, by.type(number))) for number in range(count)]


def _along(builder: Any, start: Any) -> list[Any]:
    """The addresses of the vectors in a row of a tile."""
    return _apart(builder, start, start.type(4 * LANES), VECTORS)


def _read(builder: Any, address: Any, kind: Any) -> Any:
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = 4
    return found


def _write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _shuffled(builder: Any, first: Any, second: Any, lanes: Sequence[int]) -> Any:
    """These lanes of the two vectors, which are counted on."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INDEX, len(lanes)), list(lanes)))
