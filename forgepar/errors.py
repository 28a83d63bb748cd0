"""All exceptions of forgepar.

    ForgeparError
    ├── WorkflowError (ValueError)      the workflow cannot run; raised before anything runs
    │   ├── EmptyWorkflow
    │   ├── CyclicWorkflow              the dependencies have a cycle; .cycle: its task names
    │   ├── DuplicateTaskName           .name
    │   ├── ForeignHandle               a handle belongs to another workflow
    │   ├── UnknownTask (KeyError)      there is no task of that name
    │   ├── UnpicklableCallable         .task
    │   ├── UnpicklableArgument         .task, .position
    │   └── InsufficientMemory          a task declares more than is available; .task, .needed, .available
    ├── TaskError                       a task failed, but not by its own exception
    │   ├── UnpicklableResult           its result cannot be pickled
    │   ├── RemoteError                 its exception cannot be pickled; .type_name, .text, .bases
    │   ├── TaskExited                  it called sys.exit, or raised a BaseException that is not an Exception; .code
    │   ├── WorkerDied                  its worker process ended; .exit_code, .pid, .peak_rss
    │   ├── TaskTimeout (TimeoutError)  it exceeded its timeout; .seconds
    │   ├── CodeMismatch                its worker has other code or globals than the caller; .module, .name
    │   ├── TaskMemoryExceeded          it exceeded the memory that it declares; .used, .limit
    │   ├── ToolFailed                  a program that it ran failed; .command, .exit_code, .stderr
    │   └── ToolNotFound (FileNotFoundError)  a program does not exist; .program, .searched
    ├── RunTimeout (TimeoutError)       the run or a layer exceeded its timeout; .seconds, .running, .stacks
    ├── WorkerStartFailed               workers end while they start, or the system does not let them start
    ├── WorkingFolderGone (FileNotFoundError)  the working directory of the caller was deleted; .folder
    ├── StoreError                      a run store cannot be used; .path
    │   ├── StoreBusy                   another program has it open, or another run uses the same workflow in it
    │   └── StoreUntrusted              other users may write to it, and could have it run their code
    ├── ArenaFull (OSError)             a large value fits neither in shared memory nor on disk
    ├── NotInTask (RuntimeError)        `context` was called outside of a task
    ├── WrongProcess (RuntimeError)     an executor was used in a forked child of its process; .owner
    ├── ResultReleased (KeyError)       the value was freed, as the run was not asked to keep it
    ├── MissingResult (KeyError)        the task has no value: it failed, was skipped or was cancelled
    └── WorkflowFailed (ExceptionGroup) a run with failed tasks; .result: the results so far

    StoreWarning (UserWarning)          a run store could not do something; the run continues

A task's own exception reaches the caller as it was raised, in a `WorkflowFailed`.
Each constructor takes the message, and its data as keywords with defaults, so that all exceptions can be unpickled.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from forgepar.version import public


@public
class ForgeparError(Exception):
    """Base class of the exceptions of forgepar."""


@public
class ArenaFull(ForgeparError, OSError):
    """A large value fits neither in shared memory nor in the temporary folder."""


@public
class StoreError(ForgeparError):
    """A run store cannot be opened, read or written.

    Attributes:
        path: the store's file.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


@public
class StoreBusy(StoreError):
    """Another program has the store's lock, or another run uses the same workflow in it."""


@public
class StoreUntrusted(StoreError):
    """Other users may write to a store. Its values are pickles, which run code when they are loaded."""


@public
class StoreWarning(UserWarning):
    """A run store lost something or could not store it. The run continues, and a resumed run computes it again."""


@public
class WorkflowError(ForgeparError, ValueError):
    """The workflow cannot run as declared."""


@public
class EmptyWorkflow(WorkflowError):
    """The workflow has no task."""


