"""Argument templates: handles are lifted out of arguments when a task is declared, values filled in when it runs.

    declare   add(join, [a, b], how="outer")  --lift-->  [Hole(0), Hole(1)], "outer"   references a, b
    run       fill([Hole(0), Hole(1)], values of a, b)  -->  [value of a, value of b]

A `Layout` tells, for all tasks declared alike, what stands at each position; only constants and references differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# What a position holds, if it is a constant or the value of one task. A number from NESTED on is a constant with
# (number - NESTED) holes in it.
CONSTANT, REFERENCE, NESTED = 0, 1, 2

# Types that are handed on without a look inside.
ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))


class Hole(NamedTuple):
    """Where the value of a task's ``place``-th reference goes."""

    place: int


class HoleRun(NamedTuple):
    """Where a list of the values of ``n`` references goes, the first of them the task's ``place``-th."""

    place: int
    n: int


class Layout(NamedTuple):
    """What tasks that were declared alike have at each argument position.

    Attributes:
        kinds: CONSTANT, REFERENCE or NESTED + holes; positional arguments first, then keywords.
        keywords: names of the last ``len(keywords)`` positions.
    """

    kinds: tuple[int, ...]
    keywords: tuple[str, ...]

    @property
    def n_positional(self) -> int:
        """How many positions come before the keywords."""
        return len(self.kinds) - len(self.keywords)

    @property
    def n_references(self) -> int:
        """How many values of other tasks one task takes."""
        return sum(kind - NESTED if kind >= NESTED else kind for kind in self.kinds)

    @property
    def n_constants(self) -> int:
        """How many constants one task has (one with holes in it counts)."""
        return sum(kind != REFERENCE for kind in self.kinds)

    def position(self, constant: int) -> str:
        """Name the place of the ``constant``-th constant as a user wrote it: ``args[1]``, ``kwargs['how']``."""
        places = [i for i, kind in enumerate(self.kinds) if kind != REFERENCE]
        place = places[constant]
        if place < self.n_positional:
            return f"args[{place}]"
        return f"kwargs[{self.keywords[place - self.n_positional]!r}]"


def lift(value: Any, take: Callable[[Any], Hole | HoleRun | None]) -> Any:
    """Return ``value`` with every handle inside replaced by a hole; ``value`` itself if there is none.

    Lists, tuples (named ones too), dicts' values and dataclass instances are searched. A container within itself is
    handed on as it is.

    Args:
        value: any argument.
        take: gives the hole for a handle, None for anything else; it keeps count of the references.
    """
    return _lift(value, take, set())


def _lift(value: Any, take: Callable[[Any], Hole | HoleRun | None], within: set[int]) -> Any:
    if type(value) in ATOMS:
        return value
    hole = take(value)
    if hole is not None:
        return hole
    if not _is_container(value) or id(value) in within:
        return value
    within.add(id(value))
    changed = _map_parts(value, lambda part: _lift(part, take, within))
    within.discard(id(value))
    return changed


def fill(template: Any, values: Sequence[Any]) -> Any:
    """Put the values of a task's references into the holes of one argument.

    Args:
        template: what `lift` made.
        values: the values of the task's references, in the order of their holes.
    """
    return _fill(template, values, set())


def _fill(template: Any, values: Sequence[Any], within: set[int]) -> Any:
    kind = type(template)
    if kind in ATOMS:
        return template
    if kind is Hole:
        return values[template.place]
    if kind is HoleRun:
        return list(values[template.place : template.place + template.n])
    if not _is_container(template) or id(template) in within:
        return template
    within.add(id(template))
    filled = _map_parts(template, lambda part: _fill(part, values, within))
    within.discard(id(template))
    return filled


def _is_container(value: Any) -> bool:
    kind = type(value)
    return kind is list or kind is dict or isinstance(value, tuple) or hasattr(kind, "__dataclass_fields__")


def _map_parts(container: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container with its parts changed; the container itself if none is."""
    kind = type(container)
    if kind is dict:
        parts = [change(part) for part in container.values()]
        return container if _same(parts, container.values()) else dict(zip(container, parts, strict=True))
    if kind is list or isinstance(container, tuple):
        if ATOMS.issuperset(map(type, container)):
            return container
        parts = [change(part) for part in container]
        if _same(parts, container):
            return container
        # Past a named tuple's own constructor, which may want other arguments.
        return parts if kind is list else tuple.__new__(kind, parts)
    return _map_fields(container, change)


def _same(parts: Sequence[Any], originals: Any) -> bool:
    return all(part is original for part, original in zip(parts, originals, strict=True))


def _map_fields(instance: Any, change: Callable[[Any], Any]) -> Any:
    """Copy a dataclass instance with changed fields, without running its constructor again."""
    changed = {}
    from dataclasses import fields  # a worker that gets no dataclass need not load it

    for field in fields(instance):
        old = getattr(instance, field.name, None)
        new = change(old)
        if new is not old:
            changed[field.name] = new
    if not changed:
        return instance
    twin = copy.copy(instance)
    for name, value in changed.items():
        object.__setattr__(twin, name, value)  # past a frozen class's guard: the twin is ours alone
    return twin
