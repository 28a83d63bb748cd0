"""The same as numpy's own, without loading all that those load."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forgepar.workflow.taskset import distinct, distinct_places

VALUES = st.lists(st.integers(-5, 5) | st.integers(-(2**31), 2**31 - 1)).map(lambda values: np.array(values, np.int32))


@given(VALUES)
def test_distinct_is_unique(values):
    found = distinct(values)
    np.testing.assert_array_equal(found, np.unique(values))
    assert found.dtype == np.int32


@given(VALUES)
def test_distinct_places_are_those_of_unique(values):
    found, places = distinct_places(values)
    expected, expected_places = np.unique(values, return_inverse=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(places, expected_places)
    assert places.dtype == np.int32
