"""Every exception that a user of forgepar can meet.

    ForgeparError
    ├── WorkflowError (ValueError)      the workflow is wrong; found before anything ran
    │   ├── EmptyWorkflow
    │   ├── CyclicWorkflow              .cycle: the task names along it
    │   ├── DuplicateTaskName           .name
    │   ├── ForeignHandle               a handle of another workflow
    │   ├── UnknownTask (KeyError)      no task of that name
    │   ├── UnpicklableCallable         .task
    │   ├── UnpicklableArgument         .task, .position
    │   └── InsufficientMemory          a task declares more than can be had; .task, .needed, .available
    ├── TaskError                       one task of a run failed by other means than its own exception
    │   ├── UnpicklableResult           it returned what cannot travel
    │   ├── RemoteError                 it raised what cannot travel; .type_name, .text, .bases
    │   ├── TaskExited                  it called sys.exit or raised no ordinary exception; .code
    │   ├── WorkerDied                  its process ended under it; .exit_code, .pid, .peak_rss
    │   ├── TaskTimeout (TimeoutError)  it took longer than its timeout; .seconds
    │   ├── CodeMismatch                its worker has other code or globals than the caller; .module, .name
    │   ├── TaskMemoryExceeded          it had more memory than it declares; .used, .limit
    │   ├── ToolFailed                  a program that it ran ended badly; .command, .exit_code, .stderr
    │   └── ToolNotFound (FileNotFoundError)  there is no such program; .program, .searched
    ├── RunTimeout (TimeoutError)       the run, or a layer of it, took longer than it may; .seconds, .running, .stacks
    ├── WorkerStartFailed               workers end before they serve, or the system lets this process start none
    ├── WorkingFolderGone (FileNotFoundError)  the working directory of the caller was deleted; .folder
    ├── StoreError                      a run store cannot be used as it is; .path
    │   ├── StoreBusy                   another program holds it, or another run works on the same workflow
    │   └── StoreUntrusted              others may write to it, so that its values may be anybody's code
    ├── ArenaFull (OSError)             a large value finds room neither in shared memory nor on disk
    ├── NotInTask (RuntimeError)        `context` was called where no task runs
    ├── WrongProcess (RuntimeError)     an executor was used in a forked child of the process that owns it; .owner
    ├── ResultReleased (KeyError)       the value was freed, nobody had asked to keep it
    ├── MissingResult (KeyError)        the task has no value: it failed, was skipped or was cancelled
    └── WorkflowFailed (ExceptionGroup) a run with failures; .result holds all that was done

    StoreWarning (UserWarning)          what a run store could not do, while the run goes on all the same

A task's own exception is none of these: it reaches the caller as it was raised, inside `WorkflowFailed`.
Each constructor takes the message first and its data as keywords with defaults, so all of them survive pickling.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any


class ForgeparError(Exception):
    """The root of the tree above."""


class ArenaFull(ForgeparError, OSError):
    """A large value finds room neither in shared memory nor in the temporary folder."""


class StoreError(ForgeparError):
    """A run store cannot be opened, read or written.

    Attributes:
        path: the store's file.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class StoreBusy(StoreError):
    """Another program holds the store's lock, or another run works on the same workflow in it."""


class StoreUntrusted(StoreError):
    """Others than its owner may write to a store: its values are pickles, which run code when they are read."""


class StoreWarning(UserWarning):
    """A run store did not keep something, or lost it; the run goes on, and what is lost is computed again."""


class WorkflowError(ForgeparError, ValueError):
    """The workflow cannot be run as it was declared."""


class EmptyWorkflow(WorkflowError):
    """The workflow has no task."""


