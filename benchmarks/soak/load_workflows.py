"""A warm `WorkflowExecutor`: many different workflows, values of all sizes, and all that may go wrong."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import forgepar as fp
from forgepar.records.events import Event, WorkflowTaskParallelCompleted

WORKERS = 2
_WIDTH = 100

Piece = Callable[[int, bool], int]


@contextmanager
def opened() -> Iterator[Sequence[Piece]]:
    """Start the workers; give the pieces of work, each of which returns how many tasks it had."""
    logging.getLogger("soak").addHandler(logging.NullHandler())  # else records are printed
    with fp.WorkflowExecutor(workers=WORKERS) as executor:
        kinds = (
            closures,
            arrays,
            failures,
            retries,
            cancelled,
            timeouts,
            subflows,
            stored,
            killed,
            talk,
            undone,
            eager,
        )
        yield [partial(kind, executor) for kind in kinds]


def closures(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """Functions that are new each time, of small values."""
    workflow = fp.Workflow(f"closures-{number}")
    parts = workflow.map(lambda item: item + number, range(_WIDTH))
    total = workflow.add(lambda values: sum(values) - number, parts)
    assert executor.run(workflow)[total] == sum(range(_WIDTH)) + (_WIDTH - 1) * number
    return _WIDTH + 1


def arrays(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """Values of 0.5 to 4 MiB from task to task, and out; a constant of 2 MiB."""
    constant = np.full(1 << 18, float(number))
    workflow = fp.Workflow("arrays")
    made = workflow.map(lambda n, constant: np.ones(n << 16) * constant[0], range(1, 9), constant=constant)
    total = workflow.add(_sums, made)
    result = executor.run(workflow, outputs=[total, made[7]])
    assert result[total] == sum(range(1, 9)) * (1 << 16) * float(number)
    assert result[made[7]][-1] == number
    return 9


def failures(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """Tasks that raise, some with a large value in their exception, and some after others that return large ones."""
    workflow = fp.Workflow("failures")
    good = workflow.map(np.ones, [1 << 17] * 4)
    workflow.map(_fail, good, number=number)
    workflow.map(abs, range(_WIDTH))
    return _fails(executor, workflow, fail_fast=bool(number % 2))


def retries(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """Tasks of which each fails twice first."""
    workflow = fp.Workflow("retries")
    parts = workflow.map(fp.task(_third_time).options(retries=2), [number] * 8)
    assert executor.run(workflow)[parts[0]] == number
    return 8


def cancelled(executor: fp.WorkflowExecutor, number: int, disturbs: bool) -> int:
    """A run that is called off in its midst, by its own progress."""
    token = fp.CancellationToken()
    workflow = fp.Workflow("cancelled")
    first = workflow.map(np.ones, [1 << 15] * 4)
    second = workflow.map(lambda array: float(array.sum()) + number, first)
    workflow.map(abs, second)

    def call_off(event: Event) -> None:
        if isinstance(event, WorkflowTaskParallelCompleted):  # the first layer is done
            token.cancel(kill=disturbs)

    assert executor.run(workflow, audit=call_off, cancel=token).status == "cancelled"
    return len(workflow)


def timeouts(executor: fp.WorkflowExecutor, number: int, disturbs: bool) -> int:
    """A task over its time, beside others that go on; undisturbed, one that is well within it."""
    workflow = fp.Workflow("timeouts")
    workflow.map(abs, range(number % 10, _WIDTH))
    workflow.add(fp.task(_hang if disturbs else _wait).options(timeout=0.05 if disturbs else 60.0))
    if disturbs:
        return _fails(executor, workflow, fail_fast=False)
    executor.run(workflow)
    return len(workflow)


def subflows(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """Workflows that tasks make, and tasks for each item of a list that a task makes."""
    workflow = fp.Workflow("subflows")
    whole = workflow.add(_halves, 64 + number % 64)
    items = workflow.add(lambda n: list(range(n)), 10 + number % 10)
    squares = workflow.map(lambda item: item * item, items)
    result = executor.run(workflow, outputs=[whole, squares])
    assert result[whole] == 64 + number % 64
    return len(result.records)


def stored(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """A run with a store in a temporary folder, taken up once."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            workflow = fp.Workflow("stored")
            parts = workflow.map(lambda item: np.full(1 << 13, float(item + number)), range(8))
            total = workflow.add(_sums, parts)
            result = executor.run(workflow, store=Path(folder, "runs.db"), resume=True)
            assert result[total] == (sum(range(8)) + 8 * number) * (1 << 13)
            del result
    return 18


def killed(executor: fp.WorkflowExecutor, number: int, disturbs: bool) -> int:
    """A worker that dies once while it makes large values."""
    with tempfile.TemporaryDirectory() as folder:
        workflow = fp.Workflow("killed")
        made = workflow.map(np.ones, [1 << 17] * 8)
        last = workflow.add(fp.task(_die_once).options(retries=1), Path(folder, "died"), number, disturbs, made)
        assert executor.run(workflow)[last] == number
    return 9


def talk(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """Tasks that print, log and warn."""
    lines: list[str] = []
    workflow = fp.Workflow("talk")
    workflow.map(_talk, range(20), number=number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor.run(workflow, show=lambda *line: lines.append(str(line)))
    assert len(lines) >= 20
    return 20


def undone(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """A run that fails and is rolled back."""
    workflow = fp.Workflow("undone")
    made = workflow.map(fp.task(np.ones).options(compensate=_undo), [1 << 14] * 8)
    workflow.add(_fail, made, number=number)
    return _fails(executor, workflow)


def eager(executor: fp.WorkflowExecutor, number: int, _: bool) -> int:
    """Chains side by side without barriers, with the value of every task."""
    workflow = fp.Workflow("eager")
    for chain in range(8):
        handle = workflow.add(np.full, 1 << 12, float(number))
        for _step in range(10):
            handle = workflow.add(lambda array, chain=chain: array + chain, handle)
    result = executor.run(workflow, schedule="eager", outputs="all")
    assert result[handle][0] == number + 70
    return len(workflow)


KINDS = (closures, arrays, failures, retries, cancelled, timeouts, subflows, stored, killed, talk, undone, eager)


def _fails(executor: fp.WorkflowExecutor, workflow: fp.Workflow, **rules: Any) -> int:
    try:
        executor.run(workflow, **rules)
    except fp.WorkflowFailed:
        return len(workflow)
    raise AssertionError("no task failed")


def _sums(arrays: list[np.ndarray]) -> float:
    return float(sum(array.sum() for array in arrays))


def _fail(value: Any, number: int) -> None:
    error = ValueError(f"no {number}")
    error.value = np.asarray(value) + 1  # type: ignore[attr-defined]
    raise error


def _third_time(number: int) -> int:
    if fp.context().attempt < 3:
        raise ConnectionError(number)
    return number


def _hang() -> None:
    threading.Event().wait()


def _wait() -> None:
    threading.Event().wait(0.005)


def _halves(n: int) -> Any:
    if n < 8:
        return n
    inner = fp.Workflow()
    return fp.Subflow(inner, inner.add(sum, inner.map(_halves, [n // 2, n - n // 2])))


def _die_once(path: Path, number: int, disturbs: bool, _made: list[np.ndarray]) -> int:
    if disturbs and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def _talk(item: int, number: int) -> None:
    print(f"item {item} of {number}")
    logging.getLogger(f"soak.{item}").warning("item %d of %d", item, number)
    warnings.warn(f"item {item} of {number}", stacklevel=1)


def _undo(_value: Any) -> None:
    pass
