"""forgepar: runs graphs of plain Python functions on many processes, layer by layer.

Names are loaded when they are first used, so that importing the package costs next to nothing and a worker, which
needs none of them, never loads numpy for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Adjacency",
    "ArenaFull",
    "Backoff",
    "BytesUsed",
    "CancellationToken",
    "ChainFallback",
    "Command",
    "CyclicWorkflow",
    "DuplicateTaskName",
    "EmptyWorkflow",
    "ForeignHandle",
    "ForgeparError",
    "InsufficientMemory",
    "LayerRow",
    "MissingResult",
    "NotInTask",
    "Options",
    "OutputLine",
    "RemoteError",
    "ResultReleased",
    "RetryFallback",
    "RollbackReport",
    "RunResult",
    "RunTimeout",
    "SkipFallback",
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
    "attempt",
    "context",
    "critical_path",
    "empty",
    "empty_like",
    "find_cycle",
    "longest_path_layers",
    "shell",
    "task",
    "when",
]

# Where each name is; those that are in none of these are errors.
_HOME = {
    "executor": ("Workflow", "WorkflowExecutor"),  # Workflow too: the executor lends Workflow.run what it needs
    "graph": ("Adjacency", "critical_path", "find_cycle", "longest_path_layers"),
    "result": ("BytesUsed", "LayerRow", "RunResult", "TaskRecord"),
    "branching": ("when",),
    "cancellation": ("CancellationToken",),
    "console": ("OutputLine",),
    "fallbacks": ("ChainFallback", "RetryFallback", "SkipFallback", "ValueFallback"),
    "rollback": ("RollbackReport",),
    "contexts": ("TaskContext", "context"),
    "values.inplace": ("empty", "empty_like"),
    "handles": ("TaskHandle", "TaskHandles"),
    "tasks": ("Backoff", "Options", "Task", "attempt", "task"),
    "toolbox": ("Tool", "ToolRegistry"),
    "tools": ("Command", "ToolResult", "shell"),
}

if TYPE_CHECKING:
    from forgepar.branching import when
    from forgepar.cancellation import CancellationToken
    from forgepar.console import OutputLine
    from forgepar.contexts import TaskContext, context
    from forgepar.errors import (
        ArenaFull,
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
    )
    from forgepar.executor import WorkflowExecutor
    from forgepar.fallbacks import ChainFallback, RetryFallback, SkipFallback, ValueFallback
    from forgepar.graph import Adjacency, critical_path, find_cycle, longest_path_layers
    from forgepar.handles import TaskHandle, TaskHandles
    from forgepar.result import BytesUsed, LayerRow, RunResult, TaskRecord
    from forgepar.rollback import RollbackReport
    from forgepar.tasks import Backoff, Options, Task, attempt, task
    from forgepar.toolbox import Tool, ToolRegistry
    from forgepar.tools import Command, ToolResult, shell
    from forgepar.values.inplace import empty, empty_like
    from forgepar.workflow import Workflow


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'forgepar' has no attribute {name!r}")
    home = next((home for home, names in _HOME.items() if name in names), "errors")
    value = getattr(importlib.import_module(f"forgepar.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
