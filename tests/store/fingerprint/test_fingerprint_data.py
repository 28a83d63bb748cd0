"""What of a value counts: its content and types, not where it is or how it is laid out."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import io
import itertools
import os
import pickle
import re
import threading
import types
import uuid
import zoneinfo
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

import forgepar as fp
from forgepar.store.fingerprint.digester import Digests, digest_of
from forgepar.store.fingerprint.merkle import NoDigest


def of(value: object) -> bytes:
    return digest_of(value).data


@dataclasses.dataclass
class Point:
    x: object
    y: object = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: object


class Pair(NamedTuple):
    a: object
    b: object


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class WithSlots:
    __slots__ = ("__dict__", "a")

    def __init__(self, a, **more):
        self.a = a
        self.__dict__.update(more)


class WithState:
    def __init__(self, a):
        self.a = a
        self.lock = threading.Lock()

    def __getstate__(self):
        return self.a

    def __setstate__(self, state):
        self.__init__(state)


class WithReduce:
    def __init__(self, a):
        self.a = a

    def __reduce__(self):
        return WithReduce, (self.a,)


class OutputNotice:
    def __init__(self, key):
        self.key = key
        self.lock = threading.Lock()

    def __forgepar_fingerprint__(self):
        return self.key


class Words(list):
    pass


class Table(dict):
    pass


DIFFERENT = [
    None,
    ...,
    NotImplemented,
    True,
    False,
    1,
    0,
    -1,
    2**70,
    2**70 + 1,
    1.0,
    0.0,
    -0.0,
    float("nan"),
    float("inf"),
    1 + 0j,
    complex(0, -0.0),
    complex(-0.0, 0),
    "1",
    "",
    "\ud800",
    "é",
    "e\u0301",
    b"1",
    b"",
    bytearray(b"1"),
    bytearray(),
    memoryview(b"1"),
    memoryview(b"12").cast("H"),
    array.array("b", b"1"),
    array.array("B", b"1"),
    (),
    [],
    {},
    set(),
    frozenset(),
    (1,),
    [1],
    {1},
    frozenset([1]),
    {1: None},
    [[]],
    [[], []],
    [()],
    ([],),
    [1, [2]],
    [[1], 2],
    [[1, 2]],
    list(range(40)),
    [*range(39), 40],
    [*range(39), 39.0],
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    {"a": 1, "b": 3},
    {"a": {"b": {}}},
    types.MappingProxyType({"a": 1, "z": 0}),
    {frozenset(["a", "b"]), "a"},
    {frozenset(["a", "c"]), "a"},
    range(3),
    range(0, 3, 2),
    slice(1, 2),
    slice(1, 3),
    collections.OrderedDict(a=1),
    collections.defaultdict(int, a=1),
    collections.defaultdict(list, a=1),
    collections.Counter("a"),
    collections.deque([1, 2]),
    collections.deque([1, 2], maxlen=2),
    types.SimpleNamespace(a=1),
    Point(1),
    Point(1, 1),
    Point(Point(1)),
    Slotted(1),
    Slotted(2),
    Pair(1, 2),
    (1, 2),
    Colour.RED,
    Colour.BLUE,
    Right.READ,
    Right.READ | Right.WRITE,
    WithSlots(1),
    WithSlots(2),
    WithSlots(1, b=2),
    WithState(1),
    WithState(2),
    WithReduce(1),
    WithReduce(2),
    OutputNotice(1),
    OutputNotice(2),
    Words([1]),
    Words(),
    Table(a=1),
    dt.date(2024, 1, 2),
    dt.datetime(2024, 1, 2),
    dt.datetime(2024, 1, 2, fold=1),
    dt.datetime(2024, 1, 2, tzinfo=dt.UTC),
    dt.time(1),
    dt.timedelta(1),
    dt.timezone(dt.timedelta(hours=1)),
    zoneinfo.ZoneInfo("Europe/Berlin"),
    zoneinfo.ZoneInfo("Europe/Paris"),
    decimal.Decimal("1.0"),
    decimal.Decimal("1.00"),
    fractions.Fraction(1, 3),
    uuid.UUID(int=1),
    uuid.UUID(int=2),
    re.compile("a"),
    re.compile("a", re.IGNORECASE),
    re.compile(b"a"),
    Path("a/b"),
    Path("a/c"),
    PurePosixPath("a/b"),
    PureWindowsPath("a/b"),
    ValueError("a"),
    ValueError("b"),
    KeyError("a"),
    iter([1, 2]),
    int,
    bool,
    Point,
    Colour,
    re,
    np.float64(1.0),
    np.float32(1.0),
    np.int64(1),
    np.bool_(True),
    np.str_("1"),
    np.datetime64("2024-01-02"),
    np.datetime64("2024-01-02", "s"),
    np.timedelta64(1, "s"),
    np.dtype("f8"),
    np.dtype(">f8"),
    np.dtype([("a", "i4")]),
    np.dtype([("b", "i4")]),
    np.dtype({"names": ["a"], "formats": ["i4"], "offsets": [4]}),
    np.array(1.0),
    np.array([1.0]),
    np.array([[1.0]]),
    np.array([1.0, 2.0]),
    np.array([1, 2]),
    np.array([1, 2], ">i8"),
    np.array([1, 2], "i4"),
    np.array([-0.0]),
    np.array([0.0]),
    np.array([np.nan]),
    np.zeros(0),
    np.zeros((0, 3)),
    np.zeros((3, 0)),
    np.zeros(3, "S0"),
    np.zeros(2, "V3"),
    np.array(["a", "b"]),
    np.array([b"a", b"b"]),
    np.array(["a", None], object),
    np.array([None, "a"], object),
    np.array([["a"], [None]], object),
    np.array([[1, 2], [3, 4]]),
    np.array([[1, 3], [2, 4]]),
    np.array(["2024-01-01", "NaT"], "M8[D]"),
    np.array(["2024-01-01", "NaT"], "M8[s]"),
    np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    np.array([(1, 2.0)], [("a", "i4"), ("c", "f8")]),
    np.array([(1, [1, 2])], [("a", "i4"), ("b", "f8", 2)]),
    np.array([(1, "x")], [("a", "i4"), ("b", object)]),
    np.array([(1, "y")], [("a", "i4"), ("b", object)]),
    np.ma.masked_array([1, 2], [True, False]),
    np.ma.masked_array([1, 2], [False, True]),
    np.rec.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    np.array([1], np.longdouble),
    np.array([1], np.clongdouble),
    np.array(["1"], np.dtypes.StringDType()) if hasattr(np.dtypes, "StringDType") else "no such type",
    np.random.default_rng(1),
    np.random.default_rng(2),
    np.polynomial.Polynomial([1, 2]),
]


def test_other_values_have_other_digests():
    seen = {}
    for value in DIFFERENT:
        assert seen.setdefault(of(value), value) is value


@pytest.mark.parametrize("value", DIFFERENT, ids=lambda value: type(value).__name__)
def test_the_same_again_and_through_a_copy(value):
    assert of(value) == of(value)
    try:
        twin = pickle.loads(pickle.dumps(value))
    except (TypeError, AttributeError):  # a view of memory, a module
        return
    if getattr(value, "dtype", None) != getattr(twin, "dtype", None):
        return  # numpy turns bytes around
    assert of(twin) == of(value)
    assert of([twin, value]) == of([value, value]) == of([value, twin])


@pytest.mark.parametrize("value", DIFFERENT, ids=lambda value: type(value).__name__)
def test_what_is_found_alone_or_among_others_is_one(value):
    shared = Digests()
    shared.of([value, Colour, Point])
    assert shared.of(value) == digest_of(value)
    assert shared.of((value, 1)) == digest_of((value, 1))


# Sharing

SHARED = [1, [2]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([SHARED, SHARED], [[1, [2]], [1, [2]]]),
        ([SHARED[1], SHARED], [[2], [1, [2]]]),
        ({"a": SHARED, "b": SHARED}, {"a": [1, [2]], "b": copy.deepcopy(SHARED)}),
        (((1, (2, ([],))),) * 2, ((1, (2, ([],))), (1, (2, ([],))))),
        ([Point(SHARED), Point(SHARED)], [Point([1, [2]]), Point([1, [2]])]),
        (np.array([SHARED, SHARED, 0], object), np.array([[1, [2]], [1, [2]], 0], object)),
    ],
)
def test_sharing_makes_no_difference(one, other):
    assert of(one) == of(other)


def ring(n: int, *labels: object) -> list:
    found: list = [[] for _ in range(n)]
    for i, part in enumerate(found):
        part += [labels[i % len(labels)], found[(i + 1) % n]]
    return found[0]


def test_values_that_hold_themselves():
    assert of(ring(1, 0)) == of(ring(1, 0)) == of(ring(3, 0))
    assert len({of(ring(1, 0)), of(ring(1, 1)), of(ring(2, 0, 1)), of(ring(2, 1, 0)), of(ring(3, 0, 0, 1))}) == 5
    table = {}
    table["self"] = table
    assert of(table) == of(pickle.loads(pickle.dumps(table)))
    point = Point(1)
    point.y = {point.x: [point]}
    assert of(point) == of(copy.deepcopy(point))
    holder = WithSlots(0)
    holder.a = frozenset([holder])
    other = WithSlots(0)
    other.a = frozenset([other])
    assert of(holder) == of(other)


def test_deep_values():
    deep: object = 0
    for _ in range(3000):
        deep = [deep]
    assert of(deep) != of([deep])
    for _ in range(30_000):
        deep = [deep]
    with pytest.raises(NoDigest, match="a list is nested too deeply"):
        digest_of(deep)


class Endless:
    def __reduce__(self):
        return Endless, (), (Endless(), Endless())


def test_what_has_no_end_is_refused():
    with pytest.raises(NoDigest, match="Endless is nested too deeply"):
        digest_of(Endless())
    with pytest.raises(NoDigest, match="nested too deeply"):
        digest_of(Endless(), is_vouched=True)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
HASHABLE = st.recursive(ATOMS, lambda parts: st.tuples(parts, parts) | st.frozensets(parts, max_size=3), max_leaves=4)
VALUES = st.recursive(
    HASHABLE,
    lambda parts: (
        st.lists(parts, max_size=4)
        | st.tuples(parts, parts)
        | st.dictionaries(HASHABLE, parts, max_size=3)
        | st.builds(Point, parts, parts)
    ),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=50)
def test_a_copy_has_the_same_digest(value):
    assert of(pickle.loads(pickle.dumps(value))) == of(value) == of(copy.deepcopy(value))


@given(VALUES, VALUES)
def test_equal_digests_mean_equal_pickles_without_sharing(one, other):
    def plain(value):
        """Text that is equal for equal content: sets in order, nothing shared."""
        if isinstance(value, (set, frozenset)):
            return f"{type(value).__name__}{sorted(map(plain, value))}"
        if isinstance(value, dict):
            return f"dict{[(plain(key), plain(part)) for key, part in value.items()]}"
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}{list(map(plain, value))}"
        return plain(("Point", value.x, value.y)) + "!" if isinstance(value, Point) else repr(value)

    assert (of(one) == of(other)) == (plain(one) == plain(other))


# Arrays


def test_the_order_in_memory_makes_no_difference():
    c = np.arange(24.0).reshape(2, 3, 4)
    read_only = c.copy()
    read_only.flags.writeable = False
    gapped = np.zeros((4, 3, 8))
    gapped[::2, :, ::2] = c
    turned = np.ascontiguousarray(c[::-1])[::-1]
    for other in (np.asfortranarray(c), read_only, gapped[::2, :, ::2], turned, c.T.copy().T):
        assert of(other) == of(c)
    assert of(c.T) != of(c)


@pytest.mark.parametrize("shape", [(2_000_003,), (3, 700_001), (1500, 1400), (1, 1, 2_000_001), (1, 3, 400_000)])
def test_large_arrays_in_any_layout(shape):
    c = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    wide = np.zeros((*shape, 2), np.uint8)
    wide[..., 1] = c
    assert of(wide[..., 1]) == of(np.asfortranarray(c)) == of(c)
    flat = c.copy().reshape(-1)
    flat[-1] ^= 1
    assert of(flat.reshape(shape)) != of(c)


@settings(max_examples=60)
@given(
    st_np.arrays(
        st_np.scalar_dtypes() | st_np.array_dtypes(max_size=3) | st_np.nested_dtypes(max_leaves=4),
        st_np.array_shapes(min_dims=0, max_dims=3, max_side=4, min_side=0),
    ),
    st.randoms(),
)
def test_arrays_of_any_type(found, random):
    assert of(np.array(found, order="F", copy=True)) == of(found)
    twin = pickle.loads(pickle.dumps(found))
    assert twin.dtype != found.dtype or of(twin) == of(found)  # numpy turns bytes around
    if found.ndim:
        doubled = np.repeat(found, 2, axis=0)
        assert of(doubled[::2]) == of(found)


def test_what_pads_the_items_does_not_count():
    aligned = np.dtype([("a", "i1"), ("b", "f8")], align=True)
    arrays = []
    for fill in (0, 255):
        raw = np.full(3 * aligned.itemsize, fill, np.uint8).view(aligned)
        raw["a"], raw["b"] = [1, 2, 3], [1.5, 2.5, 3.5]
        arrays.append(raw)
    assert arrays[0].tobytes() != arrays[1].tobytes()
    assert of(arrays[0]) == of(arrays[1])
    assert of(arrays[0][1]) == of(arrays[1][1])


def test_what_pads_long_doubles_does_not_count():
    size = np.dtype(np.longdouble).itemsize
    if size != 16 or np.finfo(np.longdouble).nmant != 63:
        pytest.skip("long doubles are not padded here")
    values = np.array([1.5, -2.5], np.longdouble)
    dirty = values.copy()
    dirty.view(np.uint8).reshape(-1, 16)[:, 10:] = 7
    assert (dirty == values).all()
    assert of(dirty) == of(values)
    assert of(dirty[0]) == of(values[0])
    assert of(dirty + 1j) == of(values + 1j) != of(values + 2j)


def test_a_mapped_file_counts_as_what_is_in_it(tmp_path):
    values = np.arange(10.0)
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert type(mapped) is np.memmap
    assert of(mapped) == of(values)


class Metres(np.ndarray):
    pass


def test_derived_arrays():
    one, other = (np.asfortranarray(np.arange(6.0).reshape(2, 3)).view(Metres) for _ in range(2))
    assert of(one) == of(np.ascontiguousarray(other).view(Metres)) != of(np.asarray(one))
    other.unit = "km"
    assert of(one) != of(other)


def test_types_with_metadata_warn_of_nothing():
    assert of(np.zeros(2, np.dtype("f8", metadata={"a": 1}))) == of(np.zeros(2))


# Files


def test_a_file_counts_by_its_content_and_name(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("a")
    before = of(fp.File(path))
    assert of(fp.File(str(path))) == of(fp.File(os.fsencode(path))) == before
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "in.csv").write_text("a")
    assert of(fp.File(tmp_path / "elsewhere" / "in.csv")) == before
    (tmp_path / "other.csv").write_text("a")
    assert of(fp.File(tmp_path / "other.csv")) != before
    path.write_text("b")
    assert of(fp.File(path)) != before
    assert of(path) == of(Path(str(path))) != of(str(path))


def test_what_a_file_holds_is_not_taken_for_what_stands_beside_it(tmp_path):
    (tmp_path / "x").write_bytes(b"aatom 5 N")
    one = of([fp.File(tmp_path / "x"), 1])
    (tmp_path / "x").write_bytes(b"a")
    assert of([fp.File(tmp_path / "x"), None, 1]) != one


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("missing", r"the file '.*missing' cannot be read \(No such file or directory\)"),
        ("folder", "folder' is not a regular file"),
        ("pipe", "pipe' is not a regular file"),
        ("null\0", "cannot be compared"),
        ("", "cannot be read"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path, place, reason):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NoDigest, match=reason):
        digest_of([fp.File(f"{tmp_path}/{place}" if place else "")])


def test_paths_in_other_parts_are_equal():
    assert of(Path("a") / "b") == of(Path("a/b")) == of(Path("a", "b")) == of(Path("a/./b"))


# What cannot be compared


class Raises:
    def __init__(self, error):
        self.error = error

    def __reduce_ex__(self, protocol):
        raise self.error


class OddClass:
    @property
    def __class__(self):
        raise RuntimeError("no class")


class OddFingerprint:
    def __forgepar_fingerprint__(self):
        raise KeyError("odd")


class OddText(Exception):
    def __str__(self):
        raise ValueError


class Reduces:
    def __init__(self, to):
        self.to = to

    def __reduce__(self):
        return self.to


class OddState:
    def __getattr__(self, name):
        raise ZeroDivisionError(name)

    def __getstate__(self):
        raise MemoryError


class OddMeta(type):
    def __getattr__(cls, name):
        raise RuntimeError(name)


class OfOddMeta(metaclass=OddMeta):
    pass


def count():
    yield 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (threading.Lock(), r"a _thread\.lock cannot be compared \(cannot pickle"),
        (Point(threading.Lock()), r"'x': a _thread\.lock"),
        ([0, {"a": {"b": threading.local()}}], r"'a': its 'b': a _thread\._local"),
        (count(), "a generator cannot be compared"),
        (io.StringIO, None),
        (io.BytesIO(b"a"), None),
        (memoryview(b"a"), None),
        (Raises(ValueError("why")), r"Raises cannot be compared \(why\)"),
        (Raises(SystemExit(3)), r"Raises cannot be compared \(3\)"),
        (Raises(RecursionError()), r"Raises cannot be compared \(RecursionError\)"),
        (Raises(OddText()), r"Raises cannot be compared \(OddText\)"),
        (OddClass(), None),
        (OddFingerprint(), "OddFingerprint cannot be compared"),
        (OddState(), r"OddState cannot be compared \(MemoryError\)"),
        (Reduces(3), "Reduces cannot be compared"),
        (Reduces(()), "Reduces cannot be compared"),
        (Reduces((len, (), 1, 2)), "Reduces cannot be compared"),
        (Reduces("no_such_name"), "no module has it under the name 'no_such_name'"),
        (OfOddMeta(), "OfOddMeta cannot be compared"),
        (itertools.tee([1])[0], ...),
        (fp.Workflow("w").add(abs, 1), "TaskHandle 'abs'> cannot be pickled, as it is a handle"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy:DeprecationWarning")
def test_what_cannot_be_compared_ends_as_no_digest(value, reason):
    if reason is None or reason is ...:
        try:
            assert of(value) == of(value)
        except NoDigest:
            assert reason is ...
        return
    with pytest.raises(NoDigest, match=reason):
        digest_of(value)
    assert digest_of(value, is_vouched=True) == digest_of(value, is_vouched=True)


def test_an_open_file_is_refused():
    with Path(__file__).open() as file, pytest.raises(NoDigest, match=r"a _io\.TextIOWrapper"):
        digest_of({"f": file})


def test_an_interrupt_is_none_of_these():
    with pytest.raises(KeyboardInterrupt):
        digest_of(Raises(KeyboardInterrupt()))
    found = Digests()
    with pytest.raises(KeyboardInterrupt):
        found.of([1, Raises(KeyboardInterrupt()), Point])
    assert found.of([[1], Point]) == digest_of([[1], Point])


def test_a_walk_that_failed_leaves_nothing_behind():
    found = Digests()
    deep: object = Point
    for _ in range(30_000):
        deep = [deep]
    with pytest.raises(NoDigest):
        found.of(deep)
    with pytest.raises(NoDigest):
        found.of([Point, threading.Lock()])
    assert found.of(Point) == digest_of(Point)
    changing = [[1], 2]
    before = found.of(changing)
    changing[0].append(2)
    assert found.of(changing) == digest_of([[1, 2], 2]) != before
