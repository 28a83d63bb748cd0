"""forgepar with its default schedule: layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.patterns import Kernel, Pattern
from benchmarks.systems.base import Runner

NAME = "forgepar"
TYPICAL_US = 4.0
PARALLEL = True


def available() -> str | None:
    return None


class ForgeparRunner:
    """Runs patterns as workflows.

    Args:
        executor: a `WorkflowExecutor`.
        schedule: "layers" or "eager".
    """

    def __init__(self, executor: Any, schedule: str) -> None:
        self._executor = executor
        self._schedule = schedule
        self.result: Any = None  # held as a caller would hold it, so that memory figures count it

    def declare(self, pattern: Pattern, kernel: Kernel) -> tuple[Any, list[Any]]:
        """Add the tasks one by one; return the workflow and the handles of its last layer."""
        import forgepar as fp

        wf = fp.Workflow(pattern.name)
        handles: list[Any] = []
        for layer in pattern.layers():
            before = handles
            handles = [wf.add(kernel, *[before[i] for i in inputs]) for inputs in layer]
        return wf, handles

    def run(self, declared: tuple[Any, list[Any]]) -> list[int]:
        wf, last_row = declared
        self.result = self._executor.run(wf, schedule=self._schedule)
        return list(self.result[last_row])


@contextmanager
def open(workers: int, schedule: str = "layers") -> Iterator[Runner]:  # noqa: A001
    import forgepar as fp

    with fp.WorkflowExecutor(workers=workers) as executor:
        yield ForgeparRunner(executor, schedule)
