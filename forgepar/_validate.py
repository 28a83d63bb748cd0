"""Argument checks. Each error names the argument, its constraint and the value.

Callers check arguments before they start or allocate anything. Code that runs once per task calls a check only after a
failure, or once per function.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from numbers import Integral
from types import CodeType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from forgepar.errors import add_note, text_of

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    from pathlib import Path

MOST_WORKERS = 32_000  # task records have the worker's number as int16
_ASYNC = 0x80 | 0x200  # code flags of coroutine functions and async generator functions; `inspect` need not be loaded
_MOST_SHOWN = 200  # characters of a value in a message
_LONGEST_SECONDS = 1e9  # 31 years: locks and selectors overflow on waits of several hundred years


def shown(value: object) -> str:
    """Return the repr of a value, shortened; its type if the repr raises."""
    try:
        text = str.__str__(repr(value))
    except BaseException as error:
        return f"a {type(value).__name__} (its repr raises {type(error).__name__}: {text_of(error)})"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... (a {type(value).__name__})"


def refusal(name: str, must_be: str, value: object, kind: type[Exception] = ValueError) -> Exception:
    """Return the error for an invalid argument.

    Args:
        name: the argument's name in a call.
        must_be: the constraint, such as "a path".
        value: the argument's value.
        kind: the class of the error.
    """
    return kind(f"{name} must be {must_be}, got {shown(value)}.")


def async_error(name: str, value: object, kind: type[Exception] = ValueError) -> Exception:
    """Return the error for an async function, which would return a coroutine that nothing awaits."""
    return kind(
        f"{name} must not be an async function, got {shown(value)}. "
        "Wrap it: def f(*args): return asyncio.run(coroutine(*args))."
    )


def has(value: object, *names: str) -> bool:
    """Return whether a value has all these attributes; False if access to one raises."""
    try:
        return all(hasattr(value, name) for name in names)
    except Exception:
        return False


def is_flag(value: object) -> bool:
    """Return whether a value is a bool of Python or of numpy."""
    return isinstance(value, bool) or (type(value).__module__, type(value).__name__[:4]) == ("numpy", "bool")


def is_count(value: object, least: int = 0) -> bool:
    """Return whether a value is an integer, of numpy too but not a bool, of at least ``least``."""
    return type(value) is not bool and isinstance(value, Integral) and int(value) >= least


def is_number(value: object) -> bool:
    """Return whether a value is an int or float, but neither a bool nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def check_flag(name: str, value: object, kind: type[Exception] = ValueError) -> None:
    """Check that a value is True or False."""
    if not is_flag(value):
        raise refusal(name, "True or False", value, kind)


def check_count(
    name: str, value: object, least: int = 1, most: int | None = None, kind: type[Exception] = ValueError
) -> None:
    """Check that a value is an integer from ``least`` to ``most``."""
    if not is_count(value, least) or (most is not None and is_count(value, most + 1)):
        must_be = f"an integer from {least} to {most}" if most is not None else f"an integer of at least {least}"
        raise refusal(name, must_be, value, kind)


def check_number(
    name: str,
    value: Any,
    least: float = 0,
    most: float = math.inf,
    kind: type[Exception] = ValueError,
    *,
    may_be_inf: bool = False,
) -> None:
    """Check that a value is a number from ``least`` to ``most``."""
    if not is_number(value) or not least <= value <= most or (value == math.inf and not may_be_inf):
        finite = "a number" if may_be_inf else "a finite number"
        must_be = f"{finite} of at least {least:g}" if most == math.inf else f"a number from {least:g} to {most:g}"
        raise refusal(name, must_be, value, kind)


def check_workers(name: str, value: object) -> None:
    """Check that a value is a number of workers, or None."""
    if value is not None and (not is_count(value, 1) or is_count(value, MOST_WORKERS + 1)):
        raise refusal(name, f"an integer from 1 to {MOST_WORKERS}, or None for one per CPU", value)


def check_seconds(name: str, value: Any, kind: type[Exception] = ValueError) -> Any:
    """Check that a value is a positive number of seconds, or None for no limit; return it, at most 31 years."""
    if value is None:
        return None
    if not is_number(value) or not value > 0:
        raise refusal(name, "a positive number of seconds, or None", value, kind)
    return min(value, _LONGEST_SECONDS)


