"""How a worker turns the exception of a task into a `Failure` message."""

from __future__ import annotations

import traceback
from collections.abc import Collection

from forgepar._validate import shown
from forgepar.backends.messages import Failure
from forgepar.errors import TaskExited, add_note, text_of
from forgepar.values.codec import ATOMIC

_READ_ONLY = (
    "Large inputs of a task are read-only views of memory that other tasks also read. "
    "Change a copy, array = array.copy(), or have the task receive copies: task(writable=True). "
    "Arrays that the task creates are writable."
)


def failure_of(error: BaseException, position: int, own_files: Collection[str], *, is_unread: bool) -> Failure:
    """Return the message for a task's exception, and drop the frames that the exception refers to.

    Args:
        error: the exception.
        position: the task's position in its batch.
        own_files: source files with frames that the traceback leaves out at its start.
        is_unread: whether an argument could not be unpickled, so that the task was never called.
    """
    _cut_own_frames(error, own_files)
    raised = error
    original: tuple[bytes, str] | None = None
    if not isinstance(error, Exception):
        original = _pickled(error) or b"N.", traceback_of(error)
        error = _stand_in(error)
    if isinstance(error, (ValueError, TypeError)) and "read-only" in text_of(error):
        add_note(error, _READ_ONLY)
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}"
    failure = Failure(position, _pickled(error), name, text_of(error), traceback_of(error), is_unread, original)
    _drop_frames(raised)
    return failure


def traceback_of(error: BaseException) -> str:
    """Return the traceback as Python prints it, or one line if the exception's code fails at that."""
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as fault:
        return f"{type(error).__name__}: {text_of(error)} (printing its traceback raises {type(fault).__name__})\n"


def _stand_in(error: BaseException) -> TaskExited:
    """Return the `TaskExited` for an exception that is not an `Exception`: an `ExceptionGroup` takes no other."""
    if isinstance(error, SystemExit):
        message = f"the task called sys.exit({shown(error.code)}). Return from it, or raise an exception, instead."
        code: object = error.code
    else:
        text = text_of(error)
        message, code = f"the task raised {type(error).__name__}({text}). Raise an Exception instead.", text
    stand_in = TaskExited(message, code=code if type(code) in ATOMIC else repr(code))
    stand_in.__cause__, stand_in.__context__ = error.__cause__, error.__context__
    stand_in.__suppress_context__ = error.__suppress_context__
    if "__notes__" in vars(error):
        stand_in.__notes__ = error.__notes__
    return stand_in.with_traceback(error.__traceback__)


def _pickled(error: BaseException) -> bytes | None:
    """Pickle an exception, or its stand-in; return None if both fail."""
    from forgepar.values.exceptions import dumps as dumps_exception  # most workers never need it

    try:
        return dumps_exception(error)
    except BaseException:  # code of its class may raise anything
        return None


def _cut_own_frames(error: BaseException, own_files: Collection[str]) -> None:
    """Remove frames of these files from the start of the tracebacks of an exception and of those it chains to."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        trace = chain.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in own_files:
            trace = trace.tb_next
        BaseException.with_traceback(chain, trace)  # its class may forbid setting the attribute
        chain = chain.__cause__ if chain.__cause__ is not None else chain.__context__


def _drop_frames(error: BaseException) -> None:
    """Remove the tracebacks of an exception and of all exceptions that it refers to.

    A function with a local variable that refers to its exception is in a reference cycle with it. The cycle would keep
    arguments alive, and segments mapped, until the garbage collector runs, which counts objects and not their bytes.
    """
    from forgepar.values.exception_fields import CAUSE, CONTEXT, MEMBERS  # most workers never need it

    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        one = found.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        BaseException.with_traceback(one, None)
        found += [CAUSE.__get__(one), CONTEXT.__get__(one)]
        if isinstance(one, BaseExceptionGroup):
            found += MEMBERS.__get__(one)
