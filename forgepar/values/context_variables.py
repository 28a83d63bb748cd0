"""Values of context variables of the user's modules: what one has in the caller's context, it has in a worker's.

A variable itself cannot be pickled. Its name is a part of the state of its module (module_state.py); the part has the
value that it has in the context of the thread that calls ``run`` or ``submit``.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeGuard

from forgepar.values.caller_values import KeptAsIs
from forgepar.values.comparison import MISSING

Sent = bytes | KeptAsIs | None  # a pickled value; one that cannot be pickled; none is set
_NEVER = object()  # in place of `Sent`

# By module and name, what this context has been given, and how to unset it. A worker in a thread of another program has
# a context per thread.
_Taken = Mapping[tuple[str, str], tuple[Sent, contextvars.Token[Any] | None]]
_taken: contextvars.ContextVar[_Taken] = contextvars.ContextVar("taken", default=MappingProxyType({}))


def is_context_variable(value: object) -> TypeGuard[contextvars.ContextVar[Any]]:
    """Return whether a value is a context variable."""
    return type(value) is contextvars.ContextVar


def has_value(variable: contextvars.ContextVar[Any], value: Any) -> bool:
    """Return whether a variable has a value in this thread's context; `MISSING` means that none is set."""
    return variable.get(MISSING) is value


def take_value(
    variable: contextvars.ContextVar[Any],
    sent: Sent,
    key: tuple[str, str],
    load: Callable[[bytes], Any],
    *,
    is_new: bool,
) -> None:
    """Give a variable the value that it has in the caller, in this thread's context.

    Args:
        variable: the variable of this process.
        sent: what the caller has set.
        key: module and name of the variable.
        load: unpickles the value.
        is_new: whether the caller has sent it for the first time in a run. If not, a value that a task has set stays.
    """
    taken = _taken.get()
    before, token = taken.get(key, (_NEVER, None))
    if before == sent and not is_new:
        return
    if isinstance(sent, bytes):
        new_token = variable.set(load(sent))
        if token is None and new_token.old_value is contextvars.Token.MISSING:
            token = new_token
    else:
        is_left = not _unset(variable, token) and before is not None  # else a task has set it, and never the caller
        token = None
        if sent is not None or is_left:
            what = f"a {sent.type_name}, which cannot be pickled" if sent is not None else "no value"
            warnings.warn(
                f"The context variable {key[1]!r} of module {key[0]!r} has {what} in the caller. This worker "
                "cannot take that over. Set it inside the task.",
                RuntimeWarning,
                stacklevel=2,
            )
    _taken.set({**taken, key: (sent, token)})


def _unset(variable: contextvars.ContextVar[Any], token: contextvars.Token[Any] | None) -> bool:
    """Unset a variable, or give it its default; return False if neither can be done."""
    if token is not None:
        variable.reset(token)
    elif not has_value(variable, MISSING):  # set when this worker was forked
        try:
            variable.set(contextvars.Context().run(variable.get))
        except LookupError:
            return False
    return True