def check_text(name: str, value: object, kind: type[Exception] = ValueError) -> None:
    """Check that a value is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise refusal(name, "a non-empty string", value, kind)


def check_path(name: str, value: Any, kind: type[Exception] = ValueError) -> Path:
    """Check that a value is the path of a file, as a string or path object; return it as `pathlib.Path`."""
    if isinstance(value, bytes) or not isinstance(value, (str, os.PathLike)):
        raise refusal(name, "the path of a file, as str or os.PathLike", value, kind)
    text = checked_by(name, lambda: os.fspath(value), "the path of a file", value, kind)
    if not isinstance(text, str) or not text or "\0" in text:
        raise refusal(name, "a non-empty path without NUL characters", value, kind)
    from pathlib import Path  # a worker need not load it

    return Path(text)


def check_callable(name: str, value: object, kind: type[Exception] = ValueError) -> None:
    """Check that a value can be called and is not an async function."""
    if not callable(value):
        raise refusal(name, "callable", value, kind)
    if is_async(value):
        raise async_error(name, value, kind)


def is_async(value: object) -> bool:
    """Return whether a value is an async function, or a method of one."""
    code = getattr(getattr(value, "__func__", value), "__code__", None) if has(value, "__code__") else None
    return isinstance(code, CodeType) and bool(code.co_flags & _ASYNC)


def check_instance(
    name: str, value: object, kinds: type | tuple[type, ...], must_be: str, kind: type[Exception] = ValueError
) -> None:
    """Check that a value is an instance of one of some classes."""
    if not isinstance(value, kinds):
        raise refusal(name, must_be, value, kind)


def check_choice(name: str, value: object, choices: Collection[str], *, or_callable: bool = False) -> None:
    """Check that a value is one of some strings, or a function where that is allowed."""
    if isinstance(value, str) and value in choices:
        return
    if not (or_callable and callable(value) and not is_async(value)):
        listed = ", ".join(map(repr, choices)) + (", or a function" if or_callable else "")
        raise refusal(name, f"one of {listed}", value)


def iterator_of(name: str, value: Any, must_be: str = "iterable", kind: type[Exception] = ValueError) -> Iterator[Any]:
    """Return an iterator of an iterable. Errors of the value's own ``__iter__`` are raised with a note."""
    try:
        return iter(value)
    except TypeError:
        raise refusal(name, must_be, value, kind) from None
    except Exception as error:
        add_note(error, f"raised while iterating over {name}")
        raise


def as_list(name: str, value: Any, must_be: str = "iterable", kind: type[Exception] = ValueError) -> list[Any]:
    """Return the items of an iterable. Errors that it raises itself are raised with a note."""
    items = iterator_of(name, value, must_be, kind)
    try:
        return list(items)
    except Exception as error:
        add_note(error, f"raised while iterating over {name}")
        raise


def checked_by(
    name: str, look: Callable[[], Any], must_be: str, value: object, kind: type[Exception] = ValueError
) -> Any:
    """Return ``look()``. If it raises anything except `MemoryError`, the value is invalid."""
    try:
        return look()
    except MemoryError:
        raise
    except Exception as error:  # a value's own methods may raise anything
        raise kind(
            f"{name} must be {must_be}, got {shown(value)} ({type(error).__name__}: {text_of(error)})."
        ) from None


def check_names(call: str, given: Iterable[str], known: Collection[str]) -> None:
    """Check that a call accepts these keyword arguments.

    Raises:
        TypeError: it does not accept one of them; the message names the nearest that it accepts.
    """
    for name in given:
        if name not in known:
            import difflib  # loaded only for a mistyped name

            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            remedy = f"Did you mean {near[0]}=?" if near else f"Valid arguments are {', '.join(sorted(known))}."
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}. {remedy}")


def names_checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Make the error for an unknown keyword argument of a function name the nearest valid one (a decorator)."""
    code = fn.__code__
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check_names(fn.__qualname__.removesuffix(".__init__"), kwargs, known)
        return fn(*args, **kwargs)

    return checked
