"""A task finds its caller's environment, working directory, search path and settings: those at `run` or `submit`."""

from __future__ import annotations

import contextlib
import decimal
import functools
import importlib
import locale
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.backends.surroundings import SurroundingsTracker, here, unpack
from forgepar.machine import available_cpus
from forgepar.records import events

PROCESSES = ["forkserver", "spawn", "fork"]
OF_WORKERS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
OF_WORKERS += ("VECLIB_MAXIMUM_THREADS",)  # workers have these where the caller does not

Ask = Callable[..., Any]


def look() -> dict[str, Any]:
    """What there is to see."""
    return {
        "environment": {name: value for name, value in os.environ.items() if name not in OF_WORKERS},
        "folder": str(Path.cwd()),
        "path": list(sys.path),
        "argv": list(sys.argv),
        "recursion limit": sys.getrecursionlimit(),
        "digits": sys.get_int_max_str_digits(),
        "bytecode": (sys.dont_write_bytecode, sys.pycache_prefix),
        "socket timeout": socket.getdefaulttimeout(),
        "temporary folder": tempfile.gettempdir(),
        "locale": locale.setlocale(locale.LC_ALL),
        "decimal": str(decimal.Decimal(1) / 3),
        "hour": time.strftime("%H", time.localtime(0)),
        "level": logging.getLogger("tests.surroundings").getEffectiveLevel(),
        "disabled": logging.getLogger("tests.surroundings").disabled,
        "filter": warnings.filters[0][0],
    }


def variable(name: str) -> str | None:
    return os.environ.get(name)


def set_variables(**variables: str) -> None:
    os.environ.update(variables)


def run(executor: fp.WorkflowExecutor, fn: Callable[..., Any], *args: Any) -> Any:
    wf = fp.Workflow()
    handle = wf.add(fn, *args)
    return executor.run(wf)[handle]


# The ways of having a function called elsewhere; the workers of all but the first are warm from the second call on


@contextlib.contextmanager
def run_anew(**kind: Any) -> Iterator[Ask]:
    def ask(fn: Callable[..., Any], *args: Any) -> Any:
        with fp.WorkflowExecutor(**kind) as executor:
            return run(executor, fn, *args)

    yield ask


@contextlib.contextmanager
def run_warm(**kind: Any) -> Iterator[Ask]:
    with fp.WorkflowExecutor(**kind) as executor:
        yield lambda fn, *args: run(executor, fn, *args)


@contextlib.contextmanager
def submit(**kind: Any) -> Iterator[Ask]:
    with fp.ForgeExecutor(**kind) as executor:
        yield lambda fn, *args: executor.submit(fn, *args).result()


@contextlib.contextmanager
def map_one(**kind: Any) -> Iterator[Ask]:
    with fp.ForgeExecutor(**kind) as executor:
        yield lambda fn, *args: next(
            executor.map(fn, *([arg] for arg in args or [0])) if args else _called(executor, fn)
        )


def _called(executor: fp.ForgeExecutor, fn: Callable[[], Any]) -> Iterator[Any]:
    return executor.map(lambda _: fn(), [0], chunksize=2)


@contextlib.contextmanager
def by_joblib() -> Iterator[Ask]:
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    import forgepar.joblib

    def ask(fn: Callable[..., Any], *args: Any) -> Any:
        found: list[Any] = joblib.Parallel(n_jobs=2, backend="forgepar")([joblib.delayed(fn)(*args)] * 4)
        assert found.count(found[0]) == 4
        return found[0]

    try:
        yield ask
    finally:
        forgepar.joblib.close()


@contextlib.contextmanager
def by_dask_get() -> Iterator[Ask]:
    pytest.importorskip("dask", reason="Dask is not installed")
    from forgepar.integrations.dask_graphs import close_workers

    try:
        yield lambda fn, *args: fp.dask_get({"x": (fn, *args)}, "x", num_workers=1)
    finally:
        close_workers()