@public
class CyclicWorkflow(WorkflowError):
    """The dependencies of the workflow have a cycle.

    Attributes:
        cycle: names of its tasks; the first task waits for the last one.
    """

    def __init__(self, message: str, *, cycle: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.cycle = list(cycle)


@public
class DuplicateTaskName(WorkflowError):
    """Two tasks have the same name."""

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name


@public
class ForeignHandle(WorkflowError):
    """A handle was used with another workflow than its own, or with the result of another."""


@public
class UnknownTask(WorkflowError, KeyError):
    """The workflow has no task of this name."""

    def __str__(self) -> str:
        return str(self.args[0])


@public
class UnpicklableCallable(WorkflowError):
    """A task's callable cannot be sent to a worker."""

    def __init__(self, message: str, *, task: str = "") -> None:
        super().__init__(message)
        self.task = task


@public
class UnpicklableArgument(WorkflowError):
    """A task's argument cannot be sent to a worker.

    Attributes:
        task: the task's name.
        position: the argument's position in the call, as ``args[1]`` or ``kwargs['how']``.
    """

    def __init__(self, message: str, *, task: str = "", position: str = "") -> None:
        super().__init__(message)
        self.task = task
        self.position = position


@public
class InsufficientMemory(WorkflowError):
    """A task declares more memory than is available, so it could never run.

    Attributes:
        task: the task's name.
        needed: the declared memory, bytes.
        available: the available memory, bytes.
    """

    def __init__(self, message: str, *, task: str = "", needed: int = 0, available: int = 0) -> None:
        super().__init__(message)
        self.task = task
        self.needed = needed
        self.available = available


@public
class TaskError(ForgeparError):
    """A task of a run failed, but not by its own exception."""


@public
class UnpicklableResult(TaskError):
    """A task's return value cannot be sent from its worker."""


@public
class RemoteError(TaskError):
    """Replaces a task's exception that cannot be sent from its worker.

    The option ``retry_on`` is applied to the classes of the original exception.

    Attributes:
        type_name: qualified name of the exception's class.
        text: the exception's text.
        bases: qualified names of its class and that class's bases.
    """

    def __init__(self, message: str, *, type_name: str = "", text: str = "", bases: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.type_name = type_name
        self.text = text
        self.bases = tuple(bases) or ((type_name,) if type_name else ())


@public
class TaskExited(TaskError):
    """A task called ``sys.exit`` or raised another `BaseException` that is not an `Exception`.

    Attributes:
        code: the argument of ``sys.exit``, or the exception's text.
    """

    def __init__(self, message: str, *, code: object = None) -> None:
        super().__init__(message)
        self.code = code


@public
class WorkerDied(TaskError):
    """The worker process ended while it ran the task.

    Attributes:
        exit_code: as `multiprocessing.Process.exitcode`: negative for a signal; None if unknown.
        pid: the worker process.
        peak_rss: the most memory that it had reported, bytes; 0 if it had reported none.
    """

    def __init__(self, message: str, *, exit_code: int | None = None, pid: int = 0, peak_rss: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.pid = pid
        self.peak_rss = peak_rss


@public
class TaskTimeout(TaskError, TimeoutError):
    """An attempt exceeded the task's timeout, and its worker was killed.

    Attributes:
        seconds: the timeout.
    """

    def __init__(self, message: str, *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


@public
class CodeMismatch(TaskError):
    """A worker cannot be given the caller's code or global, so the task did not run.

    Attributes:
        module: the module's name.
        name: the name in the module, "" for the whole module.
    """

    def __init__(self, message: str, *, module: str = "", name: str = "") -> None:
        super().__init__(message)
        self.module = module
        self.name = name


@public
class TaskMemoryExceeded(TaskError):
    """A task and its child processes exceeded the memory that it declares, and its worker was killed.

    Attributes:
        used: the memory used, bytes.
        limit: the declared memory, bytes.
    """

    def __init__(self, message: str, *, used: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.used = used
        self.limit = limit


@public
class ToolFailed(TaskError):
    """An external program ended with another exit code than 0, or could not be started.

    Attributes:
        command: the program and its arguments.
        exit_code: the exit code, negative for the signal that ended it; None if it could not be started.
        stderr: the last 64 KiB of its stderr.
    """

    def __init__(
        self, message: str, *, command: Sequence[str] = (), exit_code: int | None = None, stderr: str = ""
    ) -> None:
        super().__init__(message)
        self.command = tuple(command)
        self.exit_code = exit_code
        self.stderr = stderr


@public
class ToolNotFound(TaskError, FileNotFoundError):
    """An external program does not exist.

    Attributes:
        program: its name or path; several are separated by commas.
        searched: where it was looked for: the folders of PATH, or the path itself.
    """

    def __init__(self, message: str, *, program: str = "", searched: str = "") -> None:
        super().__init__(message)
        self.program = program
        self.searched = searched


@public
class RunTimeout(ForgeparError, TimeoutError):
    """The run or one of its layers exceeded its timeout.

    Attributes:
        seconds: the timeout.
        running: names of the tasks that were running.
        stacks: stack traces of the running tasks by name, innermost call first; tasks that did not report are missing.
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


@public
class WorkerStartFailed(ForgeparError):
    """Worker processes end before they are ready, or the system does not let this process start any."""


@public
class WorkingFolderGone(ForgeparError, FileNotFoundError):
    """The caller's working directory was deleted, so tasks cannot run in it.

    Attributes:
        folder: its path, if known.
    """

    def __init__(self, message: str, *, folder: str = "") -> None:
        super().__init__(message)
        self.folder = folder


@public
class NotInTask(ForgeparError, RuntimeError):
    """`context` was called outside of a task."""


@public
class WrongProcess(ForgeparError, RuntimeError):
    """An executor was used in a forked child of its process, which does not have its threads and workers.

    Attributes:
        owner: the pid of the process that started the executor's workers.
    """

    def __init__(self, message: str, *, owner: int = 0) -> None:
        super().__init__(message)
        self.owner = owner

    @classmethod
    def here(cls, owner: int) -> WrongProcess:
        """Return the error for the use of another process's executor in this process."""
        message = (
            f"This executor belongs to process {owner}, and this process, {os.getpid()}, was forked from it. "
            "Create an executor in this process and use that."
        )
        return cls(message, owner=owner)


@public
class ResultReleased(ForgeparError, KeyError):
    """The value of the task was freed after its last consumer completed."""

    def __str__(self) -> str:
        return str(self.args[0])


@public
class MissingResult(ForgeparError, KeyError):
    """The task has no value, as it did not complete."""

    def __str__(self) -> str:
        return str(self.args[0])


@public
class WorkflowFailed(ForgeparError, ExceptionGroup[Exception]):
    """At least one task of a run failed.

    ``exceptions`` has the exceptions of the tasks, each with a note that names its task.

    Attributes:
        result: the `RunResult` with the results so far.
    """

    result: Any

    def derive(self, excs: Sequence[Exception], /) -> WorkflowFailed:  # type: ignore[override]  # Exceptions only
        """Split for ``except*``, keeping the result."""
        part = WorkflowFailed(self.message, excs)
        part.result = getattr(self, "result", None)
        return part


def text_of(value: object) -> str:
    """Return ``str(value)``, or a replacement if that raises, as it may for a user's exception."""
    try:
        return str.__str__(str(value))  # exactly a str, as a subclass may not be picklable
    except BaseException:
        return "(no text: its __str__ raises)"


def is_system_error(error: BaseException) -> bool:
    """Return whether an error is about the machine (a full disk, a missing folder, memory) rather than a value.

    Pickling may raise anything for a value that cannot be pickled, except these errors, which are raised unchanged.
    """
    return isinstance(error, (OSError, MemoryError)) and not isinstance(error, ValueError)  # io.UnsupportedOperation


def add_note(error: BaseException, note: str) -> None:
    """Add a note to any exception.

    `BaseException.add_note` fails if ``__notes__`` is not a list, or if the class does not allow attributes.
    """
    attributes = _ATTRIBUTES.__get__(error)
    notes = attributes.get("__notes__", [])
    if type(notes) is not list:
        notes = list(notes) if type(notes) is tuple else [notes if type(notes) is str else text_of(notes)]
    attributes["__notes__"] = [*notes, note]


def forget_frames(error: BaseException) -> None:
    """Clear the frames of an error that is kept, so that it keeps no descriptors and callers alive."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found.__traceback__ = None
        found = found.__cause__ or found.__context__


_ATTRIBUTES: Any = vars(BaseException)["__dict__"]


def error_text(error: BaseException) -> str:
    """Return an exception as text for events."""
    return f"{type(error).__name__}: {text_of(error)}"


def report(text: str, category: type[Warning] = RuntimeWarning, logger: str = "forgepar.audit") -> None:
    """Warn of a problem that does not end the run; log it if warnings are errors or cannot be shown."""
    try:
        warnings.warn(text, category, stacklevel=3)
    except Exception:
        with suppress(Exception):  # standard error may be closed
            import logging  # workers need not load it

            logging.getLogger(logger).error(text)
