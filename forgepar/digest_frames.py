"""Takes frames, series and indexes of pandas apart, for their digests: by what is in them, not by how they hold it.

pandas lays the same columns out in other ways, by how they came to be. It is not imported for this: where it is not,
there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from forgepar.merkle import Walk


def taker_of(kind: type) -> Callable[[Walk, Any], None] | None:
    """Return what takes objects of this class apart, if pandas makes such."""
    pandas = sys.modules.get("pandas")
    if pandas is None or not any(base.__module__.partition(".")[0] == "pandas" for base in kind.__mro__):
        return None
    takers: tuple[tuple[Any, Callable[[Walk, Any], None]], ...] = (
        (pandas.DataFrame, _take_frame),
        (pandas.Series, _take_series),
        (pandas.RangeIndex, _take_range),
        (pandas.MultiIndex, _take_levels),
        (pandas.Index, _take_index),
        (pandas.api.extensions.ExtensionArray, _take_values),
    )
    return next((take for base, take in takers if issubclass(kind, base)), None)


def _take_head(walk: Walk, value: Any, what: str) -> None:
    walk.put(what)
    walk.visit(type(value))
    for name in getattr(value, "_metadata", ()):  # what a class of somebody's keeps beside the columns
        walk.visit(getattr(value, name, None))


def _take_frame(walk: Walk, frame: Any) -> None:
    _take_head(walk, frame, "frame")
    walk.visit((frame.attrs, frame.flags.allows_duplicate_labels, frame.shape))
    walk.visit(frame.index, "its index")
    walk.visit(frame.columns, "its columns")
    kinds = list(frame.dtypes.unique())
    if len(kinds) == 1 and isinstance(kinds[0], np.dtype):
        walk.visit(frame.to_numpy())  # without a copy, most often
        return
    for place in range(frame.shape[1]):
        _take_values(walk, frame.iloc[:, place].array)


def _take_series(walk: Walk, series: Any) -> None:
    _take_head(walk, series, "series")
    walk.visit((series.name, series.attrs, series.flags.allows_duplicate_labels))
    walk.visit(series.index, "its index")
    _take_values(walk, series.array)


def _take_range(walk: Walk, index: Any) -> None:
    walk.put("index", "range")
    walk.visit((index.name, index.start, index.stop, index.step))


def _take_levels(walk: Walk, index: Any) -> None:
    walk.put("index", "levels")
    walk.visit(list(index.names))
    for level in range(index.nlevels):
        walk.visit(index.get_level_values(level))  # a slice keeps values at its levels that it has no more


def _take_index(walk: Walk, index: Any) -> None:
    _take_head(walk, index, "index")
    walk.visit((index.name, getattr(index, "freqstr", None)))
    _take_values(walk, index.array)


def _take_values(walk: Walk, values: Any) -> None:
    pd: Any = sys.modules["pandas"]

    walk.put("values", f"{type(values.dtype).__name__} {values.dtype}")
    if isinstance(values, pd.Categorical):
        walk.visit(values.codes)
        walk.visit(values.categories)
        walk.visit(values.ordered)
    elif isinstance(values, (pd.arrays.IntegerArray, pd.arrays.FloatingArray, pd.arrays.BooleanArray)):
        walk.visit(values.isna())
        walk.visit(values.to_numpy(dtype=values.dtype.numpy_dtype, na_value=0))  # what is missing holds anything
    elif hasattr(values, "asi8"):
        walk.visit(values.asi8)
    elif isinstance(values.dtype, np.dtype):
        walk.visit(np.asarray(values))
    else:
        walk.visit(list(values))
