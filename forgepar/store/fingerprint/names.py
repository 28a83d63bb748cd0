"""How fingerprints identify an object of a library: by module, name and release.

Objects of forgepar are identified by the module that they were first defined in. So moving them within the package
does not change fingerprints, and values in existing stores stay usable.
"""

from __future__ import annotations

from forgepar.store.moved_names import FORMER_NAMES
from forgepar.values.modules import release_of

# The modules in which public names were first defined; names that are not listed here were defined in `errors`.
_FIRST_HOMES = {
    "audit": "AuditLog",
    "backends.dask": "DaskBackend",
    "backends.futures": "FuturesBackend",
    "branching": "when",
    "cancellation": "CancellationToken",
    "checks": "Finding",
    "collecting": "Collected collect",
    "combinators": "Included ParallelTasks map_reduce parallel sequence",
    "console": "OutputLine",
    "contexts": "RunProgress TaskContext context",
    "daskgraphs": "dask_get",
    "displays": "Display RunningTask",
    "events": "Event Sink",
    "executor": "WorkflowExecutor",
    "fallbacks": "ChainFallback RetryFallback SkipFallback ValueFallback",
    "graph": "Adjacency critical_path find_cycle longest_path_layers",
    "handles": "TaskHandle TaskHandles",
    "inputs": "File",
    "pool": "ForgeExecutor",
    "priors": "Resume",
    "result": "BytesUsed RunResult TaskRecord",
    "rollback": "RollbackReport",
    "runstate": "Status",
    "runtable": "FailedAttempt LayerRow RunTable",
    "snapshot": "RunSnapshot",
    "store": "RunFacts Store StoredRun StoredValue",
    "subflow": "Subflow",
    "tasks": "Backoff Options Task attempt task",
    "toolbox": "Tool ToolRegistry",
    "tools": "Command ToolResult shell",
    "values.inplace": "empty empty_like",
    "workflow": "Workflow",
}
_FIRST_HOME_OF = {name: f"forgepar.{home}" for home, names in _FIRST_HOMES.items() for name in names.split()}


def name_in_library(module: str, name: str) -> str:
    """Return the text that identifies an object of a library in fingerprints.

    Args:
        module: its module, or its ``__module__``.
        name: its qualified name; empty for the module itself.
    """
    if module == "forgepar" and name:
        module = _FIRST_HOME_OF.get(name.partition(".")[0], "forgepar.errors")
    else:
        module = FORMER_NAMES.get(module, module)
    return f"{module} {name} {release_of(module)}"
