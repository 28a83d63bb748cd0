"""What the engine needs to know of tasks, whether they are those of a plan or the jobs of a pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

from forgepar.workflow.tasks import Options

Cell = TypeVar("Cell", covariant=True)


class Column(Protocol[Cell]):
    """One value per template, by its number. Iteration yields those of all templates in use, in any order."""

    def __getitem__(self, template: int, /) -> Cell: ...
    def __iter__(self) -> Iterator[Cell]: ...


class HasOptions(Protocol):
    """What tasks that were declared alike have in common."""

    @property
    def options(self) -> Options:
        """Their options."""


class TaskCatalog(Protocol):
    """Tasks by number, and their templates: a `forgepar.workflow.plan.Plan`, or the job table of a pool.

    Attributes:
        timeouts: by template, how long each of its tasks may take, seconds; None for any time.
        memories: by template, how much memory each of its tasks declares, bytes; 0 for none.
    """

    @property
    def timeouts(self) -> Column[float | None]: ...
    @property
    def memories(self) -> Column[int]: ...

    def spec(self, task: int) -> HasOptions:
        """Return what a task has in common with others."""

    def name(self, task: int) -> str:
        """Return a task's name."""

    def needs(self) -> Iterator[tuple[str, int]]:
        """Yield the name of one task of each template that declares memory, and how much it declares, bytes."""
