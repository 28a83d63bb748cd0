"""Adapters for functions that workers call with other arguments than the task's: compensations and error handlers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from forgepar.workflow.context import TaskContext, context


def as_compensation(undo: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a task's value that undoes the task: ``undo``, with the context added if it takes that.

    The context goes to a parameter after the value that is named ``context`` or annotated as `TaskContext`. Other
    parameters must have defaults, and keep them.
    """
    place = _context_place(undo)
    if place is None:
        return undo
    if place.kind == inspect.Parameter.POSITIONAL_ONLY:
        return functools.partial(_with_context, undo)
    return functools.partial(_with_named_context, undo, place.name)


def refuses_value(undo: Callable[..., Any]) -> bool:
    """Return whether a function cannot be called as a compensation; False if it has no signature."""
    return not _can_be_called(undo, _context_place(undo))


def _can_be_called(undo: Callable[..., Any], place: inspect.Parameter | None) -> bool:
    """Return whether a function, not what it wraps, takes a value, and a context in ``place`` if that is given."""
    signature = _signature(undo, follows=False)
    if signature is None:
        return True
    try:
        if place is None:
            signature.bind(None)
        elif place.kind == inspect.Parameter.POSITIONAL_ONLY:
            signature.bind(None, None)
        else:
            signature.bind(None, **{place.name: None})
    except TypeError:
        return False
    return True


def as_handler(catch: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of an error and a task's arguments: ``catch``, adapted if it takes only the error."""
    return catch if _takes(catch, 2) else functools.partial(_error_alone, catch)


def _takes(fn: Callable[..., Any], n_arguments: int) -> bool:
    """Return whether a function takes this many positional arguments; False if it has no signature."""
    signature = _signature(fn)
    if signature is None:
        return False
    parameters = signature.parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= n_arguments or any(p.kind == p.VAR_POSITIONAL for p in parameters)


def _signature(fn: Callable[..., Any], *, follows: bool = True) -> inspect.Signature | None:
    try:
        return inspect.signature(fn, follow_wrapped=follows)
    except (TypeError, ValueError):
        return None


def _context_place(undo: Callable[..., Any]) -> inspect.Parameter | None:
    """Return the parameter of a compensation that gets the context, if there is one."""
    signature = _signature(undo)
    if signature is None:
        return None
    parameters = list(signature.parameters.values())
    at_value = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:1]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter in at_value:
            continue
        if parameter.kind == parameter.POSITIONAL_ONLY and parameter is not parameters[1]:
            continue  # parameters before it have defaults, which they keep
        annotation = parameter.annotation
        is_annotated = annotation is TaskContext or (
            isinstance(annotation, str) and annotation.rpartition(".")[2] == TaskContext.__name__
        )
        if (parameter.name == "context" or is_annotated) and _can_be_called(undo, parameter):
            return parameter
    return None


def _with_context(undo: Callable[..., Any], value: Any) -> Any:
    return undo(value, context())


def _with_named_context(undo: Callable[..., Any], name: str, value: Any) -> Any:
    return undo(value, **{name: context()})


def _error_alone(catch: Callable[..., Any], error: Exception, *_: Any, **__: Any) -> Any:
    return catch(error)
