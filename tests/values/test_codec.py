"""Values travel by one of three ways, and come out as they went in."""

from __future__ import annotations

import pickle
import sys
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from forgepar.values.arena import ALIGNMENT, Arena
from forgepar.values.codec import (
    BLOB_LIMIT,
    SHORT,
    decode,
    dumps,
    encode,
    is_plain,
    is_segment,
    wire_bytes,
)


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return Arena(tmp_path_factory.mktemp("arena"))


@dataclass
class Record:
    name: str
    data: Any = None


class Text(str):
    __slots__ = ()


class Number(float):
    pass


def kind_of(wire: Any) -> str:
    if type(wire) is not tuple:
        return "scalar"
    return "shared" if is_segment(wire) else "blob"


def round_trip(value: Any, arena: Arena) -> Any:
    """Encode, decode and free, so that nothing is left whatever the value."""
    wire = encode(value, arena)
    loaded = decode(wire, arena)
    if is_segment(wire):
        arena.free(wire)
    assert arena.names() == []
    return loaded


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.dtype.hasobject:
            np.testing.assert_array_equal(one, other)
        else:
            assert one.tobytes() == other.tobytes()
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for part, twin in zip(one, other, strict=True):
            assert_same(part, twin)
    elif isinstance(one, Record):
        assert one.name == other.name
        assert_same(one.data, other.data)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    else:
        assert one == other


# Which way a value goes

PICKLED = len(pickle.dumps([bytes(30_000)], protocol=5)) - 30_000  # what pickling adds to bytes of about this size


