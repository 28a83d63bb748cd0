"""Callables with options, and the names that tasks derive from them."""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, ParamSpec, TypeVar, overload

from forgepar.adapters import refuses_value
from forgepar.errors import WorkerDied, WorkflowError
from forgepar.fallbacks import MISSING, steps_of
from forgepar.handles import TaskHandle, TaskHandles
from forgepar.machine import as_bytes
from forgepar.validation import check_callable, check_instance, check_seconds, is_count, is_flag, is_number, shown

P = ParamSpec("P")
R = TypeVar("R")
_LONGEST_WAIT_SECONDS = 1e9  # thirty years; sums of times keep their fractions of a second
_OWN_RETRIES = 3  # of this package's own functions, after the death of a worker
_OF_COMPENSATIONS = ("timeout", "retries", "backoff", "retry_on")  # options that what undoes a task may have
_PLAIN = {types.FunctionType, types.BuiltinFunctionType, types.MethodType, type}


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a task that failed waits before it is tried again; no worker waits with it.

    Attributes:
        seconds: before the second attempt.
        factor: each wait is so many times the one before.
        jitter: share of the wait, 0 to 1, that chance adds or takes away; the run's seed decides.
        most_seconds: no wait is longer, whatever chance adds.

    Raises:
        WorkflowError: a field is out of its range.

    Example:
        >>> Backoff(0.5).wait_seconds(3)
        2.0
    """

    seconds: float
    factor: float = 2.0
    jitter: float = 0.0
    most_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("seconds", "factor", "most_seconds"):
            value = getattr(self, name)
            is_endless = name != "most_seconds" and value == math.inf
            if not is_number(value) or value < 0 or is_endless:
                raise WorkflowError(f"Backoff({name}={shown(value)}) is no wait. Give a number from 0.")
        if not is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise WorkflowError(f"Backoff(jitter={self.jitter!r}) is no share. Give a number from 0 to 1.")

    def wait_seconds(self, attempt: int, chance: float = 0.5) -> float:
        """Return the wait after an attempt, counted from 1; `chance` is from 0 to 1."""
        if not is_count(attempt, 1) or not is_number(chance) or not 0 <= chance <= 1:
            raise WorkflowError(
                f"attempt and chance must be a count from 1 and a number from 0 to 1, got {shown(attempt)} and "
                f"{shown(chance)}."
            )
        most = min(self.most_seconds, _LONGEST_WAIT_SECONDS)
        try:
            wait = min(self.seconds * float(self.factor) ** (attempt - 1), most)
        except OverflowError:
            wait = most if self.seconds else 0.0
        return float(min(wait * (1 + self.jitter * (2 * chance - 1)), most))


@dataclass(frozen=True, slots=True)
class Options:
    """What a task is told beside its arguments.

    Attributes:
        name: the task's name; for `Workflow.map`, what its tasks' names begin with. None: derived from the callable.
        after: tasks that must be done before, though none of their values is taken.
        retries: how many more times a task that fails is tried.
        backoff: how long it waits before; a number stands for a `Backoff` of so many seconds.
        retry_on: which exceptions are worth another try; all by default. `TaskTimeout` and `WorkerDied` are such, too.
        timeout: seconds that an attempt may take on its worker, which is ended after them; None: any number.
        memory: bytes, or text such as "2GiB", that an attempt takes at most. Tasks that run at once never declare more
            together than can be had, and one that takes more is ended. None: it declares nothing and is not limited.
        effects: whether it changes something outside of the run: files, tables. `Workflow.check` asks for a
            `compensate` of such.
        compensate: undoes what the task did, given its value; a parameter called ``context``, or annotated as
            `TaskContext`, gets that. Called on a worker when the run fails or is called off after the task was done.
            A `Task` may have ``timeout``, ``retries``, ``backoff`` and ``retry_on`` of its own; a function has the
            timeout of the task.
        fallback: what to do when the task failed for good: a value to have instead; a function of the error, or of the
            error and the task's arguments, whose value to have instead; or a `RetryFallback`, `SkipFallback`,
            `ChainFallback`.
        cache: whether a run store keeps the task's value, so that a resumed run need not run it; without, the task and
            all that follows it run each time.
        version: number or text that stands for what its code does not tell: a change of it has the task run again, and
            what of its code cannot be compared (a global lock, an open file) is left to it.
        writable: whether arrays among its arguments are private copies, which it may write to. Without, large ones are
            read-only views of memory that other tasks read as well.
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
        if not is_count(self.retries):
            raise WorkflowError(f"retries={self.retries!r} is not a count. Give 0 or more.")
        for name in ("cache", "writable", "effects"):
            if not is_flag(getattr(self, name)):
                raise WorkflowError(f"{name}={getattr(self, name)!r} is neither True nor False. Give one of them.")
        if self.version is not None and not isinstance(self.version, (int, str)):
            raise WorkflowError(f"version={self.version!r} is no version. Give a number or text, or None.")
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise WorkflowError(f"name={self.name!r} cannot name a task. Give a string that is not empty.")
        self._check_retrying()
        given: Any = self.after
        is_one = isinstance(given, (TaskHandle, TaskHandles)) or not isinstance(given, Iterable)
        after = (given,) if is_one else tuple(given)
        for handle in after:
            if not isinstance(handle, (TaskHandle, TaskHandles)):
                raise WorkflowError(
                    f"after= holds {handle!r}, which is no handle. Give what Workflow.add or map returned."
                )
        object.__setattr__(self, "after", after)

    def _check_retrying(self) -> None:
        backoff: Any = self.backoff
        if is_number(backoff) and backoff >= 0:
            object.__setattr__(self, "backoff", Backoff(backoff))
        elif not isinstance(backoff, Backoff):
            raise WorkflowError(f"backoff={shown(backoff)} is no wait. Give seconds or a Backoff.")
        given: Any = self.retry_on
        is_one = isinstance(given, type) or not isinstance(given, Iterable)
        kinds: Any = (given,) if is_one else tuple(given)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise WorkflowError(f"retry_on={self.retry_on!r} is not made of exception classes. Give one or several.")
        object.__setattr__(self, "retry_on", kinds)
        if self.timeout is not None and (not is_number(self.timeout) or not self.timeout > 0):
            raise WorkflowError(f"timeout={self.timeout!r} is no time. Give seconds above 0, or None.")
        object.__setattr__(self, "timeout", check_seconds("timeout", self.timeout))
        self._check_memory()
        object.__setattr__(self, "fallback", steps_of(self.fallback))
        if self.compensate is not None:
            self._check_compensate(self.compensate)

    def _check_compensate(self, undo: Any) -> None:
        if not callable(undo):
            raise WorkflowError(f"compensate={undo!r} cannot be called. Give a function of the task's value.")
        if refuses_value(undo.fn if isinstance(undo, Task) else undo):
            raise WorkflowError(
                f"compensate={undo!r} cannot be called with the task's value alone. Give a function of that, such as "
                "lambda value: ...; of the value and a parameter context=, which gets the TaskContext; or a command "
                "line with one field, such as shell('rm {path}')."
            )
        if isinstance(undo, Task):
            plain = Options()
            for field in fields(Options):
                given = getattr(undo.task_options, field.name)
                if field.name not in _OF_COMPENSATIONS and given != getattr(plain, field.name):
                    raise WorkflowError(
                        f"compensate={undo!r} has the option {field.name}=, which is none of what undoes a task. Give "
                        f"it {', '.join(_OF_COMPENSATIONS)} alone."
                    )

    def _check_memory(self) -> None:
        if self.memory is not None:
            try:
                object.__setattr__(self, "memory", as_bytes(self.memory))
            except ValueError as error:
                raise WorkflowError(f"memory= of a task: {error}") from None
            if not self.memory:
                raise WorkflowError("memory=0 is none at all. Give bytes above 0, text such as '2GiB', or None.")


