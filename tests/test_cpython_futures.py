"""CPython's own tests of process pools, of the Python that runs this, with `ForgeExecutor` in the pool's place.

What is left out is listed with its reason. Most of it looks at private attributes of `ProcessPoolExecutor`.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import forgepar as fp

METHODS = ["forkserver", "spawn", "fork"]

PRIVATE = "looks at a private attribute of ProcessPoolExecutor: "
LEFT_OUT = {
    "test_killed_child": PRIVATE + "_processes",
    "test_saturation": PRIVATE + "_max_workers, _processes",
    "test_idle_process_reuse_one": PRIVATE + "_max_workers, _processes",
    "test_idle_process_reuse_multiple": PRIVATE + "_max_workers, _processes",
    "test_max_tasks_per_child": PRIVATE + "_processes",
    "test_max_tasks_per_child_defaults_to_spawn_context": PRIVATE + "_mp_context",
    "test_processes_terminate": PRIVATE + "_processes",
    "test_context_manager_shutdown": PRIVATE + "_processes; and it names ProcessPoolExecutor itself",
    "test_del_shutdown": PRIVATE + "_executor_manager_thread; and it names ProcessPoolExecutor itself",
    "test_shutdown_no_wait": PRIVATE + "_executor_manager_thread; and it names ProcessPoolExecutor itself",
    "test_shutdown_deadlock_pickle": PRIVATE + "_executor_manager_thread",
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": "replaces private parts of ProcessPoolExecutor",
    "test_python_finalization_error": "counts the threads that ProcessPoolExecutor starts",
    ("FailingInitializerMixin", "test_initializer"): PRIVATE + "_broken",
}

# Those that take some seconds together; others wait for a second or more, each, for tasks that sleep.
QUICK = ["ExecutorDeadlockTest", "InitializerMixin"]

# By module: what is inherited. Until 3.11.4 all of it was one module.
CASES = {
    "test_process_pool": ["ProcessPoolExecutorTest"],
    "test_shutdown": ["ProcessPoolShutdownTest"],
    "test_wait": ["WaitTests"],
    "test_as_completed": ["AsCompletedTests"],
    "test_deadlock": ["ExecutorDeadlockTest"],
    "test_init": ["InitializerMixin", "FailingInitializerMixin"],
}


def cpython_module(name: str) -> ModuleType:
    """Import a module of CPython's tests, whether that is a part of a package or all in one."""
    whole = importlib.import_module("test.test_concurrent_futures")
    return importlib.import_module(f"test.test_concurrent_futures.{name}") if hasattr(whole, "__path__") else whole


try:
    util: Any = cpython_module("util")
except ImportError as missing:
    pytest.skip(f"this Python came without its own tests: {missing}", allow_module_level=True)


class Forge:
    """In the place of CPython's mixins that choose the executor."""

    executor_type = fp.ForgeExecutor
    ctx: str


def left_out(reason: str) -> Any:
    def skip(self: unittest.TestCase) -> None:
        self.skipTest(reason)

    return skip


def on_forge(module: ModuleType, name: str, method: str) -> type:
    """Make the test case of one of CPython's mixins."""
    mixin = getattr(module, name)
    skipped = {
        test: left_out(reason)
        for test in dir(mixin)
        if (reason := LEFT_OUT.get(test) or LEFT_OUT.get((name, test))) is not None
    }
    parents = (mixin, Forge, util.ExecutorMixin, util.BaseTestCase)
    case = type(f"{name}_{method}", parents, {**skipped, "ctx": method, "__module__": __name__})
    # Scripts of theirs import the executor by its name.
    return swapped_in_scripts(module)(case) if hasattr(module, "assert_python_ok") else case


def swapped_in_scripts(module: ModuleType) -> Any:
    real = module.assert_python_ok
    imports = "from concurrent.futures import ForgeExecutor"

    def run(flag: str, script: str) -> Any:
        assert imports in script
        # One of their scripts lacks an import, which does not show there: it is skipped for ProcessPoolExecutor.
        return real(flag, script.replace(imports, "import multiprocessing; from forgepar import ForgeExecutor"))

    return mock.patch.object(module, "assert_python_ok", run)


for module_name, names in CASES.items():
    for mixin_name in names:
        for method in METHODS:
            made = on_forge(cpython_module(module_name), mixin_name, method)
            is_quick = method == METHODS[0] and mixin_name in QUICK
            globals()[made.__name__] = made if is_quick else pytest.mark.slow(made)


def test_every_case_that_is_left_out_is_one_of_theirs():
    theirs = {
        test for module, names in CASES.items() for name in names for test in dir(getattr(cpython_module(module), name))
    }
    known = {test if isinstance(test, str) else test[1] for test in LEFT_OUT}
    if sys.version_info >= (3, 13):  # some came later than others
        assert known <= theirs
