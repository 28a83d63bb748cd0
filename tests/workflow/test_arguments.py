"""Handles are lifted out of arguments and values filled in, wherever they are; all else is left alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar.workflow.arguments import CONSTANT, NESTED, REFERENCE, ArgumentLayout, Hole, HoleRun, fill, lift


class Mark(NamedTuple):
    """Stands for a handle."""

    number: int


class Marks(NamedTuple):
    """Stands for the handles of several tasks."""

    numbers: tuple[int, ...]


class Pair(NamedTuple):
    left: Any
    right: Any


class Tuple(tuple):
    __slots__ = ()


@dataclass
class Plain:
    one: Any
    two: Any


@dataclass(frozen=True)
class Frozen:
    one: Any
    two: Any


@dataclass(slots=True)
class Slots:
    one: Any
    two: Any


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    one: Any
    two: Any


@dataclass
class Counted:
    """Runs code when it is made, which must not be run again."""

    one: Any
    made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.made += 1


RECORDS = [Pair, Plain, Frozen, Slots, FrozenSlots]


class Taker:
    """What a workflow does with handles: it notes what they refer to and gives their holes."""

    def __init__(self) -> None:
        self.references: list[int] = []

    def __call__(self, part: Any) -> Hole | HoleRun | None:
        at = len(self.references)
        if isinstance(part, Mark):
            self.references.append(part.number)
            return Hole(at)
        if isinstance(part, Marks):
            self.references.extend(part.numbers)
            return HoleRun(at, len(part.numbers))
        return None


def value_of(number: int) -> Any:
    """The value of a task: a container, as these must not be searched when they are filled in."""
    return [("value", number)]


def expected(value: Any) -> Any:
    """What a task should get for an argument: the plain, recursive reading of the rule."""
    kind = type(value)
    if kind is Mark:
        return value_of(value.number)
    if kind is Marks:
        return [value_of(number) for number in value.numbers]
    if kind is list or kind is Tuple or kind is tuple:
        return kind(expected(part) for part in value)
    if kind is dict:
        return {key: expected(part) for key, part in value.items()}
    if kind is Pair:
        return Pair(*map(expected, value))
    if kind in RECORDS:
        return kind(expected(value.one), expected(value.two))
    return value


def round_trip(value: Any) -> Any:
    taker = Taker()
    template = lift(value, taker)
    return fill(template, [value_of(number) for number in taker.references])


atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
marks = st.builds(Mark, st.integers(0, 50)) | st.builds(Marks, st.lists(st.integers(0, 50), max_size=3).map(tuple))


def containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(parts, max_size=3)
    records = [st.builds(kind, parts, parts) for kind in RECORDS]
    return st.one_of(
        lists, lists.map(tuple), lists.map(Tuple), st.dictionaries(st.text(max_size=3), parts, max_size=3), *records
    )


@given(st.recursive(atoms | marks, containers, max_leaves=20))
def test_filling_what_was_lifted_puts_each_value_in_its_place(value):
    assert round_trip(value) == expected(value)


@given(st.recursive(atoms | marks, containers, max_leaves=20))
def test_lifting_leaves_the_argument_as_it_was(value):
    before = repr(value)
    round_trip(value)
    assert repr(value) == before


@given(st.recursive(atoms, containers, max_leaves=20))
def test_an_argument_without_handles_is_handed_on_itself(value):
    taker = Taker()
    assert lift(value, taker) is value
    assert taker.references == []


@given(st.recursive(atoms | marks, containers, max_leaves=20))
def test_references_are_noted_in_the_order_of_their_holes(value):
    taker = Taker()
    lift(value, taker)
    assert taker.references == numbers_in(value)


def numbers_in(value: Any) -> list[int]:
    kind = type(value)
    if kind is Mark:
        return [value.number]
    if kind is Marks:
        return list(value.numbers)
    if kind in (Plain, Frozen, Slots, FrozenSlots):
        value = [value.one, value.two]
    if kind is dict:
        value = list(value.values())
    return [number for part in value for number in numbers_in(part)] if isinstance(value, (list, tuple)) else []


def test_parts_without_handles_keep_their_identity():
    aside, beside = object(), [1, 2]
    filled = round_trip({"a": [Mark(1)], "b": aside, "c": Plain(beside, Mark(2))})
    assert filled["b"] is aside
    assert filled["c"].one == beside


@pytest.mark.parametrize("kind", [Plain, Frozen, Slots, FrozenSlots])
def test_dataclasses_are_copied_not_changed(kind):
    original = kind(Mark(3), 1)
    assert round_trip(original) == kind(value_of(3), 1)
    assert original == kind(Mark(3), 1)


def test_a_dataclass_is_not_made_again():
    assert round_trip(Counted(Mark(3))).made == 1


def test_a_dataclass_itself_is_no_instance_to_search():
    assert round_trip([Mark(1), Plain]) == [value_of(1), Plain]


@pytest.mark.parametrize("value", [{1, 2}, frozenset((1,)), {Mark(1): 2}, range(3), object(), len])
def test_other_containers_and_keys_are_not_searched(value):
    taker = Taker()
    assert lift(value, taker) is value
    assert taker.references == []


def test_what_stands_beside_a_handle_is_not_built_anew():
    """Tuples of a type that cannot be built from its parts come through whole."""
    status = os.stat(os.curdir)  # noqa: PTH116  (its type is what matters)
    filled = round_trip([Mark(1), status])
    assert filled[1].st_mtime_ns == status.st_mtime_ns


def test_a_named_tuple_is_not_constructed_again():
    class Doubling(Pair):
        def __new__(cls, left):
            return super().__new__(cls, left, "right")

    assert round_trip([Doubling(Mark(1))]) == [(value_of(1), "right")]


def test_an_argument_that_holds_itself_is_handed_on():
    parent = Plain("parent", [])
    parent.two.append(Plain("child", parent))
    assert lift(parent, Taker()) is parent


@pytest.mark.parametrize(
    ("kinds", "keywords", "n_positional", "n_references", "n_constants"),
    [
        ((), (), 0, 0, 0),
        ((CONSTANT,), (), 1, 0, 1),
        ((REFERENCE,), ("a",), 0, 1, 0),
        ((REFERENCE, CONSTANT, NESTED), ("a", "b"), 1, 1, 2),
        ((NESTED + 3, REFERENCE, CONSTANT, NESTED + 1), ("z",), 3, 5, 3),
    ],
)
def test_layout_counts(kinds, keywords, n_positional, n_references, n_constants):
    layout = ArgumentLayout(kinds, keywords)
    assert (layout.n_positional, layout.n_references, layout.n_constants) == (n_positional, n_references, n_constants)


def test_layout_names_the_place_of_each_constant():
    layout = ArgumentLayout(
        (REFERENCE, CONSTANT, NESTED + 2, REFERENCE, CONSTANT, REFERENCE, NESTED), ("a", "b", "c", "d")
    )
    assert [layout.position(i) for i in range(layout.n_constants)] == [
        "args[1]",
        "args[2]",
        "kwargs['b']",
        "kwargs['d']",
    ]
