"""Reads `parquet:FILE#LABEL`: columns of numbers and one of labels. Needs pyarrow, the extra `gossipml[parquet]`.

pyarrow is an extra because it is 150 MB installed and nothing else needs it. Row groups are read in batches, so
memory is bounded by a batch and what `Spool` keeps. Reading Parquet is native code of the Arrow project: take
files from people you trust.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gossipml.errors import UserError
from gossipml.models.dataset import Dataset
from gossipml.models.registry import nearest
from gossipml.models.sources_table import MAX_COLUMNS, LabelColumn, Spool, check_finite, check_names, divide

if TYPE_CHECKING:
    import pyarrow

BATCH_VALUES = 1 << 22


def check_parquet() -> None:
    """UserError when this installation cannot read Parquet; imports nothing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "reading Parquet files needs pyarrow, which is not installed: pip install 'gossipml[parquet]', or save the "
            "table as CSV"
        )


def load_parquet(path: Path, label: str, source: str) -> Dataset:
    """The table, its label column apart. UserError names file, row, value and remedy."""
    check_parquet()
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return _load(file, path, label, source)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as Parquet: {reason}; write it again") from None


def _load(file: Any, path: Path, label: str, source: str) -> Dataset:  # Any: pyarrow has no types
    from pyarrow import types

    schema = file.schema_arrow
    names = list(schema.names)
    if label not in names:
        raise UserError(f"{path} has no column {label!r}; {nearest(label, names[:50])}")
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{path} has {len(names)} columns; at most {MAX_COLUMNS} are read")
    check_names(names, str(path))
    features = tuple(name for name in names if name != label)
    if not features:
        raise UserError(f"{path} has no column beside the label {label!r}; it needs one or more columns of numbers")
    for name in features:
        kind = schema.field(name).type
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise UserError(
                f"{path}: the column {name!r} holds {kind}, not numbers; write it as numbers, or leave the column out"
            )
    kind = schema.field(label).type
    value_kind = kind.value_type if types.is_dictionary(kind) else kind
    text = types.is_string(value_kind) or types.is_large_string(value_kind)
    if not (text or types.is_integer(value_kind) or types.is_floating(value_kind) or types.is_boolean(value_kind)):
        raise UserError(f"{path}: the label column {label!r} holds {kind}; write it as text or numbers")
    spool, labels = Spool(len(features), str(path)), LabelColumn(label, str(path))
    row = 1
    for batch in file.iter_batches(batch_size=max(1, BATCH_VALUES // len(names))):
        places = range(row, row + batch.num_rows)
        row += batch.num_rows
        table = np.column_stack([_numbers(batch.column(name)) for name in features])
        check_finite(table, features, str(path), "row", places)
        spool.add(table.astype(np.float32))
        labels.add([_text(value) for value in batch.column(label).to_pylist()], "row", places)
    targets, classes = labels.finish()
    return divide(source, spool.finish(), targets, classes, features, str(path))


def _numbers(column: pyarrow.Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Float64; a missing value is NaN."""
    import pyarrow

    whole = column.cast(pyarrow.float64(), safe=False)
    return np.asarray(whole.to_numpy(zero_copy_only=False), dtype=np.float64)


def _text(value: object) -> str:
    """A label as text; empty where it is missing. Booleans are 0 and 1, as in the other formats."""
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
