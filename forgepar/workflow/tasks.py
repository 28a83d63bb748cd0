"""Callables with options, and the names that tasks derive from them."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, ParamSpec, TypeVar, overload

from forgepar._validate import (
    as_list,
    check_callable,
    check_count,
    check_flag,
    check_instance,
    check_number,
    check_seconds,
    check_text,
    is_number,
    refusal,
    shown,
)
from forgepar.errors import WorkerDied, WorkflowError
from forgepar.machine import as_bytes
from forgepar.version import public
from forgepar.workflow.adapters import refuses_value
from forgepar.workflow.fallbacks import MISSING, steps_of
from forgepar.workflow.handles import TaskHandle, TaskHandles

P = ParamSpec("P")
R = TypeVar("R")
_LONGEST_WAIT_SECONDS = 1e9  # 31 years; sums of times up to this keep fractions of a second
_OWN_RETRIES = 3  # of this package's own functions, after the death of a worker
_OF_COMPENSATIONS = ("timeout", "retries", "backoff", "retry_on")  # options that the task of a compensation may have
_HANDLES = "a handle or several, as Workflow.add and Workflow.map return them"
_PLAIN = {types.FunctionType, types.BuiltinFunctionType, types.MethodType, type}


@public
@dataclass(frozen=True, slots=True)
class Backoff:
    """Wait before each retry of a task. No worker is occupied meanwhile.

    Attributes:
        seconds: the wait before the second attempt.
        factor: each further wait is this many times the one before.
        jitter: fraction of the wait, 0 to 1, by which a random number lengthens or shortens it; the run's seed decides.
        most_seconds: the longest wait, jitter included.

    Raises:
        WorkflowError: a field is out of range.

    Example:
        >>> Backoff(0.5).wait_seconds(3)
        2.0
    """

    seconds: float
    factor: float = 2.0
    jitter: float = 0.0
    most_seconds: float = 300.0

    def __post_init__(self) -> None:
        check_number("seconds of Backoff", self.seconds, kind=WorkflowError)
        check_number("factor of Backoff", self.factor, kind=WorkflowError)
        check_number("most_seconds of Backoff", self.most_seconds, kind=WorkflowError, may_be_inf=True)
        check_number("jitter of Backoff", self.jitter, 0, 1, WorkflowError)

    def wait_seconds(self, attempt: int, chance: float = 0.5) -> float:
        """Return the wait after an attempt, counted from 1; ``chance`` is a random number from 0 to 1."""
        check_count("attempt", attempt, kind=WorkflowError)
        check_number("chance", chance, 0, 1, WorkflowError)
        attempt = int(attempt)  # a numpy integer would overflow in the power
        most = min(self.most_seconds, _LONGEST_WAIT_SECONDS)
        try:
            wait = min(self.seconds * float(self.factor) ** (attempt - 1), most)
        except OverflowError:
            wait = most if self.seconds else 0.0
        return float(min(wait * (1 + self.jitter * (2 * chance - 1)), most))


@public
@dataclass(frozen=True, slots=True)
class Options:
    """Options of a task: how to run it, beside its function and arguments.

    Attributes:
        name: the task's name; for `Workflow.map`, the first part of its tasks' names. None to derive it from the
            callable.
        after: tasks that must be done before, without taking their values.
        retries: how many more times to try the task after a failure.
        backoff: the wait before each retry; a number stands for a `Backoff` of that many seconds.
        retry_on: exception classes that are retried; all by default, `TaskTimeout` and `WorkerDied` included.
        timeout: seconds that an attempt may take, after which its worker is killed; None for no limit.
        memory: the most memory that an attempt takes, in bytes or as a string such as "2GiB". Tasks that run at once
            never declare more together than is available, and a task that exceeds it is killed. None for no limit.
        effects: whether the task changes something outside of the run, such as files or tables. `Workflow.check` then
            asks for a ``compensate``.
        compensate: a function that undoes the task, given its value; a parameter that is named ``context`` or annotated
            as `TaskContext` gets that. Called on a worker if the run fails or is cancelled after the task completed.
            A `Task` may have its own ``timeout``, ``retries``, ``backoff`` and ``retry_on``; a function has the
            timeout of the task.
        fallback: what to do after the last attempt failed: a value to use instead; a function of the error, or of the
            error and the task's arguments, whose return value is used instead; or a `RetryFallback`, `SkipFallback` or
            `ChainFallback`.
        cache: whether a run store keeps the task's value, so that a resumed run need not run the task. If not, the task
            and all that depend on it run each time.
        version: a number or string to change when the task must run again although its code looks the same. It also
            stands for parts of the code that cannot be compared (a global lock, an open file).
        writable: whether arrays in the arguments are private copies that the task may write to. If not, large arrays
            are read-only views of memory that other tasks read as well.
    """

    name: str | None = None
    after: tuple[TaskHandle | TaskHandles, ...] = ()
    retries: int = 0
    backoff: Backoff = Backoff(0.0)
    retry_on: tuple[type[Exception], ...] = (Exception,)
    timeout: float | None = None
    memory: int | None = None
    effects: bool = False
    compensate: Callable[..., Any] | None = None
    fallback: Any = MISSING
    cache: bool = True
    version: int | str | None = None
    writable: bool = False

    def __post_init__(self) -> None:
        check_count("retries", self.retries, 0, kind=WorkflowError)
        for name in ("cache", "writable", "effects"):
            check_flag(name, getattr(self, name), WorkflowError)
            object.__setattr__(self, name, bool(getattr(self, name)))  # numpy bools become Python's
        object.__setattr__(self, "retries", int(self.retries))
        if self.version is not None:
            check_instance("version", self.version, (int, str), "a number, a string or None", WorkflowError)
        if self.name is not None:
            check_text("name", self.name, WorkflowError)
        self._check_retrying()
        given: Any = self.after
        is_one = isinstance(given, (TaskHandle, TaskHandles)) or not isinstance(given, Iterable)
        after = (given,) if is_one else tuple(as_list("after", given, _HANDLES, WorkflowError))
        for handle in after:
            check_instance("after", handle, (TaskHandle, TaskHandles), _HANDLES, WorkflowError)
        object.__setattr__(self, "after", after)

    def _check_retrying(self) -> None:
        backoff: Any = self.backoff
        if is_number(backoff) and backoff >= 0:
            object.__setattr__(self, "backoff", Backoff(backoff))
        else:
            check_instance("backoff", backoff, Backoff, "a non-negative number of seconds, or a Backoff", WorkflowError)
        given: Any = self.retry_on
        is_one = isinstance(given, type) or not isinstance(given, Iterable)
        kinds: Any = (given,) if is_one else tuple(as_list("retry_on", given, "exception classes", WorkflowError))
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise refusal("retry_on", "one or more exception classes", self.retry_on, WorkflowError)
        object.__setattr__(self, "retry_on", kinds)
        object.__setattr__(self, "timeout", check_seconds("timeout", self.timeout, WorkflowError))
        if self.memory is not None:
            object.__setattr__(self, "memory", as_bytes(self.memory, "memory", WorkflowError, least=1))
        object.__setattr__(self, "fallback", steps_of(self.fallback))
        if self.compensate is not None:
            self._check_compensate(self.compensate)

    def _check_compensate(self, undo: Any) -> None:
        fn = undo.fn if isinstance(undo, Task) else undo
        check_callable("compensate", fn, WorkflowError)
        if refuses_value(fn):
            raise WorkflowError(
                f"compensate must be callable with the task's value alone, got {shown(undo)}. Pass a function of the "
                "value; or of the value and a parameter context=, which gets the TaskContext; or a command line with "
                "one field, such as shell('rm {path}')."
            )
        if isinstance(undo, Task):
            plain = Options()
            for field in fields(Options):
                given = getattr(undo.task_options, field.name)
                if field.name not in _OF_COMPENSATIONS and given != getattr(plain, field.name):
                    raise WorkflowError(
                        f"compensate must have no options except {', '.join(_OF_COMPENSATIONS)}; got {shown(undo)} "
                        f"with the option {field.name}=."
                    )


@public
class Task(Generic[P, R]):
    """A callable with options; calling it calls the callable.

    Made by `task`. Type checkers see the parameters and the return type of ``fn``.

    Args:
        fn: any callable.
        options: its options.
    """

    __forgepar_named__ = True  # pickled by name if its module has it under its name; see values/by_value.py

    def __init__(self, fn: Callable[P, R], options: Options) -> None:
        check_callable("fn", fn, WorkflowError)
        check_instance("options", options, Options, "forgepar.Options", WorkflowError)
        self.__qualname__ = ""  # replaced by the function's, if it has one
        functools.update_wrapper(self, fn, updated=())  # without its attributes, which could hide a task's methods
        self.fn = fn
        self.task_options = options

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"task({base_name(self.fn)})"

    def options(self, **changes: Any) -> Task[P, R]:
        """Return a task of the same callable with some options changed.

        Args:
            **changes: fields of `Options`: ``name``, ``after``, ``retries``, ``backoff``, ``retry_on``, ``timeout``,
                ``memory``, ``effects``, ``compensate``, ``fallback``, ``cache``, ``version``, ``writable``.

        Raises:
            WorkflowError: there is no such option, or it cannot have this value.

        Example:
            >>> def load(path): ...
            >>> task(load).options(name="first", retries=2).task_options.retries
            2
        """
        return Task(self.fn, _changed(self.task_options, changes))

    def portable(self) -> Callable[..., Any]:
        """Return what to pickle for a worker: this task if its module has it under its name, else the function."""
        return self.fn if _find_by_name(self) is None else self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by name if the module has this task, or the task it was derived from, under its name."""
        home = _find_by_name(self)
        if home is self:
            return self.__qualname__
        if home is not None:
            return _with_options, (home, self.task_options)
        return super().__reduce_ex__(protocol)


