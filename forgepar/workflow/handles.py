"""Handles: stand-ins for the values of tasks while a workflow is declared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, overload

from forgepar._validate import shown
from forgepar.errors import ForeignHandle, WorkflowError
from forgepar.version import public

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # its default makes "TaskHandle" mean "TaskHandle[Any]"

    R_co = TypeVar("R_co", covariant=True, default=Any)
else:
    from typing import TypeVar

    R_co = TypeVar("R_co", covariant=True)


class HandleOwner(Protocol):
    """What a handle needs of its workflow."""

    name: str
    identity: bytes

    def task_name(self, index: int) -> str:
        """Return the name of a task from its number."""

    def take_item(self, handle: TaskHandle, index: Any) -> TaskHandle:
        """Add a task that takes an item of a task's value."""


@public
class TaskHandle(Generic[R_co]):
    """Stand-in for a task's value while a workflow is declared; returned by `Workflow.add`.

    In the arguments of another task, it makes that task wait for this one and get its value. To type checkers, a
    ``TaskHandle[R]`` is for a value of type R.
    """

    __slots__ = ("index", "workflow")

    def __init__(self, workflow: HandleOwner, index: int) -> None:
        self.workflow = workflow
        self.index = index

    @property
    def name(self) -> str:
        """The task's name."""
        return self.workflow.task_name(self.index)

    def __repr__(self) -> str:
        return f"<TaskHandle {self.name!r}>"

    __iter__ = None  # else iteration would call __getitem__, and add tasks without end

    def __getitem__(self, index: Any) -> TaskHandle:
        """Add a task that gets an item of this task's value; the index may be a handle too."""
        return self.workflow.take_item(self, index)

    def __bool__(self) -> bool:
        raise WorkflowError(
            f"{self!r} has no value until the workflow runs, so it is neither true nor false. Decide in a task, or "
            "with forgepar.when."
        )

    def __format__(self, form: str) -> str:
        raise WorkflowError(
            f"{self!r} has no value until the workflow runs, so it cannot be formatted. Format the value in a task; "
            "the task's name is .name."
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"TaskHandle has no attribute {name!r}; the task's value is known when the workflow runs. To get the "
            f"attribute of the value, add a task: wf.add(operator.attrgetter({name!r}), handle)."
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskHandle):
            return NotImplemented
        return self.index == other.index and self.workflow is other.workflow

    def __hash__(self) -> int:
        return hash((id(self.workflow), self.index))

    def __reduce__(self) -> Any:
        raise _unpicklable(self)


@public
class TaskHandles(Sequence[TaskHandle[R_co]]):
    """The handles of consecutive tasks, created on access; returned by `Workflow.map`.

    In the arguments of another task, they stand for the list of all values.
    """

    __slots__ = ("indices", "workflow")

    def __init__(self, workflow: HandleOwner, indices: range) -> None:
        self.workflow = workflow
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> TaskHandle[R_co]: ...
    @overload
    def __getitem__(self, index: slice) -> TaskHandles[R_co]: ...
    def __getitem__(self, index: int | slice) -> TaskHandle[R_co] | TaskHandles[R_co]:
        try:
            if isinstance(index, slice):
                return TaskHandles(self.workflow, self.indices[index])
            return TaskHandle(self.workflow, self.indices[index])
        except IndexError:
            raise
        except Exception:  # an __index__ may raise anything
            raise TypeError(f"index must be an integer or a slice, got {shown(index)}.") from None

    def __iter__(self) -> Iterator[TaskHandle[R_co]]:
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
        raise _unpicklable(self)


def _unpicklable(handle: object) -> TypeError:
    return TypeError(
        f"{handle!r} cannot be pickled, as it is a handle, not a value. Handles become values in lists, tuples, dict "
        "values and dataclass fields of a task's arguments, but are not found in other objects."
    )


def foreign(handle: TaskHandle | TaskHandles, name: str, remedy: str) -> ForeignHandle:
    """Return the error for a handle that was used with a workflow that it does not belong to.

    Args:
        handle: a handle, or the handles of several tasks.
        name: the name of the workflow that it was used with.
        remedy: what to do.
    """
    own = handle.workflow.name
    first = f" starting with {handle[0].name!r}" if isinstance(handle, TaskHandles) and handle else ""
    owner = f"workflow {own!r}, not to {name!r}" if name != own else f"another workflow of the same name, {own!r}"
    return ForeignHandle(f"{handle!r}{first} belongs to {owner}. {remedy}")
