"""What the machine refuses (a full disk, a missing folder) is told as that, and not as a fault of a value."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import own_arenas

import forgepar as fp
from forgepar.backends import messages as wire
from forgepar.backends.messages import Failure, Reply, shortened
from forgepar.errors import is_system_error
from forgepar.values import segment_files as files

FAULTS = [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EIO, errno.ENOENT]
NAMES = [errno.errorcode[number] for number in FAULTS]
RULES = {"inline": {"backend": "inline"}, "fork": {"workers": 1, "start_method": "fork"}}


@pytest.fixture(params=RULES)
def rules(request):
    """Of processes the forked ones: they have what a test patches."""
    return RULES[request.param]


@pytest.fixture(params=FAULTS, ids=NAMES)
def fault(request):
    return request.param


class Refusing:
    """Raises an error of the machine when it is pickled, or when it is unpickled."""

    def __init__(self, number, *, where="pickled"):
        self.number = number
        self.where = where

    def __reduce__(self):
        if self.where == "pickled":
            raise OSError(self.number, os.strerror(self.number), "of-the-value")
        return _refuse, (self.number,)


def _refuse(number):
    raise OSError(number, os.strerror(number), "of-the-value")


def returning(number, where):
    return Refusing(number, where=where)


def told(error):
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def is_as_it_is(error, number, what):
    """Assert that an error is that of the machine, names what was at hand, and blames no value."""
    assert isinstance(error, OSError)
    assert error.errno == number
    assert what in told(error)
    assert "cannot be" not in told(error)
    return True


# Values whose own pickling meets the machine


def test_an_argument_that_cannot_be_read(fault, rules):
    wf = fp.Workflow()
    wf.add(fp.task(print).options(name="first"), 1, Refusing(fault))
    with pytest.raises(OSError, match="of-the-value") as caught:
        wf.run(**rules)
    assert is_as_it_is(caught.value, fault, "args[1] of task 'first', a Refusing")


def test_a_constant_of_a_map_that_cannot_be_read(fault, rules):
    wf = fp.Workflow()
    wf.map(print, [1, 2], file=Refusing(fault))
    with pytest.raises(OSError, match="of-the-value") as caught:
        wf.run(**rules)
    assert is_as_it_is(caught.value, fault, "kwargs['file'] of task 'print-0'")


def test_a_callable_that_cannot_be_read(fault, rules):
    held = Refusing(fault)

    def use():
        return held

    wf = fp.Workflow()
    wf.add(use)
    with pytest.raises(OSError, match="of-the-value") as caught:
        wf.run(**rules)
    assert is_as_it_is(caught.value, fault, "the callable of task 'use'")


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_result_that_cannot_be_read(fault, rules):
    wf = fp.Workflow()
    wf.add(returning, fault, "pickled")
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    (error,) = caught.value.exceptions
    assert is_as_it_is(error, fault, "the task's result, a")


def test_a_task_is_tried_again_for_such_an_error(tmp_path, rules):
    def once_unreadable():
        first = tmp_path / "first"
        if first.exists():
            return 7
        first.touch()
        return Refusing(errno.EIO)

    wf = fp.Workflow()
    number = wf.add(fp.task(once_unreadable).options(retries=1, retry_on=OSError))
    assert wf.run(**rules)[number] == 7


def test_the_result_of_a_run_that_cannot_be_made_again(fault, rules):
    wf = fp.Workflow()
    made = wf.add(returning, fault, "unpickled")
    result = wf.run(**rules)
    with pytest.raises(OSError, match="of-the-value") as caught:
        result[made]
    assert caught.value.errno == fault


def test_an_argument_that_cannot_be_made_again(fault, rules):
    wf = fp.Workflow()
    wf.add(id, wf.add(returning, fault, "unpickled"))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    assert [(type(error), error.errno) for error in caught.value.exceptions] == [(type(OSError(fault, "")), fault)]


def test_memory_that_is_wanting_is_no_fault_of_a_value():
    assert is_system_error(MemoryError())
    assert is_system_error(PermissionError(13, "no"))
    assert not is_system_error(TypeError("cannot pickle"))
    with pytest.raises(OSError, match="not readable") as caught, Path(os.devnull).open("w") as file:
        file.read()
    assert not is_system_error(caught.value)  # the object is for writing: that is its own


# The pool


@pytest.fixture(scope="module")
def pool():
    with fp.ForgeExecutor(workers=1, start_method="fork") as pool:
        pool.submit(abs, -1).result()
        yield pool


def test_the_pool_tells_of_arguments_and_callables(pool, fault):
    held = Refusing(fault)
    for job, what in (
        (pool.submit(abs, held), "args[0] is a Refusing"),
        (pool.submit(print, 1, file=[held]), "kwargs['file'] is a list"),
        (pool.submit(lambda: held), "the callable itself"),
    ):
        assert is_as_it_is(job.exception(), fault, what)


def test_the_pool_tells_of_results(pool, fault):
    assert is_as_it_is(pool.submit(returning, fault, "pickled").exception(), fault, "the task's result")
    job = pool.submit(returning, fault, "unpickled")
    assert is_as_it_is(job.exception(), fault, "the job's result was being unpickled")
    with pytest.raises(OSError, match="of-the-value"):
        job.result()
    taking = pool.submit(id, job)
    assert is_as_it_is(taking.exception(), fault, "an argument was being unpickled in the worker")


def test_the_pool_goes_on(pool):
    assert pool.submit(abs, -3).result() == 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO], ids=errno.errorcode.get)
def test_a_result_that_cannot_be_read_from_shared_memory(monkeypatch, number):
    with fp.ForgeExecutor(workers=1, start_method="fork") as pool:
        assert pool.submit(abs, -1).result() == 1  # so that the worker has no part in what follows

        def refuse(path):
            raise OSError(number, os.strerror(number), path)

        monkeypatch.setattr(files, "open_to_read", refuse)
        assert is_as_it_is(pool.submit(np.ones, 100_000).exception(), number, "read from shared memory")
        monkeypatch.undo()
        assert pool.submit(np.ones, 100_000).result().sum() == 100_000


# Shared memory


def refusing(number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("call", ["make", "write_all"])
def test_a_result_that_cannot_be_written_to_shared_memory(monkeypatch, fault, rules, call):
    monkeypatch.setattr(files, call, refusing(fault))
    wf = fp.Workflow()
    wf.add(np.ones, 100_000)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    (error,) = caught.value.exceptions
    assert "cannot be pickled" not in told(error)
    assert "the task's result, a numpy.ndarray" in told(error)
    if (fault, call) == (errno.ENOSPC, "write_all"):
        assert isinstance(error, fp.ArenaFull)
        assert "no room for a value" in str(error)
    else:
        assert error.errno == fault
        assert "for a large value" in told(error) or "a value of " in told(error)


@pytest.mark.parametrize("call", ["make", "write_all"])
def test_an_argument_that_cannot_be_written_to_shared_memory(monkeypatch, fault, rules, call):
    monkeypatch.setattr(files, call, refusing(fault))
    before = own_arenas()  # that of `pool`
    wf = fp.Workflow()
    wf.add(len, np.ones(100_000))
    with pytest.raises(OSError, match=re.escape(os.strerror(fault))) as caught:
        wf.run(**rules)
    assert "cannot be pickled" not in told(caught.value)
    assert own_arenas() == before


def test_a_job_whose_argument_cannot_be_written(monkeypatch, fault):
    with fp.ForgeExecutor(workers=1, start_method="fork") as pool:
        assert pool.submit(abs, -1).result() == 1
        monkeypatch.setattr(files, "make", refusing(fault))
        error = pool.submit(len, np.ones(100_000)).exception()
        assert is_as_it_is(error, fault, "args[0] is a ndarray")
        monkeypatch.undo()
        assert pool.submit(len, np.ones(100_000)).result() == 100_000


def test_the_limit_of_open_files_is_raised_to_write_as_well_as_to_read(monkeypatch, tmp_path):
    raised = []
    opened = os.open

    def open_once_raised(path, flags, mode=0o777):
        if not raised:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return opened(path, flags, mode)

    monkeypatch.setattr(files, "_raise_descriptor_limit", lambda: raised.append(1) is None)
    monkeypatch.setattr(os, "open", open_once_raised)
    os.close(files.make(str(tmp_path / "new")))
    raised.clear()
    os.close(files.open_to_read(str(tmp_path / "new")))
    raised.clear()
    with pytest.raises(FileExistsError):
        files.make(str(tmp_path / "new"))


# Replies that find no room


def test_outcomes_are_not_lost_where_a_long_reply_finds_no_room(monkeypatch, tmp_path):
    caller, refuse, make = os.getpid(), refusing(errno.ENOSPC), files.make
    monkeypatch.setattr(files, "make", lambda path: make(path) if os.getpid() == caller else refuse())
    monkeypatch.setattr(wire, "MESSAGE_LIMIT", 200)  # every reply of some tasks is long

    def note(i):
        with (tmp_path / "effects").open("a") as file:
            file.write(f"{i}\n")
        if i == 150:
            raise ValueError(f"{i} " + "x" * 10_000)
        return "y" * (i % 700)

    wf = fp.Workflow()
    handles = wf.map(note, range(300))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1, start_method="fork", fail_fast=False)
    (error,) = caught.value.exceptions
    assert str(error).startswith("150 xxx")
    done = [caught.value.result[handle] for i, handle in enumerate(handles) if i != 150]
    assert done == ["y" * (i % 700) for i in range(300) if i != 150]
    assert sorted(map(int, (tmp_path / "effects").read_text().split())) == list(range(300))


def _nothing():
    wf = fp.Workflow()
    wf.add(abs, -1)
    return wf


@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("fails", [False, True])
def test_the_parts_of_a_reply_say_what_it_said(monkeypatch, n, fails):
    monkeypatch.setattr(wire, "_LONGEST", 700)
    values = [(b"v" * (i * 37 % 400),) for i in range(n)]
    failure = Failure(5 + n - 1, b"p" * 5000, "ValueError", "t" * 5000, "trace" * 5000) if fails else None
    marks = np.arange(n + 1, dtype=float)
    subflows = [(n // 2, (b"s",))]
    reply = Reply(3, 9, 5, values, marks.tobytes(), failure, True, 1.5, 77, subflows)
    parts = list(shortened(reply))
    assert [value for part in parts for value in part.values] == values
    assert [part.first - 5 for part in parts] == np.cumsum([0, *(len(part.values) for part in parts)])[:-1].tolist()
    for part in parts:
        at = np.frombuffer(part.marks)
        assert at.tolist() == list(range(part.first - 5, part.first - 5 + len(part.values) + 1))
    assert [part.ended for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [part.failure is not None for part in parts] == [False] * (len(parts) - 1) + [fails]
    assert sum(part.cpu_seconds for part in parts) == 1.5
    assert [(part.first - 5 + place, wire) for part in parts for place, wire in part.subflows] == subflows
    assert n < 50 or len(parts) > 5


# Small disks


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.getuid() != 0:
        pytest.skip("mounting a file system takes root")
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_by_tasks_and_arguments(small_disk, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setattr("tempfile.tempdir", None)
    wf = fp.Workflow()
    wf.add(np.ones, 2_000_000)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1, start_method="fork", memory_budget="1MiB")
    assert [type(error) for error in caught.value.exceptions] == [fp.ArenaFull]
    wf = fp.Workflow()
    wf.add(len, np.ones(2_000_000))
    with pytest.raises(fp.ArenaFull, match="no room for a value"):
        wf.run(workers=1, start_method="fork", memory_budget="1MiB")


def test_a_run_whose_store_is_on_a_full_disk_goes_on(small_disk):
    wf = fp.Workflow()
    handles = wf.map(np.full, [200_000] * 4, range(4))
    with pytest.warns(fp.StoreWarning) as warned:
        result = wf.run(workers=1, start_method="fork", store=small_disk / "runs.db")
    assert [array.sum() for array in result[handles]] == [0, 200_000, 400_000, 600_000]
    said = " ".join(str(warning.message) for warning in warned)
    assert "No space left on device" in said or "disk is full" in said
    assert "pickled" not in said


def test_a_stored_value_that_cannot_be_read(tmp_path, fault):
    wf = fp.Workflow()
    wf.add(fp.task(returning).options(name="made"), fault, "unpickled")
    wf.run(backend="inline", store=tmp_path / "runs.db")
    with fp.Store.open(tmp_path / "runs.db") as store, pytest.raises(fp.StoreError) as caught:
        store.run().value("made")
    assert "could not be read" in str(caught.value)
    assert os.strerror(fault) in str(caught.value)
    assert "modules" not in str(caught.value)


# Other doors


def test_a_foreign_executor_tells_as_much(fault):
    with ThreadPoolExecutor(1) as threads, fp.WorkflowExecutor(backend=fp.FuturesBackend(threads, 1)) as executor:
        wf = fp.Workflow()
        wf.add(returning, fault, "pickled")
        with pytest.raises(fp.WorkflowFailed) as caught:
            executor.run(wf)
    assert is_as_it_is(caught.value.exceptions[0], fault, "the task's result")


def test_a_node_of_a_dask_graph_that_cannot_be_read(fault):
    pytest.importorskip("dask")
    with pytest.raises(OSError, match="of-the-value") as caught:
        fp.dask_get({"a": (id, Refusing(fault))}, "a", backend="inline")
    assert is_as_it_is(caught.value, fault, "The node 'a'")


def test_files_that_cannot_be_written_are_named(tmp_path):
    result = _nothing().run(backend="inline")
    missing = tmp_path / "no" / "such.html"
    for write in (result.trace, result.report):
        with pytest.raises(OSError) as caught:
            write(missing)
        assert str(missing.parent) in str(caught.value)
    with pytest.raises(ValueError, match=r"such\.html.*No such file"):
        _nothing().run(backend="inline", audit=str(missing))
    with pytest.raises(fp.StoreError, match=r"such\.html.*No such file"):
        _nothing().run(backend="inline", store=missing)
    with pytest.raises(fp.StoreError, match="there is no run store"):
        fp.Store.open(missing)
    assert not Path(missing.parent).exists()
    assert pickle.loads(pickle.dumps(caught.value)).args