class CyclicWorkflow(WorkflowError):
    """Tasks wait for each other in a circle.

    Attributes:
        cycle: names of the tasks along it; the last one is what the first one waits for.
    """

    def __init__(self, message: str, *, cycle: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.cycle = list(cycle)


class DuplicateTaskName(WorkflowError):
    """Two tasks have the same name."""

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class ForeignHandle(WorkflowError):
    """A handle was used with a workflow, or with the result of one, that did not make it."""


class UnknownTask(WorkflowError, KeyError):
    """The workflow has no task of this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnpicklableCallable(WorkflowError):
    """A task's callable cannot be sent to a worker."""

    def __init__(self, message: str, *, task: str = "") -> None:
        super().__init__(message)
        self.task = task


class UnpicklableArgument(WorkflowError):
    """A task's argument cannot be sent to a worker.

    Attributes:
        task: the task's name.
        position: where the argument stands, as ``args[1]`` or ``kwargs['how']``.
    """

    def __init__(self, message: str, *, task: str = "", position: str = "") -> None:
        super().__init__(message)
        self.task = task
        self.position = position


class InsufficientMemory(WorkflowError):
    """A task declares more memory than can be had, so could never run.

    Attributes:
        task: the task's name.
        needed: what it declares, bytes.
        available: what can be had, bytes.
    """

    def __init__(self, message: str, *, task: str = "", needed: int = 0, available: int = 0) -> None:
        super().__init__(message)
        self.task = task
        self.needed = needed
        self.available = available


class TaskError(ForgeparError):
    """One task of a run failed, not by an exception of its own."""


class UnpicklableResult(TaskError):
    """A task returned a value that cannot be sent back."""


class RemoteError(TaskError):
    """Stands for an exception that could not travel from its worker.

    ``retry_on`` of a task decides by the classes that the exception itself was an instance of.

    Attributes:
        type_name: qualified name of the exception's class.
        text: what the exception said.
        bases: qualified names of its class and of that class's bases.
    """

    def __init__(self, message: str, *, type_name: str = "", text: str = "", bases: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.type_name = type_name
        self.text = text
        self.bases = tuple(bases) or ((type_name,) if type_name else ())


class TaskExited(TaskError):
    """A task tried to end its process by ``sys.exit`` or raised a `BaseException` of another kind.

    Attributes:
        code: what ``sys.exit`` was given, or the exception's text.
    """

    def __init__(self, message: str, *, code: object = None) -> None:
        super().__init__(message)
        self.code = code


class WorkerDied(TaskError):
    """The worker process ended while it ran a task.

    Attributes:
        exit_code: as `multiprocessing.Process.exitcode` has it (negative: the signal), None if unknown.
        pid: the process that ended.
        peak_rss: most memory that it had told of before, bytes; 0 if it had not.
    """

    def __init__(self, message: str, *, exit_code: int | None = None, pid: int = 0, peak_rss: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.pid = pid
        self.peak_rss = peak_rss


class TaskTimeout(TaskError, TimeoutError):
    """An attempt took longer than the task's timeout, and its worker was ended.

    Attributes:
        seconds: the timeout.
    """

    def __init__(self, message: str, *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class CodeMismatch(TaskError):
    """A worker cannot be given the code or the global that the caller has, so the task was not run.

    Attributes:
        module: the module's name.
        name: the name in it, "" for the module as a whole.
    """

    def __init__(self, message: str, *, module: str = "", name: str = "") -> None:
        super().__init__(message)
        self.module = module
        self.name = name


class TaskMemoryExceeded(TaskError):
    """A task, with all that it started, had more memory than it declares, and its worker was ended.

    Attributes:
        used: what it had, bytes.
        limit: what it declares, bytes.
    """

    def __init__(self, message: str, *, used: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.used = used
        self.limit = limit


class ToolFailed(TaskError):
    """An external program did not end with exit code 0, or could not be started.

    Attributes:
        command: the program and its arguments.
        exit_code: what it ended with (negative: the signal that ended it); None if it could not be started.
        stderr: what it wrote to its stderr, the last 64 KiB.
    """

    def __init__(
        self, message: str, *, command: Sequence[str] = (), exit_code: int | None = None, stderr: str = ""
    ) -> None:
        super().__init__(message)
        self.command = tuple(command)
        self.exit_code = exit_code
        self.stderr = stderr


class ToolNotFound(TaskError, FileNotFoundError):
    """There is no program of this name.

    Attributes:
        program: the name or path; of several, a list of them with commas.
        searched: where it was looked for: the folders of PATH, or the path itself.
    """

    def __init__(self, message: str, *, program: str = "", searched: str = "") -> None:
        super().__init__(message)
        self.program = program
        self.searched = searched


class RunTimeout(ForgeparError, TimeoutError):
    """The run, or one of its layers, took longer than it was given.

    Attributes:
        seconds: what it was given.
        running: names of the tasks that were running then.
        stacks: where they were, innermost call first, by name; without those that did not tell.
    """

    def __init__(
        self,
        message: str,
        *,
        seconds: float = 0.0,
        running: Sequence[str] = (),
        stacks: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.running = list(running)
        self.stacks = dict(stacks)


class WorkerStartFailed(ForgeparError):
    """Worker processes end before they can take work, or the system lets this process start none."""


class WorkingFolderGone(ForgeparError, FileNotFoundError):
    """The caller's working directory was deleted, so that its tasks cannot run in it.

    Attributes:
        folder: its path, where that is known.
    """

    def __init__(self, message: str, *, folder: str = "") -> None:
        super().__init__(message)
        self.folder = folder


class NotInTask(ForgeparError, RuntimeError):
    """`context` was called where no task runs."""


class WrongProcess(ForgeparError, RuntimeError):
    """An executor was used in a forked child of its process, which has none of its threads and workers.

    Attributes:
        owner: the pid of the process that started the executor's workers.
    """

    def __init__(self, message: str, *, owner: int = 0) -> None:
        super().__init__(message)
        self.owner = owner

    @classmethod
    def here(cls, owner: int) -> WrongProcess:
        """Return what to raise in this process for an executor of another one."""
        message = (
            f"This executor belongs to process {owner}, and this is process {os.getpid()}, which was forked from it. "
            "Make an executor in this process and use that."
        )
        return cls(message, owner=owner)


class ResultReleased(ForgeparError, KeyError):
    """The value of this task was freed when its last consumer was done."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingResult(ForgeparError, KeyError):
    """The task has no value, as it did not complete."""

    def __str__(self) -> str:
        return str(self.args[0])


class WorkflowFailed(ForgeparError, ExceptionGroup[Exception]):
    """A run in which at least one task failed.

    ``exceptions`` holds what the tasks raised, each with a note that names its task.

    Attributes:
        result: the `RunResult` with all that was done before the run ended.
    """

    result: Any

    def derive(self, excs: Sequence[Exception], /) -> WorkflowFailed:  # type: ignore[override]  # made of Exceptions only
        """Split for ``except*``, keeping the result."""
        part = WorkflowFailed(self.message, excs)
        part.result = getattr(self, "result", None)
        return part


def text_of(value: object) -> str:
    """Return ``str(value)``; where that raises, as it may for a user's exception, a text that says so."""
    try:
        return str.__str__(str(value))  # of exactly str: a subclass of it may not travel
    except BaseException:
        return "(its text cannot be had: its __str__ raises)"


def is_system_error(error: BaseException) -> bool:
    """Tell whether an error is about the machine (a full disk, a missing folder, memory), not about a value at hand.

    Pickling a value that refuses to be pickled may raise anything; what this accepts is to be passed on as it is.
    """
    return isinstance(error, (OSError, MemoryError)) and not isinstance(error, ValueError)  # io.UnsupportedOperation


def add_note(error: BaseException, note: str) -> None:
    """Add a note to any exception.

    `BaseException.add_note` raises where ``__notes__`` is not a list, and where a class lets no attribute be set.
    """
    attributes = _ATTRIBUTES.__get__(error)
    notes = attributes.get("__notes__", [])
    if type(notes) is not list:
        notes = list(notes) if type(notes) is tuple else [notes if type(notes) is str else text_of(notes)]
    attributes["__notes__"] = [*notes, note]


def forget_frames(error: BaseException) -> None:
    """Have an error that is kept as a reason keep nothing by its frames: descriptors, and what has called."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found.__traceback__ = None
        found = found.__cause__ or found.__context__


_ATTRIBUTES: Any = vars(BaseException)["__dict__"]