class Task(Generic[P, R]):
    """A callable with options; calling it calls the callable.

    Made by `task`. Functions that take or return tasks keep their types: ``Task[P, R]`` is callable as ``fn`` was.

    Args:
        fn: any callable.
        options: its options.
    """

    __forgepar_named__ = True  # a module may have it under its name; see byvalue.py

    def __init__(self, fn: Callable[P, R], options: Options) -> None:
        check_callable("fn", fn, WorkflowError)
        check_instance("options", options, Options, "forgepar.Options", WorkflowError)
        self.__qualname__ = ""  # as the function's, where it has one
        functools.update_wrapper(self, fn, updated=())  # its attributes are its own: they could hide a task's methods
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
            WorkflowError: an option of another name, or a value it cannot have.

        Example:
            >>> def load(path): ...
            >>> task(load).options(name="first", retries=2).task_options.retries
            2
        """
        return Task(self.fn, _changed(self.task_options, changes))

    def portable(self) -> Callable[..., Any]:
        """Return what to pickle for a worker: this task if its module has it, as the function's name means it there."""
        return self.fn if _find_by_name(self) is None else self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by name where the module has this task, or the task it was derived from, under its name."""
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
def task(fn: Callable[P, R] | None = None, /, **options: Any) -> Any:
    """Give a function options for when it runs as a task; called directly, it is as it was.

    Args:
        fn: any callable; left out in ``@task(...)``.
        **options: fields of `Options`: ``name``, ``after``, ``retries``, ``backoff``, ``retry_on``, ``timeout``,
            ``memory``, ``effects``, ``compensate``, ``fallback``, ``cache``, ``version``, ``writable``.

    Returns:
        A `Task`, or a decorator that makes one.

    Raises:
        WorkflowError: an option of another name, or a value it cannot have.

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
    if not callable(fn):
        raise WorkflowError(f"fn={shown(fn)} cannot be a task: it is not callable. Give a function.")
    return Task(fn, _changed(Options(), options))


