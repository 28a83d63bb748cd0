"""How figures are taken: interleaved, bounded in time, on warm workers, each in a process of its own.

A process of its own, because systems leave things behind in the one that used them: an event loop's thread that wakes
now and then costs whoever is measured next up to 5 ms, the interpreter's switch interval.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from benchmarks._common import Row
from benchmarks.patterns import Kernel, Pattern, check, noop, stencil
from benchmarks.systems import load
from benchmarks.systems.base import Runner, System

K = TypeVar("K")
T = TypeVar("T")
# What was measured, or why it was not.
Outcome: TypeAlias = list[T] | str

LIMIT_SECONDS = 300.0  # for one figure of one system: a peer that hangs costs a row, not the night
_ROOT = Path(__file__).parents[1]


def compared(systems: Mapping[str, System], repeat: int, figure: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Take a figure of each system that is there: ``figure(key, *arguments)``, see `apart`; give each an `Outcome`."""
    reasons = {key: system.available() for key, system in systems.items()}
    subjects = {key: partial(apart, figure, key, *arguments) for key in systems if not reasons[key]}
    outcomes = tolerant(subjects, repeat)
    return {key: reason or outcomes[key] for key, reason in reasons.items()}


def tolerant(subjects: Mapping[K, Callable[[], T]], repeat: int) -> dict[K, Outcome[T]]:
    """Measure interleaved; a subject that raises `TimeoutError` is not measured again, its outcome says so."""
    given_up: dict[K, str] = {}

    def attempt(key: K) -> T | None:
        if key not in given_up:
            try:
                return subjects[key]()
            except TimeoutError as error:
                given_up[key] = str(error)
        return None

    samples = interleaved({key: partial(attempt, key) for key in subjects}, repeat)
    return {key: given_up.get(key) or cast("list[T]", samples[key]) for key in subjects}


def interleaved(subjects: Mapping[K, Callable[[], T]], repeat: int) -> dict[K, list[T]]:
    """Measure each subject, then each again, so that what else the machine does meets all alike."""
    samples: dict[K, list[T]] = {key: [] for key in subjects}
    for _ in range(repeat):
        for key, subject in subjects.items():
            samples[key].append(subject())
    return samples


@contextmanager
def warm(key: str, workers: int) -> Iterator[Runner]:
    """Open a system and run a small graph on it."""
    with load([key])[key].open(workers) as runner:
        timed_run(runner, stencil(100, 10), noop)
        yield runner


def timed_run(runner: Runner, pattern: Pattern, kernel: Kernel) -> tuple[float, float]:
    """Declare a pattern and run it once; return the seconds each took."""
    gc.collect()
    declaring, declared = timed(runner.declare, pattern, kernel)
    running, last_row = timed(runner.run, declared)
    check(pattern, last_row)
    return declaring, running


def timed(call: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Return the seconds that a call took, and what it returned."""
    start = time.perf_counter()
    value = call(*arguments)
    return time.perf_counter() - start, value


def spread(name: str, samples: Sequence[float]) -> Row:
    """Return the columns of a figure: median, lowest, highest."""
    return {name: statistics.median(samples), "min": min(samples), "max": max(samples)}


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a module's function in a process of its own. Arguments and value are what JSON can say."""
    spec = sys.modules[function.__module__].__spec__  # knows the name of a module that runs as __main__
    assert spec is not None, "run it as a module: python -m ..."
    value: T = run_python("-m", "benchmarks._apart", spec.name, function.__name__, json.dumps(arguments))
    return value


def run_python(*arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Run Python from the repository's root, in a session of its own that ends whole; read its last line as JSON.

    Args:
        arguments: what follows ``python``.
        environment: the variables it gets; None: those of this process.

    Raises:
        RuntimeError: it failed; what it wrote to stderr is shown.
        TimeoutError: it, or a process that it left behind, took longer than `LIMIT_SECONDS`.
    """
    with started(*arguments, environment=environment) as program:
        return finished(program, LIMIT_SECONDS)


@contextmanager
def started(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start Python as `run_python` does; its session ends with the block."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as program:
        try:
            yield program
        finally:
            _end_session(program)


def finished(program: subprocess.Popen[str], limit_seconds: float) -> Any:
    """Wait for what `started` has started; read its last line as JSON. Raises as `run_python` does."""
    try:
        out, error = program.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"not done within {limit_seconds:.0f} s") from None
    if program.returncode:
        arguments = " ".join(map(str, program.args[1:]))  # type: ignore[index]
        raise RuntimeError(f"python {arguments} failed with code {program.returncode}:\n{error}")
    return json.loads(out.splitlines()[-1])


def _end_session(program: subprocess.Popen[str]) -> None:
    """End what is left of a program and what it started; mostly there is nothing."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    elif program.poll() is None:
        program.kill()
