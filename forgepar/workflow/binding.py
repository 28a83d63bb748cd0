"""Checks, when a task is declared, that its callable accepts its arguments.

A call is refused only if it would certainly fail. A function is judged by its own code, as the signature that its
decorators report (``__wrapped__``) need not be what it takes. Callables without a signature are accepted.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

_PLAIN = types.FunctionType
_WITH_SIGNATURE = (_PLAIN, types.MethodType, types.BuiltinFunctionType, functools.partial)


def call_error(fn: Callable[..., Any], n_positional: int, keywords: Iterable[str]) -> tuple[str, str] | None:
    """Return why a callable cannot be called with this number of positional arguments and these keywords.

    Args:
        fn: the callable.
        n_positional: the number of positional arguments.
        keywords: the names of the keyword arguments.

    Returns:
        The error's text, and the keyword that the callable does not know ("" for other errors); None if it can be
        called or has no signature.

    Example:
        >>> call_error(lambda x: x, 2, ())
        ('too many positional arguments', '')
        >>> call_error(lambda x: x, 1, ["retries"])
        ("got an unexpected keyword argument 'retries'", 'retries')
    """
    keywords = tuple(keywords)
    if type(fn) is _PLAIN and _fits(fn, n_positional, keywords):
        return None
    signature = _signature(fn)
    if signature is None:
        return None
    try:
        signature.bind(*[None] * n_positional, **dict.fromkeys(keywords))
    except TypeError as error:
        unknown = [name for name in keywords if f"keyword argument '{name}'" in str(error)]
        return str(error), unknown[0] if unknown else ""
    return None


def _fits(fn: types.FunctionType, n_positional: int, keywords: tuple[str, ...]) -> bool:
    """Return whether a function certainly takes these arguments, without making a signature."""
    code = fn.__code__
    if keywords or code.co_kwonlyargcount:
        return False
    n_most = code.co_argcount
    n_least = n_most - len(fn.__defaults__ or ())
    return n_least <= n_positional <= n_most or (n_positional > n_most and bool(code.co_flags & inspect.CO_VARARGS))


def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a callable by its own code; None if that is not certain."""
    try:
        if isinstance(fn, _WITH_SIGNATURE):
            return _signature_of(fn)
        if isinstance(fn, type):
            # A metaclass, or a class with both constructors, may change its arguments.
            made, filled = (inspect.getattr_static(fn, name) for name in ("__new__", "__init__"))
            is_sure = type(fn) is type and made is vars(object)["__new__"] and isinstance(filled, _PLAIN)
            return _without_first(_of_code(filled)) if is_sure else None
        called = type(fn).__call__
        return _without_first(_of_code(called)) if isinstance(called, _PLAIN) else None
    except Exception:  # attributes of a callable may be anything
        return None


def _signature_of(fn: Any) -> inspect.Signature | None:
    if isinstance(fn, _PLAIN):
        return _of_code(fn)
    if isinstance(fn, types.MethodType):
        return _without_first(_of_code(fn.__func__)) if isinstance(fn.__func__, _PLAIN) else None
    if isinstance(fn, functools.partial):
        inner = _signature(fn.func)
        return None if inner is None else _left_after(inner, fn)
    return inspect.signature(fn)


def _of_code(fn: Any) -> inspect.Signature:
    """Return the signature of a function, from its code alone."""
    code = fn.__code__
    kinds = inspect.Parameter
    names = code.co_varnames
    n_all, n_only = code.co_argcount, code.co_posonlyargcount
    first_default = n_all - len(fn.__defaults__ or ())
    parameters = [
        kinds(
            name,
            kinds.POSITIONAL_ONLY if place < n_only else kinds.POSITIONAL_OR_KEYWORD,
            default=None if place >= first_default else kinds.empty,
        )
        for place, name in enumerate(names[:n_all])
    ]
    at = n_all + code.co_kwonlyargcount
    if code.co_flags & inspect.CO_VARARGS:
        parameters.append(kinds(names[at], kinds.VAR_POSITIONAL))
        at += 1
    defaults = fn.__kwdefaults__ or {}
    parameters += [
        kinds(name, kinds.KEYWORD_ONLY, default=None if name in defaults else kinds.empty)
        for name in names[n_all : n_all + code.co_kwonlyargcount]
    ]
    if code.co_flags & inspect.CO_VARKEYWORDS:
        parameters.append(kinds(names[at], kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _without_first(signature: inspect.Signature | None) -> inspect.Signature | None:
    """Return the signature of a method without ``self``."""
    if signature is None:
        return None
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind in (parameters[0].POSITIONAL_ONLY, parameters[0].POSITIONAL_OR_KEYWORD):
        return inspect.Signature(parameters[1:])
    return inspect.Signature(parameters) if parameters and parameters[0].kind == parameters[0].VAR_POSITIONAL else None


def _left_after(inner: inspect.Signature, given: functools.partial[Any]) -> inspect.Signature:
    """Return the signature that a partial leaves; its keyword arguments may be passed again."""
    left = list(inner.parameters.values())
    for _ in given.args:
        if left and left[0].kind in (left[0].POSITIONAL_ONLY, left[0].POSITIONAL_OR_KEYWORD):
            del left[0]
    result, only_keywords = [], False
    for parameter in left:
        if parameter.name in given.keywords and parameter.kind == parameter.POSITIONAL_OR_KEYWORD:
            only_keywords = True
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD and only_keywords:
            parameter = parameter.replace(kind=parameter.KEYWORD_ONLY)
        if parameter.kind == parameter.VAR_POSITIONAL and only_keywords:
            continue
        if parameter.name in given.keywords:
            parameter = parameter.replace(default=None)
        result.append(parameter)
    return inspect.Signature(sorted(result, key=lambda parameter: parameter.kind))
