"""What stands in for a task that failed for good: another value, a function, another try, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from forgepar.errors import WorkflowError
from forgepar.validation import is_count, is_number

_MOST_TIMES = 10_000  # a step each is remembered


class _Missing:
    """Says that no fallback was given, as None is a value like any other."""

    def __repr__(self) -> str:
        return "MISSING"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()


@dataclass(frozen=True, slots=True)
class ValueFallback:
    """Let a task that failed have this value; only needed where the value is itself callable.

    Attributes:
        value: stands for what the task would have returned.
    """

    value: Any


@dataclass(frozen=True, slots=True)
class RetryFallback:
    """Try a task that failed again, after its ``retries`` and whatever stands before this in a `ChainFallback`.

    Attributes:
        times: how often.
        wait: seconds before each try; no worker waits with it.

    Raises:
        WorkflowError: a count or a wait that cannot be.
    """

    times: int = 1
    wait: float = 0.0

    def __post_init__(self) -> None:
        if not is_count(self.times, 1) or self.times > _MOST_TIMES:
            raise WorkflowError(f"RetryFallback(times={self.times!r}) is no count. Give 1 to {_MOST_TIMES}.")
        if not is_number(self.wait) or not 0 <= self.wait < math.inf:
            raise WorkflowError(f"RetryFallback(wait={self.wait!r}) is no wait. Give seconds from 0.")


@dataclass(frozen=True, slots=True)
class SkipFallback:
    """Leave out a task that failed, and what waits for it, without failing the run."""


class ChainFallback:
    """Try fallbacks one after the other until one of them does not fail.

    Args:
        *fallbacks: values, functions, or other fallbacks, in order.

    Example:
        >>> def from_mirror(error, path): ...
        >>> ChainFallback(RetryFallback(2, wait=5.0), from_mirror, None)
        ChainFallback(RetryFallback(times=2, wait=5.0), from_mirror, None)
    """

    def __init__(self, *fallbacks: Any) -> None:
        if not fallbacks:
            raise WorkflowError("ChainFallback() has nothing to try. Give it fallbacks, or leave it out.")
        self.fallbacks = fallbacks

    def __repr__(self) -> str:
        return f"ChainFallback({', '.join(map(_described, self.fallbacks))})"


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One thing to do about a failure.

    Attributes:
        kind: "value", "call", "retry" or "skip".
        what: the value, or the function.
        wait: seconds before it.
    """

    kind: Literal["value", "call", "retry", "skip"]
    what: Any = None
    wait: float = 0.0

    def __str__(self) -> str:
        return _described(self.what) if self.kind in ("value", "call") else self.kind


class Steps(tuple[Step, ...]):
    """All that is to be done about a failure, in order."""

    __slots__ = ()


NO_STEPS = Steps()


def steps_of(fallback: Any) -> Steps:
    """Return what a task's option ``fallback`` asks for, step by step."""
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
    return Steps([Step("call" if callable(fallback) else "value", fallback)])


def _described(what: Callable[..., Any] | Any) -> str:
    return getattr(what, "__name__", None) or repr(what)
