"""Arrays that a task fills in place are handed on as they lie; elsewhere they are ordinary ones."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import forgepar as fp
from forgepar.values.arena_folders import open_arena, remove_arena
from forgepar.values.codec import decode, encode
from forgepar.values.in_place import empty, empty_like, here

LARGE = 1 << 18  # elements of 8 bytes: large enough to be kept


@pytest.fixture
def arena():
    """An arena in which this test allocates, as a task would."""
    arena = open_arena()
    with here(arena):
        yield arena
    remove_arena(arena)


def names_in(wire):
    return {part[0] for part in wire[1:] if type(part) is tuple}


def test_what_was_filled_in_place_is_not_written_again(arena):
    array = empty((LARGE // 4, 4))
    array[:] = np.arange(LARGE).reshape(-1, 4)
    made = arena.usage().in_use
    wire = encode({"array": array, "name": "x"}, arena)
    assert arena.usage().in_use - made <= 4096
    assert len(names_in(wire)) == 1
    loaded = decode(wire, arena)["array"]
    np.testing.assert_array_equal(loaded, np.arange(LARGE).reshape(-1, 4))
    assert not loaded.flags.writeable
    array[0, 0] = 7.0  # it is the same memory
    assert loaded[0, 0] == 7.0
    arena.free(wire)
    assert arena.names() == []


def test_a_view_goes_as_the_part_that_it_is(arena):
    array = empty(LARGE)
    array[:] = np.arange(LARGE)
    wire = encode([array[1000:-1000], array[:50_000]], arena)
    assert len(names_in(wire)) == 1
    for loaded, part in zip(decode(wire, arena), (array[1000:-1000], array[:50_000]), strict=True):
        np.testing.assert_array_equal(loaded, part)
    arena.free(wire)
    assert arena.names() == []


def test_a_view_with_gaps_is_copied(arena):
    array = empty(LARGE)
    array[:] = np.arange(LARGE)
    wire = encode(array[::2], arena)
    assert not names_in(wire)
    np.testing.assert_array_equal(decode(wire, arena), array[::2])


def test_a_second_value_is_a_copy(arena):
    """The first one may be freed, and its memory used again, while the second is still wanted."""
    array = empty(LARGE)
    array[:] = 1.0
    first, second = encode(array, arena), encode(array, arena)
    assert names_in(first)
    assert not names_in(second)
    arena.free(first)
    del array
    np.testing.assert_array_equal(decode(second, arena), np.ones(LARGE))


def test_what_is_not_handed_on_is_taken_back(arena):
    array = empty(LARGE)
    arena.take_back()
    assert len(arena.names()) == 1
    del array
    gc.collect()
    arena.take_back()
    assert arena.names() == []


def test_memory_that_somebody_kept_is_not_written_again(arena):
    array = empty(LARGE)
    array[:] = 1.0
    arena.free(encode(array, arena))
    other = empty(LARGE)
    other[:] = 2.0
    np.testing.assert_array_equal(array, np.ones(LARGE))


@pytest.mark.parametrize(
    ("shape", "dtype"), [(3, float), ((2, 3), "int8"), ((0, 4), "M8[s]"), ((), np.complex64), (np.int64(5), "S3")]
)
def test_shapes_and_types_are_those_of_numpy(arena, shape, dtype):
    array, expected = empty(shape, dtype), np.empty(shape, dtype)
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    like = empty_like(expected)
    assert (like.shape, like.dtype) == (expected.shape, expected.dtype)


def test_like_takes_other_shapes_and_types(arena):
    like = empty_like([[1, 2]], dtype="float32", shape=(LARGE, 2))
    assert (like.shape, like.dtype) == ((LARGE, 2), np.dtype("float32"))
    assert len(arena.names()) == 1


def test_small_arrays_are_ordinary(arena):
    assert empty(10).base is None
    assert arena.names() == []


def test_outside_of_a_task_arrays_are_ordinary():
    assert empty(LARGE).base is None


def test_objects_are_refused():
    told = r"must be a type without Python objects, which shared memory cannot hold; got object\. Use numpy.empty"
    with pytest.raises(ValueError, match=told):
        empty(3, object)


def fill(n):
    array = fp.empty(n)
    array[:] = 3.0
    return array


def total(array):
    return float(array.sum()), array.flags.writeable


def test_tasks_hand_it_on_and_the_caller_reads_it(any_backend):
    wf = fp.Workflow()
    filled = wf.add(fill, LARGE)
    summed = wf.add(total, filled)
    result = wf.run(outputs=[filled, summed], **any_backend)
    assert result[summed] == (3.0 * LARGE, False)
    np.testing.assert_array_equal(result[filled], np.full(LARGE, 3.0))
    assert result.record(filled).bytes >= 8 * LARGE


def test_a_thread_that_is_no_tasks_does_not_allocate_where_a_task_of_another_does(arena):
    """What the task has no more use for is allocated again, to the next one."""
    before = arena.usage().in_use
    with ThreadPoolExecutor(1) as threads:
        made = threads.submit(empty, LARGE).result()
    assert made.shape == (LARGE,)
    assert arena.usage().in_use == before
