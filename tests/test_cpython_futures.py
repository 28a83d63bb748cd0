"""CPython's own tests of process pools, of the Python that runs this, with `ForgeExecutor` in the pool's place.

Private attributes of `ProcessPoolExecutor` that they look at have stand-ins in `Watched`. What is left out is listed
with its reason.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import unittest
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from conftest import is_gone, wait_until

import forgepar as fp

METHODS = ["forkserver", "spawn", "fork"]

UNPICKLED = "its jobs have a semaphore, which cannot be pickled; here no worker is started for such jobs"
# By the name of the test, or by start method and name.
LEFT_OUT: dict[str | tuple[str, str], str] = {
    "test_killed_child": "the death of a worker fails only the job that it ran; the executor continues",
    "test_max_tasks_per_child_defaults_to_spawn_context": "the default start method is forkserver, for all options",
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": "replaces parts of ProcessPoolExecutor, such as its pipe",
    "test_python_finalization_error": "counts the threads that ProcessPoolExecutor starts; here there is one",
    "test_saturation": UNPICKLED,
    "test_processes_terminate": UNPICKLED,
    ("fork", "test_max_tasks_per_child"): "max_tasks_per_child is refused with fork there, and works here",
}

# These name ProcessPoolExecutor, and do not ask for `executor_type`.
NAMES_IT = ["test_context_manager_shutdown", "test_del_shutdown", "test_shutdown_no_wait"]

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


class Worker:
    """What they use of a process of the pool."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def join(self) -> None:
        wait_until(lambda: is_gone(self.pid), f"process {self.pid} to end")


class Workers(dict[int, Worker]):
    """The workers that there were: theirs is a dictionary which they keep and look at after a shutdown."""

    def __init__(self, executor: fp.ForgeExecutor) -> None:
        self.scheduler = executor._scheduler

    def __len__(self) -> int:
        self.look()
        return sum(not is_gone(pid) for pid in self)

    def look(self) -> None:
        for joined in self.scheduler.backend.joined():
            self.setdefault(joined.pid, Worker(joined.pid))


class Watched(fp.ForgeExecutor):
    """With stand-ins for the private attributes of `ProcessPoolExecutor` that their tests look at."""

    @property
    def _processes(self) -> Workers:
        workers = Workers(self)
        workers.look()
        return workers

    @property
    def _executor_manager_thread(self) -> Any:
        return self._scheduler._thread

    @property
    def _call_queue(self) -> Any:
        return SimpleNamespace(join_thread=lambda: None)  # there is no such thread

    @property
    def _broken(self) -> Any:
        return self._scheduler.broken


Watched.__name__ = "ForgeExecutor"  # their scripts have the name in them


class Forge:
    """In the place of CPython's mixins that choose the executor."""

    executor_type = Watched
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
        if (reason := LEFT_OUT.get(test) or LEFT_OUT.get((method, test))) is not None
    }
    parents = (mixin, Forge, util.ExecutorMixin, util.BaseTestCase)
    renamed = {
        test: mock.patch("concurrent.futures.ProcessPoolExecutor", Watched)(getattr(mixin, test))
        for test in NAMES_IT
        if hasattr(mixin, test)
    }
    case = type(f"{name}_{method}", parents, {**renamed, **skipped, "ctx": method, "__module__": __name__})
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
