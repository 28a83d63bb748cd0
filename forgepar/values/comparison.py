"""Comparison of values by content: of what a worker has under a name with what the caller has.

Functions are compared by their code, so that those of two processes can be equal; classes and modules by identity.
A wrong "no" costs little, as the worker then takes the caller's value. A wrong "yes" would leave it with another value.
"""

from __future__ import annotations

import functools
import pickle
import sys
import types
from typing import Any, TypeAlias

_Seen: TypeAlias = dict[tuple[int, int], tuple[Any, Any]]

MISSING = object()  # in place of a value that does not exist
ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
CACHED = type(functools.lru_cache(lambda: None))
_MADE = frozenset(("__module__", "__dict__", "__weakref__", "__slots__", "__abstractmethods__", "__parameters__"))
FRESH = "__forgepar_fresh__"  # attribute of functions that have no state yet


def same(one: Any, other: Any) -> bool:
    """Return whether two values have the same type and content; functions, the same code, defaults and closure."""
    try:
        return _same(one, other, {})
    except RecursionError:
        return False


def _same(one: Any, other: Any, seen: _Seen) -> bool:
    kind = type(one)
    if one is other:
        return True
    if kind is not type(other):
        return False
    if kind in ATOMS:
        return bool(one == other) if kind not in (float, complex) else repr(one) == repr(other)
    pair = (id(one), id(other))
    if pair in seen:
        return True
    seen[pair] = (one, other)  # keeps them alive, so that no other object gets these ids
    if kind in (list, tuple):
        return len(one) == len(other) and all(_same(a, b, seen) for a, b in zip(one, other, strict=True))
    if kind is dict:
        return _same(list(one), list(other), seen) and all(_same(one[key], other[key], seen) for key in one)
    if kind in (set, frozenset):
        return bool(one == other) and sorted(map(_typed, one)) == sorted(map(_typed, other))
    return _same_object(one, other, seen)


def _typed(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if type(value) in ATOMS else type(value).__name__


def _same_object(one: Any, other: Any, seen: _Seen) -> bool:
    if isinstance(one, types.FunctionType):
        return (
            one.__code__ == other.__code__
            and one.__qualname__ == other.__qualname__
            and _same(one.__defaults__, other.__defaults__, seen)
            and _same(one.__kwdefaults__, other.__kwdefaults__, seen)
            and _same(cells_of(one), cells_of(other), seen)
            and _same(_without_wrapped(one), _without_wrapped(other), seen)
            and (one.__globals__ is other.__globals__ or _same(own_globals_of(one), own_globals_of(other), seen))
        )
    if isinstance(one, (classmethod, staticmethod)):
        return _same(one.__func__, other.__func__, seen)
    if isinstance(one, property):
        return all(_same(getattr(one, part), getattr(other, part), seen) for part in ("fget", "fset", "fdel"))
    if type(one) is CACHED:
        return bool(one.cache_parameters() == other.cache_parameters()) and _same(
            one.__wrapped__, other.__wrapped__, seen
        )
    if isinstance(one, functools.cached_property):  # it has a lock up to Python 3.11
        return one.attrname == other.attrname and _same(one.func, other.func, seen)
    if isinstance(one, functools.singledispatchmethod):
        registries = (dict(one.dispatcher.registry), dict(other.dispatcher.registry))
        return _same(one.func, other.func, seen) and _same(*registries, seen)
    if isinstance(one, functools.partial):
        return all(_same(getattr(one, part), getattr(other, part), seen) for part in ("func", "args", "keywords"))
    if isinstance(one, (type, types.ModuleType)):
        return False
    if hasattr(type(one), "__forgepar_named__"):  # a function with options
        return _same(one.fn, other.fn, seen) and bool(one.task_options == other.task_options)
    if is_plain_instance(one):
        return _same(vars(one), vars(other), seen)
    try:
        return pickle.dumps(one, protocol=5) == pickle.dumps(other, protocol=5)
    except Exception:
        return False


def is_plain_instance(value: Any) -> bool:
    """Return whether an object's state is its `__dict__` and nothing else."""
    kind: Any = type(value)
    return bool(
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None)
        and not hasattr(kind, "__setstate__")
        and not hasattr(kind, "__getnewargs_ex__")
        and not hasattr(kind, "__getnewargs__")
        and hasattr(value, "__dict__")
        and all(not base.__dict__.get("__slots__") for base in kind.__mro__)
        and kind.__basicsize__ <= _PLAIN.__basicsize__
    )


class _PLAIN:
    """An instance of it has a `__dict__`, can be weakly referenced, and has no other state."""


def repeated_in(cls: type) -> dict[str, Any]:
    """Return the attributes in a class's own `__dict__` that are identical to those of a base."""
    bases = [vars(base) for base in cls.__bases__ if base is not object]
    repeated = {n: value for n, value in vars(cls).items() if any(base.get(n, MISSING) is value for base in bases)}
    return {n: value for n, value in repeated.items() if n not in _MADE and not n.startswith("_abc_")}


def cells_of(fn: types.FunctionType) -> list[Any]:
    """Return the contents of a function's closure, `MISSING` for an empty cell."""
    return [contents_of(cell) for cell in fn.__closure__ or ()]


def contents_of(cell: types.CellType) -> Any:
    """Return the content of a cell, `MISSING` for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def own_globals_of(fn: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a function reads, if they belong to no module: `exec` made it in a dict."""
    names = fn.__globals__
    home = names.get("__name__")
    if isinstance(home, str) and vars(sys.modules.get(home, types)) is names:
        return {}
    return {name: names[name] for name in names_in(fn.__code__) if name in names}


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return the names of globals and attributes that a code object and the code within it refer to."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _without_wrapped(fn: types.FunctionType) -> dict[str, Any]:
    return {name: value for name, value in vars(fn).items() if name not in ("__wrapped__", FRESH)}
