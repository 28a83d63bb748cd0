"""Names of segments tell what they are; size classes waste little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar.values.segments import (
    LEAST_KEPT,
    is_reused,
    is_spilled,
    maker_of,
    name_of,
    names_of,
    segment_bytes,
    size_class,
    size_of,
)


@given(st.integers(0, 1 << 40))
def test_a_class_holds_the_size_and_wastes_an_eighth_at_most(n_bytes):
    size = size_class(n_bytes)
    assert n_bytes <= size <= max(n_bytes * 9 // 8 + (64 << 10), n_bytes + 4096)


@given(st.integers(0, 1 << 40))
def test_a_class_is_its_own_class(n_bytes):
    assert size_class(size_class(n_bytes)) == size_class(n_bytes)


@pytest.mark.parametrize("mib", [1, 2, 64, 256, 1024])
def test_a_round_array_and_its_pickle_share_a_class_with_the_array(mib):
    assert size_class((mib << 20) + 500) < (mib << 20) * 1.07
    assert size_class((mib << 20) + 500) >= LEAST_KEPT


@pytest.mark.parametrize("kind", ["mn", "mr", "dn"])
def test_a_name_tells_what_it_was_made_of(kind):
    name = name_of(kind, 0xABCDE, 4711, 3)
    assert (size_of(name), maker_of(name)) == (0xABCDE, 4711)
    assert (is_spilled(name), is_reused(name)) == (kind == "dn", kind == "mr")


def test_a_segment_names_those_that_its_parts_lie_in_once():
    segment = ("mn-40-1-0", 10, ("mn-80-1-1", 0, 30), 5, ("mn-80-1-1", 64, 20), ("mn-80-1-2", 0, 1))
    assert names_of(segment) == ["mn-40-1-0", "mn-80-1-1", "mn-80-1-2"]
    assert segment_bytes(segment) == 66
