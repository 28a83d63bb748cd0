"""Checks of arguments. Each error names the argument, says what it must be, and shows what it is.

Arguments are checked where a call begins, before anything is started or made. What is called once per task checks
nothing while all is well: it asks here only when something has failed, or once per function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from numbers import Integral
from typing import TYPE_CHECKING, Any

from forgepar.errors import text_of

if TYPE_CHECKING:
    from pathlib import Path

MOST_WORKERS = 32_000  # records of tasks have the worker's number as int16
_MOST_SHOWN = 200  # characters of a value in a message
_FOR_EVER = 1e9  # seconds, 31 years: what waits cannot be told more than some hundred years


def shown(value: object) -> str:
    """Return the repr of a value, shortened; its type where it has no repr."""
    try:
        text = str.__str__(repr(value))
    except BaseException as error:
        return f"a {type(value).__name__} (its repr raises {type(error).__name__}: {text_of(error)})"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... (a {type(value).__name__})"


def refusal(name: str, must_be: str, value: object, kind: type[Exception] = ValueError) -> Exception:
    """Return the error for an argument that cannot be.

    Args:
        name: the argument, as it is written in a call.
        must_be: what it must be, such as "a path".
        value: what it is.
        kind: the class of the error.
    """
    return kind(f"{name} must be {must_be}, got {shown(value)}.")


def is_flag(value: object) -> bool:
    """Tell whether a value is True or False, of Python or of numpy."""
    return isinstance(value, bool) or (type(value).__module__, type(value).__name__[:4]) == ("numpy", "bool")


def is_count(value: object, least: int = 0) -> bool:
    """Tell whether a value is an integer (numpy's are, too), and no bool, of at least so much."""
    return type(value) is not bool and isinstance(value, Integral) and int(value) >= least


def is_number(value: object) -> bool:
    """Tell whether a value is an int or float, and neither a bool nor nan."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def check_flag(name: str, value: object, kind: type[Exception] = ValueError) -> None:
    """Refuse what is neither True nor False."""
    if not is_flag(value):
        raise refusal(name, "True or False", value, kind)


def check_count(
    name: str, value: object, least: int = 1, most: int | None = None, kind: type[Exception] = ValueError
) -> None:
    """Refuse what is no integer from ``least`` to ``most``."""
    if not is_count(value, least) or (most is not None and is_count(value, most + 1)):
        raise refusal(name, f"an integer from {least}" + (f" to {most}" if most is not None else ""), value, kind)


def check_workers(name: str, value: object) -> None:
    """Refuse what is no number of workers; None is one."""
    if value is not None and (not is_count(value, 1) or is_count(value, MOST_WORKERS + 1)):
        raise ValueError(
            f"{name}={shown(value)} is no number of processes. Give 1 to {MOST_WORKERS}, or None for one a CPU."
        )


def check_seconds(name: str, value: Any) -> Any:
    """Refuse what is no time above 0; return it, or as much of it as anything can wait for. None is for ever."""
    if value is None:
        return None
    if not is_number(value) or not value > 0:
        raise ValueError(f"{name}={shown(value)} is no time. Give seconds above 0, or None.")
    return min(value, _FOR_EVER)


def check_text(name: str, value: object, kind: type[Exception] = ValueError) -> None:
    """Refuse what is no text, or empty."""
    if not isinstance(value, str) or not value:
        raise refusal(name, "text that is not empty", value, kind)


def check_path(name: str, value: Any, kind: type[Exception] = ValueError) -> Path:
    """Refuse what is no path of a file; return it."""
    if isinstance(value, bytes) or not isinstance(value, (str, os.PathLike)):
        raise kind(f"{name}={shown(value)} is no path. Give that of a file, as text or as a path object.")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise kind(f"{name}={shown(value)} is no path. Give that of a file: it is not empty, and has no NUL.")
    from pathlib import Path  # a worker need not load it

    return Path(text)


def check_callable(name: str, value: object, kind: type[Exception] = ValueError) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise refusal(name, "callable", value, kind)


def check_iterable(name: str, value: Any, kind: type[Exception] = ValueError) -> None:
    """Refuse what cannot be gone through; what can be so but once is left as it is."""
    if not hasattr(type(value), "__iter__") and not hasattr(type(value), "__getitem__"):
        raise refusal(name, "iterable", value, kind)


def check_instance(
    name: str, value: object, kinds: type | tuple[type, ...], must_be: str, kind: type[Exception] = ValueError
) -> None:
    """Refuse what is an instance of none of some classes."""
    if not isinstance(value, kinds):
        raise refusal(name, must_be, value, kind)


def check_choice(name: str, value: object, choices: Collection[str], *, or_callable: bool = False) -> None:
    """Refuse what is none of some texts."""
    if isinstance(value, str) and value in choices:
        return
    if not (or_callable and callable(value)):
        told = ", ".join(map(repr, choices)) + (", or a function" if or_callable else "")
        raise ValueError(f"{name}={shown(value)} is not known. Give {told}.")


def as_list(name: str, value: Any, must_be: str = "iterable", kind: type[Exception] = ValueError) -> list[Any]:
    """Return the items of an iterable; what it raises itself while it is gone through is passed on."""
    try:
        items = iter(value)
    except TypeError:
        raise refusal(name, must_be, value, kind) from None
    return list(items)


def checked_by(name: str, look: Callable[[], Any], must_be: str, value: object) -> Any:
    """Return what a look at a value returns; refuse the value where that raises a TypeError, ValueError or the like."""
    try:
        return look()
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(
            f"{name} must be {must_be}, got {shown(value)} ({type(error).__name__}: {text_of(error)})."
        ) from None
