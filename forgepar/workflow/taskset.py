"""Numpy functions on sets of task numbers."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

I = TypeVar("I", bound=np.integer[Any])  # noqa: E741


def distinct(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the distinct values, ascending. `numpy.unique` would first import numpy.ma, for 8 ms."""
    ordered = np.sort(values)
    return ordered[_is_first(ordered)]


def distinct_places(values: NDArray[I]) -> tuple[NDArray[I], NDArray[np.int32]]:
    """Return the distinct values, ascending, and for each value its index among them."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = _is_first(ordered)
    places = np.empty(len(values), np.int32)
    places[order] = np.cumsum(first, dtype=np.int32) - np.int32(1)
    return ordered[first], places


def _is_first(ordered: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    first = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return first
