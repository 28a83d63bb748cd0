"""Unpickling into memory of one's own; what pickling by value does is tried with everything that travels."""

from __future__ import annotations

import numpy as np
import pytest

from forgepar.values.pickling import dumps_by_value, loads_own


def read_only(n):
    array = np.arange(n)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "value",
    [np.arange(5), read_only(5), [read_only(3), {"x": read_only(4)}, np.ones(2)], (b"\x98" * 5, read_only(2)), "\x98"],
    ids=["written", "read-only", "nested", "marks in the data", "no buffer"],
)
def test_what_is_loaded_can_be_written(value):
    buffers = []
    loaded = loads_own(dumps_by_value(value, buffers.append), buffers)
    np.testing.assert_equal(loaded, value)
    arrays = [
        part for part in (loaded if isinstance(loaded, (list, tuple)) else [loaded]) if isinstance(part, np.ndarray)
    ]
    for array in arrays:
        array += 1  # fails where it cannot


def test_what_it_was_loaded_from_stays():
    array = read_only(4)
    buffers = []
    loaded = loads_own(dumps_by_value(array, buffers.append), buffers)
    loaded += 1
    assert array.tolist() == [0, 1, 2, 3]
