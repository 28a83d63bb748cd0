"""Argument templates: declaring a task takes the handles out of its arguments, running it fills the values in.

    declare   add(join, [a, b], how="outer")  --lift-->  [Hole(0), Hole(1)], "outer"   references a, b
    run       fill([Hole(0), Hole(1)], values of a, b)  -->  [value of a, value of b]

An `ArgumentLayout` describes each position for all tasks that are declared alike; constants and references differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# The kind of an argument position: a constant, or the value of one task. A number from NESTED on is a constant with
# (number - NESTED) holes in it.
CONSTANT, REFERENCE, NESTED = 0, 1, 2

# Types that are passed on without being searched.
ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))


class Hole(NamedTuple):
    """Place for the value of a task's ``place``-th reference."""

    place: int


class HoleRun(NamedTuple):
    """Place for a list of the values of ``n`` references, starting with the task's ``place``-th."""

    place: int
    n: int


class ArgumentLayout(NamedTuple):
    """Argument positions of tasks that are declared alike.

    Attributes:
        kinds: CONSTANT, REFERENCE or NESTED + holes; positional arguments first, then keywords.
        keywords: names of the last ``len(keywords)`` positions.
    """

    kinds: tuple[int, ...]
    keywords: tuple[str, ...]

    @property
    def n_positional(self) -> int:
        """The number of positions before the keywords."""
        return len(self.kinds) - len(self.keywords)

    @property
    def n_references(self) -> int:
        """The number of values of other tasks that one task takes."""
        return sum(kind - NESTED if kind >= NESTED else kind for kind in self.kinds)

    @property
    def n_constants(self) -> int:
        """The number of constants of one task, including those with holes."""
        return sum(kind != REFERENCE for kind in self.kinds)

    def position(self, constant: int) -> str:
        """Return the position of the ``constant``-th constant in a call: ``args[1]``, ``kwargs['how']``."""
        places = [i for i, kind in enumerate(self.kinds) if kind != REFERENCE]
        place = places[constant]
        if place < self.n_positional:
            return f"args[{place}]"
        return f"kwargs[{self.keywords[place - self.n_positional]!r}]"


def lift(value: Any, take: Callable[[Any], Hole | HoleRun | None]) -> Any:
    """Return ``value`` with every handle in it replaced by a hole; ``value`` itself if it has none.

    Lists, tuples (named tuples too), dict values and dataclass instances are searched. A container inside itself is
    left as it is.

    Args:
        value: any argument.
        take: returns the hole for a handle, None for other values; it counts the references.
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
        template: the result of `lift`.
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
    """Return a container with its parts changed; the container itself if no part changes."""
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
        # `tuple.__new__`, as the constructor of a named tuple may take other arguments.
        return parts if kind is list else tuple.__new__(kind, parts)
    return _map_fields(container, change)


def _same(parts: Sequence[Any], originals: Any) -> bool:
    return all(part is original for part, original in zip(parts, originals, strict=True))


def _map_fields(instance: Any, change: Callable[[Any], Any]) -> Any:
    """Copy a dataclass instance with changed fields, without calling its constructor."""
    changed = {}
    from dataclasses import fields  # workers load it only for dataclass instances

    for field in fields(instance):
        old = getattr(instance, field.name, None)
        new = change(old)
        if new is not old:
            changed[field.name] = new
    if not changed:
        return instance
    twin = copy.copy(instance)
    for name, value in changed.items():
        object.__setattr__(twin, name, value)  # a frozen class refuses setattr; nothing else refers to the twin yet
    return twin