WAYS = {
    "inline": lambda: run_warm(backend="inline"),
    "joblib": by_joblib,
    "dask_get": by_dask_get,
    "map": lambda: map_one(workers=1),
    **{f"warm-{method}": lambda method=method: run_warm(workers=1, start_method=method) for method in PROCESSES},
    **{f"pool-{method}": lambda method=method: submit(workers=1, start_method=method) for method in PROCESSES},
}


@pytest.fixture(params=WAYS)
def ask(request) -> Iterator[Ask]:
    with WAYS[request.param]() as ask:
        yield ask


@pytest.fixture
def calm(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Put back all that a test changes of this process."""
    before, variables, context = here(), dict(os.environ), decimal.getcontext().copy()
    logger, disabled = logging.getLogger("tests.surroundings"), logging.root.manager.disable
    level = logger.level
    with warnings.catch_warnings():
        yield monkeypatch
    monkeypatch.undo()
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    time.tzset()
    decimal.setcontext(context)
    sys.setrecursionlimit(before.process.settings.recursion_limit)
    sys.set_int_max_str_digits(before.process.settings.int_max_str_digits)
    socket.setdefaulttimeout(before.process.settings.socket_timeout)
    locale.setlocale(locale.LC_ALL, before.process.settings.locale)
    logger.setLevel(level)
    logger.disabled = False
    logging.disable(disabled)


def set_zone(calm, name: str) -> None:
    calm.setenv("TZ", name)
    time.tzset()


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Path], object]] = {
    "a variable is set": lambda calm, _: calm.setenv("FORGEPAR_A", "1"),
    "it is changed": lambda calm, _: calm.setenv("FORGEPAR_A", "2"),
    "it is no text": lambda calm, _: calm.setenv("FORGEPAR_A", "\udcff\udc80é\n="),
    "it is empty": lambda calm, _: calm.setenv("FORGEPAR_A", ""),
    "it is deleted": lambda calm, _: calm.delenv("FORGEPAR_A"),
    "the time zone": lambda calm, _: set_zone(calm, "Asia/Tokyo"),
    "it again": lambda calm, _: set_zone(calm, "UTC"),
    "the folder": lambda calm, folder: calm.chdir(folder),
    "the path": lambda calm, folder: calm.setattr(sys, "path", [str(folder), "", *sys.path]),
    "the path, shorter": lambda calm, _: calm.setattr(sys, "path", sys.path[1:]),
    "the arguments": lambda calm, _: calm.setattr(sys, "argv", ["program", "--fast"]),
    "the recursion limit": lambda *_: sys.setrecursionlimit(1234),
    "digits of integers": lambda *_: sys.set_int_max_str_digits(9999),
    "bytecode": lambda calm, _: calm.setattr(sys, "dont_write_bytecode", not sys.dont_write_bytecode),
    "bytecode's folder": lambda calm, folder: calm.setattr(sys, "pycache_prefix", str(folder / "cache")),
    "sockets": lambda *_: socket.setdefaulttimeout(77),
    "temporary files": lambda calm, folder: calm.setattr(tempfile, "tempdir", str(folder)),
    "decimal": lambda *_: setattr(decimal.getcontext(), "prec", 5),
    "decimal again": lambda *_: setattr(decimal.getcontext(), "prec", 28),
    "a level": lambda *_: logging.getLogger("tests.surroundings").setLevel(7),
    "no level": lambda *_: logging.getLogger("tests.surroundings").setLevel(logging.NOTSET),
    "a filter": lambda *_: warnings.simplefilter("error"),
    "another filter": lambda *_: warnings.simplefilter("ignore"),
}


def test_a_task_sees_at_each_call_what_its_caller_sees(ask, calm, tmp_path):
    assert ask(look) == look()
    for name, change in CHANGES.items():
        change(calm, tmp_path)
        assert ask(look) == look(), name
    # Of these alone a pool takes no note until something else is changed.
    locale.setlocale(locale.LC_ALL, "C")
    logging.getLogger("tests.surroundings").disabled = True
    calm.setenv("FORGEPAR_A", "3")
    assert ask(look) == look()


@pytest.mark.parametrize("start_method", PROCESSES)
def test_new_workers_see_what_their_caller_sees(start_method, calm, tmp_path):
    with run_anew(workers=1, start_method=start_method) as ask:
        ask(abs, -1)  # now there is a fork server
        for change in CHANGES.values():
            change(calm, tmp_path)
        assert ask(look) == look()


def use_late() -> int:
    return importlib.import_module("module_written_late").X


def test_modules_in_a_folder_added_later_are_found(ask, calm, tmp_path):
    ask(abs, -1)
    (tmp_path / "module_written_late.py").write_text("X = 5\n")
    calm.syspath_prepend(tmp_path)
    assert ask(use_late) == 5
    sys.modules.pop("module_written_late", None)


def test_programs_see_the_same_environment_and_folder(calm, tmp_path):
    with fp.WorkflowExecutor(workers=1) as executor:
        run(executor, abs, -1)
        calm.setenv("FORGEPAR_A", "1")
        calm.chdir(tmp_path)
        assert run(executor, fp.shell("printenv FORGEPAR_A")).stdout == "1\n"
        assert run(executor, fp.shell("pwd")).stdout == f"{tmp_path}\n"


# What tasks change


def change_all(folder: Path) -> None:
    os.environ["FORGEPAR_B"] = "task"
    os.environ.pop("PATH", None)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv[:] = ["task"]
    sys.setrecursionlimit(4321)
    decimal.getcontext().prec = 3
    locale.setlocale(locale.LC_ALL, "C")
    logging.getLogger("tests.surroundings").setLevel(3)
    warnings.simplefilter("always")


@pytest.mark.parametrize("start_method", PROCESSES)
def test_what_a_task_changes_does_not_reach_the_next_run(start_method, tmp_path):
    with fp.WorkflowExecutor(workers=1, start_method=start_method) as executor:
        for _ in range(2):
            run(executor, change_all, tmp_path)
            assert run(executor, look) == look()


@pytest.mark.parametrize("start_method", PROCESSES)
def test_what_a_job_changes_stays_until_the_caller_changes_the_same(start_method, calm):
    with submit(workers=1, start_method=start_method) as ask:
        ask(functools.partial(set_variables, FORGEPAR_A="job", FORGEPAR_B="job"))
        assert [ask(variable, "FORGEPAR_A"), ask(variable, "FORGEPAR_B")] == ["job", "job"]
        calm.setenv("FORGEPAR_A", "caller")
        assert [ask(variable, "FORGEPAR_A"), ask(variable, "FORGEPAR_B")] == ["caller", "job"]


def test_a_module_imported_for_a_task_changes_nothing_after_its_caller(calm, tmp_path):
    (tmp_path / "module_that_sets.py").write_text(
        "import logging, os, sys, warnings\n"
        "os.environ['FORGEPAR_A'] = 'module'\nsys.path.append('module')\nwarnings.simplefilter('error')\n"
        "logging.getLogger('tests.surroundings').setLevel(3)\n"
        "def look():\n    from test_surroundings import look\n    return look()\n"
    )
    calm.syspath_prepend(tmp_path)
    calm.setattr(sys, "path", sys.path[:])
    module = importlib.import_module("module_that_sets")
    calm.setenv("FORGEPAR_A", "caller")
    sys.path.remove("module")
    warnings.simplefilter("ignore")
    logging.getLogger("tests.surroundings").setLevel(logging.NOTSET)
    expected = look()
    for way in (run_anew, submit):
        with way(workers=1) as ask:
            assert ask(module.look) == expected
    del sys.modules["module_that_sets"]


# Moments


def test_jobs_see_the_moment_of_their_submission_and_no_other(calm, tmp_path):
    with fp.ForgeExecutor(1) as executor:
        held = executor.submit(wait_until, (tmp_path / "go").exists, "the word to go")
        jobs, expected = [], []
        for i in range(5):
            jobs += [executor.submit(variable, "FORGEPAR_A") for _ in range(20)]
            with calm.context() as block:
                block.setenv("FORGEPAR_A", str(i))
                jobs += [executor.submit(variable, "FORGEPAR_A") for _ in range(20)]
            expected += [None] * 20 + [str(i)] * 20
        (tmp_path / "go").touch()
        held.result()
        assert [job.result() for job in jobs] == expected


def test_threads_that_submit_all_see_a_change_made_before(calm):
    with fp.ForgeExecutor(1) as executor:
        for i in range(20):
            calm.setenv("FORGEPAR_A", str(i))
            jobs: list[Any] = []
            threads = [
                threading.Thread(target=lambda jobs=jobs: jobs.append(executor.submit(variable, "FORGEPAR_A")))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [job.result() for job in jobs] == [str(i)] * 4


@pytest.mark.parametrize("chunksize", [1, 3])
def test_all_of_a_map_see_the_moment_it_was_called(calm, chunksize):
    def names() -> Iterator[str]:
        for i in range(10):
            os.environ["FORGEPAR_A"] = str(i)
            yield "FORGEPAR_A"

    calm.setenv("FORGEPAR_A", "first")
    with fp.ForgeExecutor(1) as executor:
        found = list(executor.map(variable, names(), chunksize=chunksize))
    assert len(set(found)) == 1


def test_a_worker_that_is_replaced_sees_the_moment_of_its_run(calm, tmp_path):
    def late(event: events.Event) -> None:
        if isinstance(event, events.WorkflowTaskStarted):
            os.environ["FORGEPAR_A"] = "late"

    def once(path: Path) -> str | None:
        if not path.exists():
            path.touch()
            os._exit(1)
        return os.environ["FORGEPAR_A"]

    calm.setenv("FORGEPAR_A", "early")
    wf = fp.Workflow()
    handle = wf.add(fp.task(once).options(retries=1), tmp_path / "died")
    assert wf.run(workers=1, audit=late)[handle] == "early"
    assert os.environ["FORGEPAR_A"] == "late"


# Where workers begin


@pytest.mark.parametrize("start_method", PROCESSES)
def test_an_initializer_sees_the_caller_and_what_it_sets_stays(start_method, calm, tmp_path):
    def begin() -> None:
        os.environ["FORGEPAR_SEEN"] = os.environ.get("FORGEPAR_A", "nothing") + str(Path.cwd()) + warnings.filters[0][0]
        os.environ["OMP_NUM_THREADS"] = "7"

    calm.setenv("FORGEPAR_A", "first")  # after the fork server has begun, in most cases
    calm.chdir(tmp_path)
    warnings.simplefilter("once")
    with fp.ForgeExecutor(1, initializer=begin, start_method=start_method) as executor:
        for value in ("first", "second"):
            calm.setenv("FORGEPAR_A", value)
            assert executor.submit(variable, "FORGEPAR_SEEN").result() == f"first{tmp_path}once"
            assert executor.submit(variable, "OMP_NUM_THREADS").result() == "7"
            assert executor.submit(variable, "FORGEPAR_A").result() == value


def test_workers_keep_their_number_of_threads_where_the_caller_has_none(calm):
    calm.delenv("OMP_NUM_THREADS", raising=False)
    for way in (run_warm, submit):
        with way(workers=1) as ask:
            own = ask(variable, "OMP_NUM_THREADS")
            assert int(own) > 0
            with calm.context() as block:
                block.setenv("OMP_NUM_THREADS", "13")
                assert ask(variable, "OMP_NUM_THREADS") == "13"
            assert ask(variable, "OMP_NUM_THREADS") == own


# Folders that are gone


@pytest.fixture
def gone(calm, tmp_path) -> Path:
    folder = tmp_path / "gone"
    folder.mkdir()
    calm.chdir(folder)
    return folder


def test_a_deleted_folder_is_refused_before_workers_are_asked(gone):
    wf = fp.Workflow()
    wf.add(abs, -1)
    n_children = len(multiprocessing.active_children())
    with fp.WorkflowExecutor(workers=1) as executor, fp.ForgeExecutor(1) as pool:
        assert pool.submit(abs, -1).result() == 1
        gone.rmdir()
        with pytest.raises(fp.WorkingFolderGone, match="working directory of this process was deleted"):
            executor.run(wf)
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="working directory of this process was deleted"):
                pool.submit(abs, -1)
        assert len(multiprocessing.active_children()) <= n_children + 1
        os.chdir(gone.parent)
        assert pool.submit(abs, -1).result() == 1
        executor.run(wf)


@pytest.mark.parametrize("start_method", PROCESSES)
def test_all_tasks_fail_whose_folder_vanishes_meanwhile(start_method, gone):
    wf = fp.Workflow()
    wf.map(abs, range(30))

    def vanish(event: events.Event) -> None:
        if isinstance(event, events.WorkflowStarted):
            os.chdir(gone.parent)
            gone.rmdir()

    with fp.WorkflowExecutor(workers=1, start_method=start_method) as executor:
        os.chdir(gone.parent)
        executor.run(wf)
        os.chdir(gone)
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf, audit=vanish, fail_fast=False)
        assert [type(error) for error in caught.value.exceptions] == [fp.WorkingFolderGone] * 30
        assert all(error.folder == str(gone) and str(gone) in str(error) for error in caught.value.exceptions)
        executor.run(wf)


def test_jobs_fail_whose_folder_vanishes_and_others_do_not(gone):
    with fp.ForgeExecutor(1) as executor:
        os.chdir(gone.parent)
        held = executor.submit(wait_until, (gone.parent / "go").exists, "the word to go")
        os.chdir(gone)
        lost = [executor.submit(os.getcwd) for _ in range(5)]
        os.chdir(gone.parent)
        found = [executor.submit(os.getcwd) for _ in range(5)]
        gone.rmdir()
        (gone.parent / "go").touch()
        held.result()
        for job in lost:
            with pytest.raises(fp.WorkingFolderGone, match=str(gone)):
                job.result()
        assert [job.result() for job in found] == [str(gone.parent)] * 5


# Others' workers, and looking


def test_workers_that_others_own_are_left_as_they_are(calm):
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as owner:
        before = owner.submit(look).result()
        calm.setenv("FORGEPAR_A", "1")
        with fp.WorkflowExecutor(backend=fp.FuturesBackend(owner)) as executor:
            found = run(executor, look)
        assert (found["environment"], found["folder"]) == (before["environment"], before["folder"])


def test_a_tracker_returns_the_same_where_nothing_has_changed_and_again_once_it_is_so_again(calm, tmp_path):
    tracker, others = SurroundingsTracker(), SurroundingsTracker()
    first = tracker.current()
    assert tracker.current() is first
    for name, change in CHANGES.items():
        change(calm, tmp_path)
        others.current()  # which must not hide the change from the first
        assert unpack(tracker.current().packed) == here(), name
    with calm.context() as block:
        now = tracker.current()
        block.setenv("FORGEPAR_A", "patched")
        assert tracker.current() is not now
    assert tracker.current() is now


def test_an_environment_that_a_program_replaced_is_seen_as_it_is(calm):
    calm.setattr(os, "environ", {"FORGEPAR_A": "own"})
    with submit(workers=1) as ask:
        assert ask(variable, "FORGEPAR_A") == "own"
        os.environ["FORGEPAR_A"] = "changed"
        assert ask(variable, "FORGEPAR_A") == "changed"


def test_surroundings_that_never_come_again_do_not_pile_up(calm):
    with fp.ForgeExecutor(1) as executor:
        for i in range(1200):
            calm.setenv("FORGEPAR_A", str(i))
            executor.submit(abs, i)
        called = executor._submissions.sent_callable(abs)
        assert len(called.job_templates) <= 600


CATEGORY = """
import os
FOUND = os.environ.get("OMP_NUM_THREADS")
class Own(UserWarning): pass
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_filters_of_warnings_load_finds_the_number_of_threads_already(calm, tmp_path, method):
    """Such as numpy, which may start a thread for each core when it is loaded, and none later."""
    calm.delenv("OMP_NUM_THREADS", raising=False)
    calm.syspath_prepend(str(tmp_path))
    (tmp_path / "surroundings_category.py").write_text(CATEGORY)
    category = importlib.import_module("surroundings_category")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category.Own)
        with fp.ForgeExecutor(4, start_method=method, initializer=nothing) as executor:
            found = executor.submit(lambda: sys.modules["surroundings_category"].FOUND).result()
    assert found == str(max(1, available_cpus() // 4))


def nothing() -> None:
    pass
