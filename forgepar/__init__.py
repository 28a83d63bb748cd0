"""forgepar: runs graphs of plain Python functions on many processes, layer by layer.

Names are loaded when they are first used, so that importing the package costs next to nothing and a worker, which
needs none of them, never loads numpy for them.
"""

from __future__ import annotations

import _thread
import importlib
import os
from typing import TYPE_CHECKING, Any

from forgepar.version import __version__ as __version__

__all__ = [
    "Adjacency",
    "ArenaFull",
    "AuditLog",
    "Backoff",
    "BytesUsed",
    "CancellationToken",
    "ChainFallback",
    "CodeMismatch",
    "Collected",
    "Command",
    "CyclicWorkflow",
    "DaskBackend",
    "DuplicateTaskName",
    "EmptyWorkflow",
    "FailedAttempt",
    "File",
    "Finding",
    "ForeignHandle",
    "ForgeExecutor",
    "ForgeparError",
    "FuturesBackend",
    "Included",
    "InsufficientMemory",
    "LayerRow",
    "MissingResult",
    "NotInTask",
    "Options",
    "OutputLine",
    "ParallelTasks",
    "RemoteError",
    "ResultReleased",
    "Resume",
    "RetryFallback",
    "RollbackReport",
    "RunFacts",
    "RunProgress",
    "RunResult",
    "RunSnapshot",
    "RunTable",
    "RunTimeout",
    "RunningTask",
    "SkipFallback",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreUntrusted",
    "StoreWarning",
    "StoredRun",
    "StoredValue",
    "Subflow",
    "Task",
    "TaskContext",
    "TaskError",
    "TaskExited",
    "TaskHandle",
    "TaskHandles",
    "TaskMemoryExceeded",
    "TaskRecord",
    "TaskTimeout",
    "Tool",
    "ToolFailed",
    "ToolNotFound",
    "ToolRegistry",
    "ToolResult",
    "UnknownTask",
    "UnpicklableArgument",
    "UnpicklableCallable",
    "UnpicklableResult",
    "ValueFallback",
    "WorkerDied",
    "WorkerStartFailed",
    "Workflow",
    "WorkflowError",
    "WorkflowExecutor",
    "WorkflowFailed",
    "WorkingFolderGone",
    "WrongProcess",
    "attempt",
    "collect",
    "context",
    "critical_path",
    "dask_get",
    "empty",
    "empty_like",
    "find_cycle",
    "longest_path_layers",
    "map_reduce",
    "parallel",
    "sequence",
    "shell",
    "task",
    "when",
]

# Where each name is; those that are in none of these are errors.
_HOME = {
    "executor": ("Workflow", "WorkflowExecutor"),  # Workflow too: the executor lends Workflow.run what it needs
    "graph": ("Adjacency", "critical_path", "find_cycle", "longest_path_layers"),
    "priors": ("Resume",),
    "result": ("BytesUsed", "RunResult", "TaskRecord"),
    "audit": ("AuditLog",),
    "branching": ("when",),
    "cancellation": ("CancellationToken",),
    "checks": ("Finding",),
    "combinators": ("Included", "ParallelTasks", "map_reduce", "parallel", "sequence"),
    "console": ("OutputLine",),
    "displays": ("RunningTask",),
    "backends.futures": ("FuturesBackend",),
    "fallbacks": ("ChainFallback", "RetryFallback", "SkipFallback", "ValueFallback"),
    "snapshot": ("RunSnapshot",),
    "store": ("RunFacts", "Store", "StoredRun", "StoredValue"),
    "collecting": ("Collected", "collect"),
    "subflow": ("Subflow",),
    "rollback": ("RollbackReport",),
    "runtable": ("FailedAttempt", "LayerRow", "RunTable"),
    "contexts": ("RunProgress", "TaskContext", "context"),
    "backends.dask": ("DaskBackend",),
    "daskgraphs": ("dask_get",),
    "values.inplace": ("empty", "empty_like"),
    "inputs": ("File",),
    "pool": ("ForgeExecutor",),
    "handles": ("TaskHandle", "TaskHandles"),
    "tasks": ("Backoff", "Options", "Task", "attempt", "task"),
    "toolbox": ("Tool", "ToolRegistry"),
    "tools": ("Command", "ToolResult", "shell"),
}

if TYPE_CHECKING:
    from forgepar.audit import AuditLog
    from forgepar.backends.dask import DaskBackend
    from forgepar.backends.futures import FuturesBackend
    from forgepar.branching import when
    from forgepar.cancellation import CancellationToken
    from forgepar.checks import Finding
    from forgepar.collecting import Collected, collect
    from forgepar.combinators import Included, ParallelTasks, map_reduce, parallel, sequence
    from forgepar.console import OutputLine
    from forgepar.contexts import RunProgress, TaskContext, context
    from forgepar.daskgraphs import dask_get
    from forgepar.displays import RunningTask
    from forgepar.errors import (
        ArenaFull,
        CodeMismatch,
        CyclicWorkflow,
        DuplicateTaskName,
        EmptyWorkflow,
        ForeignHandle,
        ForgeparError,
        InsufficientMemory,
        MissingResult,
        NotInTask,
        RemoteError,
        ResultReleased,
        RunTimeout,
        StoreBusy,
        StoreError,
        StoreUntrusted,
        StoreWarning,
        TaskError,
        TaskExited,
        TaskMemoryExceeded,
        TaskTimeout,
        ToolFailed,
        ToolNotFound,
        UnknownTask,
        UnpicklableArgument,
        UnpicklableCallable,
        UnpicklableResult,
        WorkerDied,
        WorkerStartFailed,
        WorkflowError,
        WorkflowFailed,
        WorkingFolderGone,
        WrongProcess,
    )
    from forgepar.executor import WorkflowExecutor
    from forgepar.fallbacks import ChainFallback, RetryFallback, SkipFallback, ValueFallback
    from forgepar.graph import Adjacency, critical_path, find_cycle, longest_path_layers
    from forgepar.handles import TaskHandle, TaskHandles
    from forgepar.inputs import File
    from forgepar.pool import ForgeExecutor
    from forgepar.priors import Resume
    from forgepar.result import BytesUsed, RunResult, TaskRecord
    from forgepar.rollback import RollbackReport
    from forgepar.runtable import FailedAttempt, LayerRow, RunTable
    from forgepar.snapshot import RunSnapshot
    from forgepar.store import RunFacts, Store, StoredRun, StoredValue
    from forgepar.subflow import Subflow
    from forgepar.tasks import Backoff, Options, Task, attempt, task
    from forgepar.toolbox import Tool, ToolRegistry
    from forgepar.tools import Command, ToolResult, shell
    from forgepar.values.inplace import empty, empty_like
    from forgepar.workflow import Workflow


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'forgepar' has no attribute {name!r}")
    home = next((home for home, names in _HOME.items() if name in names), "errors")
    with _loading:
        value = getattr(importlib.import_module(f"forgepar.{home}"), name)
    globals()[name] = value
    return value


# One thread at a time: modules of the standard library that import each other, as those of `multiprocessing` do, are
# seen half made by threads that begin with different ones.
_loading = _thread.RLock()


def _free_in_child() -> None:
    if not _loading._is_owned():  # type: ignore[attr-defined]  # a thread of the parent may be loading
        _loading._at_fork_reinit()  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_free_in_child)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
