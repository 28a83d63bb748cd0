"""forgepar without the barrier: a task starts as soon as its inputs are there."""

from __future__ import annotations

import functools
import inspect

from benchmarks.systems import system_forgepar

NAME = "forgepar eager"
TYPICAL_US = 10.0
PARALLEL = True

open = functools.partial(system_forgepar.open, schedule="eager")  # noqa: A001


def available() -> str | None:
    import forgepar as fp

    has_it = "schedule" in inspect.signature(fp.WorkflowExecutor.run).parameters
    return None if has_it else "no schedule='eager' in this version"
