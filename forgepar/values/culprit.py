"""Find the part of a value that cannot be pickled, for error messages."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from forgepar.errors import text_of
from forgepar.values.caller_values import type_name
from forgepar.values.comparison import MISSING, cells_of, names_in
from forgepar.values.origins import travels_by_value
from forgepar.values.pickling import dumps_by_value

_DEEP = 30  # maximum levels of parts
_FIRST_ITEMS = 1000  # items of a container that are tried


def culprit(value: Any, error: BaseException) -> str:
    """Return a description of the innermost part of a value that cannot be pickled: its path, its type, and the error.

    Args:
        value: a value that could not be pickled.
        error: the exception that pickling it raised.

    Example:
        >>> import threading
        >>> culprit({"lock": threading.Lock()}, TypeError("cannot pickle '_thread.lock' object"))
        "item 'lock' is a _thread.lock (TypeError: cannot pickle '_thread.lock' object)"
    """
    why = f"{type(error).__name__}: {text_of(error)}"
    try:
        where, part = _innermost(value, "", set(), _DEEP)
    except Exception:  # it runs code of the objects
        return why
    return f"{where} is a {type_name(part)} ({why})" if where else why


def _innermost(value: Any, where: str, seen: set[int], depth: int) -> tuple[str, Any]:
    seen.add(id(value))
    if depth:
        for label, part in _parts(value, where):
            if part is not MISSING and id(part) not in seen and not _is_picklable(part):
                return _innermost(part, label, seen, depth - 1)
    return where, value


def _is_picklable(value: Any) -> bool:
    try:
        dumps_by_value(value, lambda _: None)
    except Exception:
        return False
    return True


def _parts(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a value, each with its path."""
    of = f" of {where}" if where else ""
    if isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, types.MethodType):
        yield from (
            (f"function {value.__name__!r}", value.__func__),
            (f"the object of method {value.__name__!r}", value.__self__),
        )
    elif isinstance(value, functools.partial):
        yield f"the function{of}", value.func
        yield from ((f"args[{n}]{of}", part) for n, part in enumerate(value.args))
        yield from ((f"kwargs[{name!r}]{of}", part) for name, part in value.keywords.items())
    elif isinstance(value, type):
        for name, part in vars(value).items():
            if isinstance(part, (classmethod, staticmethod)):
                part = part.__func__
            yield f"attribute {name!r} of class {value.__name__!r}", part
    elif isinstance(value, dict):
        yield from ((f"item {key!r}{of}", part) for key, part in _first(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"item {n}{of}", part) for n, part in enumerate(_first(value)))
    else:
        yield f"the class of {where}" if where else "its class", type(value)
        owner = f" of {where}" if where else f" of the {type(value).__name__}"
        yield from ((f"attribute {name!r}{owner}", part) for name, part in getattr(value, "__dict__", {}).items())


def _parts_of_function(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if travels_by_value(str(fn.__globals__.get("__name__"))):
        for name in sorted(names_in(fn.__code__)):
            if name in fn.__globals__:
                yield f"global {name!r} of function {fn.__name__!r}", fn.__globals__[name]
    for name, part in zip(fn.__code__.co_freevars, cells_of(fn), strict=True):
        yield f"{name!r}, which function {fn.__name__!r} closes over,", part
    for part in fn.__defaults__ or ():
        yield f"a default of function {fn.__name__!r}", part
    for name, part in (fn.__kwdefaults__ or {}).items():
        yield f"the default of {name!r} of function {fn.__name__!r}", part


def _first(items: Any) -> Iterator[Any]:
    for n, item in enumerate(items):
        if n == _FIRST_ITEMS:
            return
        yield item