@pytest.mark.parametrize(
    ("value", "way"),
    [
        (None, "scalar"),
        (True, "scalar"),
        (-(10**30), "scalar"),
        (0.5, "scalar"),
        ("", "scalar"),
        ("ü" * SHORT, "scalar"),
        ("x" * (SHORT + 1), "blob"),
        (bytes(SHORT), "scalar"),
        (bytes(SHORT + 1), "blob"),
        (bytearray(3), "blob"),
        (1j, "blob"),
        (Text("x"), "blob"),
        (Number(0.5), "blob"),
        (np.float64(0.5), "blob"),
        ((), "blob"),
        (("name", 3), "blob"),
        ((b"stream",), "blob"),
        ([bytes(BLOB_LIMIT - PICKLED)], "blob"),
        ([bytes(BLOB_LIMIT - PICKLED + 1)], "shared"),
        (np.zeros(BLOB_LIMIT // 2, np.uint8), "blob"),
        (np.zeros(BLOB_LIMIT, np.uint8), "shared"),
        ([np.zeros(BLOB_LIMIT // 2, np.uint8)] * 2, "blob"),  # the same array, pickled once
        ([np.zeros(BLOB_LIMIT // 2, np.uint8) for _ in range(2)], "shared"),
    ],
)
def test_each_value_goes_its_way_and_comes_back(arena, value, way):
    wire = encode(value, arena)
    assert kind_of(wire) == way
    assert wire_bytes(wire) <= BLOB_LIMIT or way == "shared"
    assert (wire_bytes(wire) == 0) == (way == "scalar")
    assert_same(decode(wire, arena), value)
    if way == "shared":
        arena.free(wire)
    assert arena.names() == []


@pytest.mark.parametrize("value", [bytes(10**6), "ü" * 10**6, bytearray(10**6), [b"x" * 10**5] * 3])
def test_what_is_large_and_no_array_goes_by_a_segment(arena, value):
    wire = encode(value, arena)
    assert is_segment(wire)
    assert len(pickle.dumps(wire)) < 200
    assert_same(decode(wire, arena), value)
    arena.free(wire)


def test_a_message_names_a_large_value_and_does_not_hold_it(arena):
    wire = encode([np.zeros(10**6) for _ in range(3)], arena)
    assert wire_bytes(wire) >= 3 * 8 * 10**6
    assert len(pickle.dumps(wire)) < 200
    assert arena.names() == [wire[0]]
    arena.free(wire)


# What comes back

atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
hashable = st.recursive(
    atoms, lambda parts: st.lists(parts, max_size=3).map(tuple) | st.frozensets(parts, max_size=3), max_leaves=5
)


def containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(parts, max_size=4)
    return st.one_of(
        lists, lists.map(tuple), st.dictionaries(hashable, parts, max_size=4), st.builds(Record, st.text(), parts)
    )


@given(st.recursive(hashable | st.sets(hashable, max_size=3), containers, max_leaves=25))
def test_containers_come_back_as_they_were(arena, value):
    assert_same(round_trip(value, arena), value)


# Of the machine's own byte order: numpy itself does not keep another one in every layout.
DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="="),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="="),
    hnp.complex_number_dtypes(endianness="="),
    hnp.datetime64_dtypes(endianness="="),
    hnp.timedelta64_dtypes(endianness="="),
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(min_len=1, endianness="="),
    hnp.array_dtypes(hnp.integer_dtypes(endianness="=") | hnp.floating_dtypes(endianness="=")),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@settings(deadline=None)
@given(hnp.arrays(DTYPES, SHAPES), st.sampled_from(["as it is", "transposed", "every other", "in a list"]))
def test_arrays_come_back_as_they_were(arena, array, shape):
    if shape == "transposed":
        array = array.T
    elif shape == "every other" and array.ndim:
        array = array[::-2]
    assert_same(
        round_trip([array] if shape == "in a list" else array, arena), [array] if shape == "in a list" else array
    )


@settings(deadline=None)
@given(st.recursive(atoms | hnp.arrays(DTYPES, SHAPES), containers, max_leaves=8))
def test_containers_of_arrays_come_back_as_they_were(arena, value):
    assert_same(round_trip(value, arena), value)


def large(dtype: Any, order: str = "C") -> np.ndarray:
    return np.arange(120 * 1000).reshape(120, 1000).astype(dtype, order=order)


LARGE = {
    "float64": large(np.float64),
    "int8": large(np.int8),
    "complex": large(np.complex64),
    "text": large("U6"),
    "fortran": large(np.float32, "F"),
    "structured": np.ones(50_000, [("a", np.int32), ("b", np.float64, 2)]),
    "big endian": large(">i4"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_arrays_are_views_of_their_segment(arena, name):
    array = LARGE[name]
    wire = encode([array, array[:0], array.copy("K")], arena)
    assert is_segment(wire)
    loaded = decode(wire, arena)
    arena.free(wire)
    assert_same(loaded, [array, array[:0], array])
    for view in (loaded[0], loaded[2]):
        assert not view.flags.writeable
        assert not view.flags.owndata
        assert view.ctypes.data % ALIGNMENT == 0
        assert view.flags.f_contiguous == array.flags.f_contiguous
        with pytest.raises(ValueError, match="read-only"):
            view[:1] = view[1:2]


@pytest.mark.parametrize(
    "array",
    [
        large(np.float64)[:, ::2],
        large(np.float64)[::-1],
        large(object),
        np.broadcast_to(np.arange(1000.0), (120, 1000)),
        np.ma.masked_array(np.arange(50_000), np.arange(50_000) % 2),
        np.arange(50_000).astype("M8[s]"),
    ],
    ids=["gaps", "backwards", "objects", "broadcast", "masked", "dates"],
)
def test_large_arrays_that_are_no_plain_block_come_back_too(arena, array):
    assert_same(round_trip(array, arena), array)


def test_one_array_in_two_places_is_one_array_afterwards(arena):
    array = np.zeros(BLOB_LIMIT)
    one, other = round_trip([array, array], arena)
    assert one is other


def test_a_value_that_cannot_be_pickled_says_so_and_leaves_nothing(arena):
    with pytest.raises(TypeError, match="cannot pickle"):
        encode([np.zeros(BLOB_LIMIT), (i for i in ())], arena)
    assert arena.names() == []


# Which pickler


@pytest.mark.parametrize(
    "value",
    [
        3,
        "x",
        1j,
        range(3),
        bytearray(b"x"),
        [1, "a", None],
        (1, [2, 3], {"a": 4}),
        {1, 2},
        frozenset(((1, 2),)),
        {"a": [1, 2], (1, 2): {"b": 3}},
        np.zeros(3),
        np.array("2020-01-01", "M8[D]"),
        np.array([b"x", b"y"]),
    ],
)
def test_plain_values_need_no_slow_pickler(value):
    assert is_plain(value)
    assert dumps(value) == pickle.dumps(value, protocol=5)


def script_class(base: type = object) -> type:
    """A class as a user's script has it: of a module that is another one in a worker."""
    return types.new_class("Mine", (base,), {}, lambda body: body.update(__module__="__main__"))


@pytest.mark.parametrize("base", [object, int, float, str, bytes, list, tuple, dict, set, np.ndarray, BaseException])
def test_an_instance_of_a_class_of_the_script_is_not_plain(base):
    mine = np.zeros(3).view(script_class(base)) if base is np.ndarray else script_class(base)()
    values = [mine, [mine], (mine,), [[mine]], {"a": mine}, {"a": [mine]}, [{"a": mine}]]
    assert not any(map(is_plain, values))
    as_object = np.empty(1, object)
    as_object[0] = mine
    assert not is_plain(as_object)


@pytest.mark.parametrize("base", [object, int, float, str, bytes, tuple, frozenset, BaseException])
def test_nor_is_a_container_with_one_as_a_key_or_in_a_set(base):
    mine = script_class(base)()
    values = [{mine: 1}, {"a": {mine: 1}}, [{mine: 1}], {(mine,): 1}, {mine}, [frozenset((mine,))], ({mine},)]
    assert not any(map(is_plain, values))


def test_a_class_of_the_script_travels_with_its_instance(arena, monkeypatch):
    """The script's module is another one in a worker: nothing may be looked for in it."""
    kind = script_class()
    kind.double = lambda self: 2 * self.n
    mine = kind()
    mine.n = 21
    monkeypatch.setattr(sys.modules["__main__"], "Mine", kind, raising=False)
    wires = [encode(mine, arena), encode({"a": [mine]}, arena), encode({mine: 4}, arena)]
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    assert decode(wires[0], arena).double() == 42
    assert decode(wires[1], arena)["a"][0].double() == 42
    assert [(key.double(), n) for key, n in decode(wires[2], arena).items()] == [(42, 4)]
