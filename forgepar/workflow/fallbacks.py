"""Fallbacks: what to do after the last attempt of a task failed. A value, a function, more attempts, or a skip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from forgepar._validate import async_error, check_count, check_number, has, is_async, shown
from forgepar.errors import WorkflowError
from forgepar.version import public

_MOST_TIMES = 10_000  # a `Step` is kept for each


class _Missing:
    """Sentinel for no fallback, as None is a valid fallback value."""

    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()


@public
@dataclass(frozen=True, slots=True)
class ValueFallback:
    """Use this value instead of a failed task's. Only needed for values that are callable.

    Attributes:
        value: replaces the return value.
    """

    value: Any


@public
@dataclass(frozen=True, slots=True)
class RetryFallback:
    """Try a failed task again, after its ``retries`` and the fallbacks before this one in a `ChainFallback`.

    Attributes:
        times: the number of further attempts.
        wait: seconds before each of them; no worker is occupied meanwhile.

    Raises:
        WorkflowError: a field is out of range.
    """

    times: int = 1
    wait: float = 0.0

    def __post_init__(self) -> None:
        check_count("times", self.times, 1, _MOST_TIMES, WorkflowError)
        check_number("wait", self.wait, kind=WorkflowError)


@public
@dataclass(frozen=True, slots=True)
class SkipFallback:
    """Skip a failed task and those that depend on it, without failing the run."""


@public
class ChainFallback:
    """Try fallbacks in order until one of them succeeds.

    Args:
        *fallbacks: values, functions, or other fallbacks, in order.

    Example:
        >>> def from_mirror(error, path): ...
        >>> ChainFallback(RetryFallback(2, wait=5.0), from_mirror, None)
        ChainFallback(RetryFallback(times=2, wait=5.0), from_mirror, None)
    """

    def __init__(self, *fallbacks: Any) -> None:
        if not fallbacks:
            raise WorkflowError("ChainFallback() needs at least one fallback, got none.")
        self.fallbacks = fallbacks

    def __repr__(self) -> str:
        return f"ChainFallback({', '.join(map(_described, self.fallbacks))})"


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of handling a failure.

    Attributes:
        kind: "value", "call", "retry" or "skip".
        what: the value or the function.
        wait: seconds before the step.
    """

    kind: Literal["value", "call", "retry", "skip"]
    what: Any = None
    wait: float = 0.0

    def __str__(self) -> str:
        return _described(self.what) if self.kind in ("value", "call") else self.kind


class Steps(tuple[Step, ...]):
    """The steps of handling a failure, in order."""

    __slots__ = ()


NO_STEPS = Steps()


def steps_of(fallback: Any) -> Steps:
    """Return the steps for a task's option ``fallback``."""
    if isinstance(fallback, Steps):
        return fallback
    if fallback is MISSING:
        return NO_STEPS
    if isinstance(fallback, ChainFallback):
        return Steps(step for part in fallback.fallbacks for step in steps_of(part))
    if isinstance(fallback, RetryFallback):
        return Steps([Step("retry", wait=fallback.wait)] * fallback.times)
    if isinstance(fallback, SkipFallback):
        return Steps([Step("skip")])
    if isinstance(fallback, ValueFallback):
        return Steps([Step("value", fallback.value)])
    if is_async(fallback.fn if has(fallback, "fn") else fallback):
        raise async_error("fallback", fallback, WorkflowError)
    return Steps([Step("call" if callable(fallback) else "value", fallback)])


def _described(what: Callable[..., Any] | Any) -> str:
    return getattr(what, "__name__", None) or shown(what)