@overload
def task(fn: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]: ...
@public
def task(fn: Callable[P, R] | None = None, /, **options: Any) -> Any:
    """Attach options to a function for when it runs as a task. Direct calls are not affected.

    Args:
        fn: any callable; omitted in ``@task(...)``.
        **options: fields of `Options`: ``name``, ``after``, ``retries``, ``backoff``, ``retry_on``, ``timeout``,
            ``memory``, ``effects``, ``compensate``, ``fallback``, ``cache``, ``version``, ``writable``.

    Returns:
        A `Task`, or a decorator that makes one.

    Raises:
        WorkflowError: there is no such option, or it cannot have this value.

    Example:
        >>> @task(retries=2)
        ... def double(x):
        ...     return 2 * x
        >>> double(4)
        8
    """
    if fn is None:
        return functools.partial(task, **options)
    if isinstance(fn, Task):
        return fn.options(**options)
    check_callable("fn", fn, WorkflowError)
    return Task(fn, _changed(Options(), options))


def own_task(fn: Callable[P, R]) -> Task[P, R]:
    """Make a task of one of this package's own functions, which a workflow has beside those of its user.

    It has no effects, so the death of a worker that runs it does not fail a run in which all tasks are retried.
    """
    return task(fn).options(retries=_OWN_RETRIES, retry_on=WorkerDied)


