"""Functions of the user's that workers call with other arguments than a task's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from forgepar.contexts import context


def as_compensation(undo: Callable[..., Any]) -> Callable[..., Any]:
    """Return what undoes a task, given its value alone: ``undo`` itself, or with the context if it takes that too."""
    return functools.partial(_with_context, undo) if _takes(undo, 2) else undo


def as_handler(catch: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes an error and a task's arguments: ``catch`` itself, unless that takes one argument."""
    return catch if _takes(catch, 2) else functools.partial(_error_alone, catch)


def _takes(fn: Callable[..., Any], n_arguments: int) -> bool:
    """Tell whether a function takes so many positional arguments; of one that does not tell, that it does not."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= n_arguments or any(p.kind == p.VAR_POSITIONAL for p in parameters)


def _with_context(undo: Callable[..., Any], value: Any) -> Any:
    return undo(value, context())


def _error_alone(catch: Callable[..., Any], error: Exception, *_: Any, **__: Any) -> Any:
    return catch(error)