def own_task(fn: Callable[P, R]) -> Task[P, R]:
    """Give one of this package's own functions the options of a task that a workflow gets beside those of its user.

    It has no effects, so the death of a worker under it is no reason to fail a run whose tasks may all be retried.
    """
    return task(fn).options(retries=_OWN_RETRIES, retry_on=WorkerDied)


def attempt(fn: Callable[P, R], /, catch: Callable[..., R]) -> Task[P, R]:
    """Give a function another one that gets its error, and whose value stands for its own then.

    The same as ``task(fn).options(fallback=catch)``. It is called on a worker, after the task's ``retries``, whatever
    the task ended by: an exception, the death of its worker, a timeout.

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
    """Derive a task name from a callable: its own name, a partial's function's, an instance's class's."""
    while isinstance(fn, (functools.partial, functools.partialmethod, Task)):
        fn = fn.func if not isinstance(fn, Task) else fn.fn
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return "lambda" if name == "<lambda>" else str(name)


def is_prepared(fn: Callable[..., Any]) -> bool:
    """Tell whether a callable carries arguments of its own, which may be handles; `unfold` is for such."""
    kind = type(fn)
    return kind not in _PLAIN and hasattr(kind, "__forgepar_call__")  # to find that it is not there takes 0.6 us


def unfold(
    fn: Callable[..., Any], n_positional: int, keywords: Mapping[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what a prepared callable, or a task of one, has called in its place, and all keyword arguments of that.

    Handles in a callable would not be found, as only a task's arguments are searched for them.

    Args:
        fn: has a method ``__forgepar_call__``, which gets the other two.
        n_positional: how many positional arguments it is given.
        keywords: what it is given by keyword.

    Raises:
        WorkflowError: it refuses these arguments.
    """
    prepared: Any = fn.fn if isinstance(fn, Task) else fn
    plain, completed = prepared.__forgepar_call__(n_positional, keywords)
    return Task(plain, fn.task_options) if isinstance(fn, Task) else plain, completed


def _changed(options: Options, changes: Mapping[str, Any]) -> Options:
    known = [field.name for field in fields(Options)]
    for name in changes:
        if name not in known:
            raise WorkflowError(
                f"{name}= is no option of a task; there are {', '.join(known)}. "
                "The function's own arguments go to Workflow.add."
            )
    return replace(options, **changes)


def _with_options(home: Task[..., Any], options: Options) -> Task[..., Any]:
    return Task(home.fn, options)


def _find_by_name(given: Task[..., Any]) -> Task[..., Any] | None:
    """Return the task of the same callable that its module has under its name, if workers can import that module."""
    module = sys.modules.get(given.__module__)
    if module is None or given.__module__ == "__main__":
        return None
    found: Any = module
    for part in given.__qualname__.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Task) and found.fn is given.fn else None