@public
def attempt(fn: Callable[P, R], /, catch: Callable[..., R]) -> Task[P, R]:
    """Attach a function that handles the errors of another; its return value replaces the failed call's.

    The same as ``task(fn).options(fallback=catch)``. ``catch`` is called on a worker after the task's ``retries``, for
    any kind of failure: an exception, the death of the worker, a timeout.

    Args:
        fn: any callable, or a `Task`.
        catch: a function of the error, or of the error and the task's arguments.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> number = wf.add(attempt(int, catch=lambda error: -1), "seven")
        >>> wf.run(backend="inline")[number]
        -1
    """
    check_callable("fn", fn, WorkflowError)
    check_callable("catch", catch, WorkflowError)
    return task(fn).options(fallback=catch)


def base_name(fn: Callable[..., Any]) -> str:
    """Derive a task name from a callable: its name, that of a partial's function, or that of an instance's class."""
    while isinstance(fn, (functools.partial, functools.partialmethod, Task)):
        fn = fn.func if not isinstance(fn, Task) else fn.fn
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return "lambda" if name == "<lambda>" else str(name)


def is_prepared(fn: Callable[..., Any]) -> bool:
    """Return whether a callable carries arguments of its own, which may be handles; it needs `unfold`."""
    kind = type(fn)
    return kind not in _PLAIN and hasattr(kind, "__forgepar_call__")  # hasattr takes 0.6 us if it is absent


def unfold(
    fn: Callable[..., Any], n_positional: int, keywords: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the callable to call instead of a prepared one (or a task of one), and all its keyword arguments.

    Only a task's arguments are searched for handles, so handles in the callable must become arguments.

    Args:
        fn: a callable with a method ``__forgepar_call__``, which gets the other two arguments.
        n_positional: the number of positional arguments of the call.
        keywords: the keyword arguments of the call.

    Raises:
        WorkflowError: the callable does not take these arguments.
    """
    prepared: Any = fn.fn if isinstance(fn, Task) else fn
    plain, completed = prepared.__forgepar_call__(n_positional, keywords)
    return Task(plain, fn.task_options) if isinstance(fn, Task) else plain, completed


def _changed(options: Options, changes: Mapping[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    for name in changes:
        if name not in known:
            raise WorkflowError(
                f"Tasks have no option {name}=. The options are {', '.join(known)}. "
                "Pass arguments of the function to Workflow.add."
            )
    return replace(options, **changes)


def _with_options(home: Task[..., Any], options: Options) -> Task[..., Any]:
    return Task(home.fn, options)


def _find_by_name(given: Task[..., Any]) -> Task[..., Any] | None:
    """Return the task of the same callable that its module has under its name, if workers can import the module."""
    module = sys.modules.get(given.__module__)
    if module is None or given.__module__ == "__main__":
        return None
    found: Any = module
    for part in given.__qualname__.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Task) and found.fn is given.fn else None
