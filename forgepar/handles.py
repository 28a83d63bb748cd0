"""What stands for a task's value while a workflow is declared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, overload

from forgepar.errors import ForeignHandle, WorkflowError


class Owner(Protocol):
    """The workflow that a handle belongs to, as far as a handle needs to know it."""

    name: str
    identity: bytes

    def task_name(self, index: int) -> str:
        """Return the name of a task from its number."""

    def take_item(self, handle: TaskHandle, index: Any) -> TaskHandle:
        """Add a task that takes an item of a task's value."""


class TaskHandle:
    """Stands for a task's value while a workflow is declared; made by `Workflow.add`.

    A handle inside another task's arguments makes that task wait for this one and get its value in its place.
    """

    __slots__ = ("index", "workflow")

    def __init__(self, workflow: Owner, index: int) -> None:
        self.workflow = workflow
        self.index = index

    @property
    def name(self) -> str:
        """The task's name."""
        return self.workflow.task_name(self.index)

    def __repr__(self) -> str:
        return f"<TaskHandle {self.name!r}>"

    __iter__ = None  # else to iterate would add a task for each item, without end

    def __getitem__(self, index: Any) -> TaskHandle:
        """Add a task that takes an item of this one's value; the index may be a handle as well."""
        return self.workflow.take_item(self, index)

    def __bool__(self) -> bool:
        raise WorkflowError(
            f"{self!r} stands for a value that is known when the workflow runs, so it is neither true nor false. "
            "Decide in a task, or with forgepar.when."
        )

    def __format__(self, form: str) -> str:
        raise WorkflowError(
            f"{self!r} stands for a value that is known when the workflow runs, so it cannot be part of a text. Put "
            "the text together in a task; .name is the task's name."
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a TaskHandle has no attribute {name!r}. It stands for the value of a task, which is known when the "
            f"workflow runs: wf.add(operator.attrgetter({name!r}), handle) is a task that takes the value's."
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskHandle):
            return NotImplemented
        return self.index == other.index and self.workflow is other.workflow

    def __hash__(self) -> int:
        return hash((id(self.workflow), self.index))

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} is a handle, not a value, and cannot be pickled. Handles are replaced by values inside lists, "
            "tuples, dict values and dataclass fields of a task's arguments; elsewhere they are not found."
        )


class TaskHandles(Sequence[TaskHandle]):
    """The handles of consecutive tasks, made when they are looked at; what `Workflow.map` returns.

    As a task's argument it gives that task the list of all values.
    """

    __slots__ = ("indices", "workflow")

    def __init__(self, workflow: Owner, indices: range) -> None:
        self.workflow = workflow
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> TaskHandle: ...
    @overload
    def __getitem__(self, index: slice) -> TaskHandles: ...
    def __getitem__(self, index: int | slice) -> TaskHandle | TaskHandles:
        if isinstance(index, slice):
            return TaskHandles(self.workflow, self.indices[index])
        try:
            return TaskHandle(self.workflow, self.indices[index])
        except TypeError:
            raise TypeError(f"index must be an integer or a slice, got {index!r}.") from None

    def __iter__(self) -> Iterator[TaskHandle]:
        workflow = self.workflow
        return (TaskHandle(workflow, index) for index in self.indices)

    def __add__(self, other: Iterable[TaskHandle]) -> list[TaskHandle]:
        return [*self, *other]

    def __radd__(self, other: Iterable[TaskHandle]) -> list[TaskHandle]:
        return [*other, *self]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TaskHandles):
            return self.workflow is other.workflow and self.indices == other.indices
        return list(self) == other if isinstance(other, list) else NotImplemented

    def __hash__(self) -> int:
        return hash((id(self.workflow), self.indices))

    def __repr__(self) -> str:
        return f"<TaskHandles of {len(self)} tasks>"

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} are handles, not values, and cannot be pickled. Handles are replaced by values inside lists, "
            "tuples, dict values and dataclass fields of a task's arguments; elsewhere they are not found."
        )


def foreign(handle: TaskHandle | TaskHandles, name: str, remedy: str) -> ForeignHandle:
    """Return the error for a handle that was used with another workflow than its own.

    Args:
        handle: one handle, or those of several tasks.
        name: the name of the workflow that it was used with.
        remedy: what to do about it.
    """
    own = handle.workflow.name
    first = f" from {handle[0].name!r} on" if isinstance(handle, TaskHandles) and handle else ""
    owner = f"workflow {own!r}, not to {name!r}" if name != own else f"another workflow of the same name, {own!r}"
    return ForeignHandle(f"{handle!r}{first} belongs to {owner}. {remedy}")
