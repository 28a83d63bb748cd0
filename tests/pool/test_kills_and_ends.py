"""Jobs that are killed before they run, and pools that nothing refers to any more."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, is_gone, wait_until

import forgepar as fp
from forgepar.scheduling.durations import Durations


def wait_or_write(path, *, waits):
    """Write a file; then wait for another one, if the job is to wait."""
    path.touch()
    if waits:
        with Path(f"{path}-gate").open() as file:
            file.read()
    return os.getpid()


@pytest.fixture
def pool(monkeypatch):
    """A pool with one worker that expects all jobs to be short, and so gets several at once."""
    observe = Durations.observe

    def expects_short(self, number, seconds, n_tasks):
        observe(self, number, min(seconds, 1e-6 * n_tasks), n_tasks)

    monkeypatch.setattr(Durations, "observe", expects_short)
    with fp.ForgeExecutor(1) as pool:
        yield pool


def held(pool, tmp_path, n_behind):
    """Have a pool's worker run a job that waits for its gate, with others behind it that the worker has already."""
    os.mkfifo(tmp_path / "first-gate")
    for n in range(3):  # the duration is known
        pool.submit(wait_or_write, tmp_path / f"before-{n}", waits=False).result(PATIENCE)
    first = pool.submit(wait_or_write, tmp_path / "first", waits=True)
    wait_until((tmp_path / "first").exists, "the first job")
    scheduler = pool._scheduler
    scheduler._wake = lambda: None  # all of them are to be one batch
    behind = [pool.submit(wait_or_write, tmp_path / f"behind-{n}", waits=False) for n in range(n_behind)]
    del scheduler._wake
    scheduler._wake()
    wait_until(lambda: all(future.running() for future in behind), "the worker to have all")
    return first, behind


def open_gate(path):
    with Path(f"{path}-gate").open("w") as file:
        file.write("on")


@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_killed_job_that_its_worker_has_not_begun_ends_at_once_and_never_runs(which, pool, tmp_path):
    first, behind = held(pool, tmp_path, 4)
    try:
        assert not behind[which].cancel()  # a worker has it
        behind[which].kill()
        error = behind[which].exception(PATIENCE)
        assert isinstance(error, fp.WorkerDied)
        assert "killed before a worker began it" in str(error)
        assert not first.done()
    finally:
        open_gate(tmp_path / "first")
    worker = first.result(PATIENCE)
    left = [future for place, future in enumerate(behind) if place != which]
    assert [future.result(PATIENCE) for future in left] == [worker] * 3  # nothing had to be killed for it
    assert not (tmp_path / f"behind-{which}").exists()
    assert pool.submit(os.getpid).result(PATIENCE) == worker


def test_many_killed_jobs_of_one_worker_end(pool, tmp_path):
    first, behind = held(pool, tmp_path, 6)
    try:
        for future in reversed(behind):
            future.kill()
        assert all(isinstance(future.exception(PATIENCE), fp.WorkerDied) for future in behind)
    finally:
        open_gate(tmp_path / "first")
    first.result(PATIENCE)
    assert not list(tmp_path.glob("behind-*"))


def test_a_first_job_is_killed_with_its_worker_and_those_behind_it_run(pool, tmp_path):
    first, behind = held(pool, tmp_path, 3)
    behind[1].kill()
    first.kill()
    assert "as kill() requested" in str(first.exception(PATIENCE))
    assert isinstance(behind[1].exception(PATIENCE), fp.WorkerDied)
    assert behind[0].result(PATIENCE) == behind[2].result(PATIENCE)
    assert not (tmp_path / "behind-1").exists()


def fail(path):
    with path.open("a") as file:
        file.write("x")
    raise ValueError("again")


@pytest.mark.parametrize("way", ["kill", "interrupt"])
def test_a_job_that_waits_for_its_retry_ends_when_it_is_killed(way, tmp_path):
    task = fp.task(fail).options(retries=5, backoff=1e6)
    pool = fp.ForgeExecutor(1)
    future = pool.submit(task, tmp_path / "tries")
    wait_until(lambda: pool._scheduler._job_table.deadlines._retries, "the first try to fail")
    assert not future.cancel()
    if way == "kill":
        future.kill()
    else:
        pool._scheduler.close(kills=True)  # as an interrupt does
    assert "killed before a worker began it again" in str(future.exception(PATIENCE))
    pool.shutdown()
    assert (tmp_path / "tries").read_text() == "x"


def test_a_job_that_fails_by_itself_after_a_kill_is_not_tried_again(tmp_path):
    with fp.ForgeExecutor(1) as pool:
        future = pool.submit(fp.task(fail).options(retries=3), tmp_path / "tries")
        future.job.is_to_be_killed = True  # the request came, and the job failed before its worker was killed
        assert isinstance(future.exception(PATIENCE), (ValueError, fp.WorkerDied))
    assert (tmp_path / "tries").read_text() == "x"


class NotToBePickled:
    def __reduce__(self):
        raise TypeError("no")


class NotToBePickledFor:
    def __reduce__(self):
        try:
            int("x")
        except ValueError as error:
            raise TypeError("no") from error


KEPT = {
    "large": lambda pool: pool.submit(np.ones, 100_000),
    "small": lambda pool: pool.submit(list, [1.0]),
    "put": lambda pool: pool.put([1.0]),
    "failed": lambda pool: pool.submit(int, "x"),
    "not pickled": lambda pool: pool.submit(list, NotToBePickled()),
    "not pickled, with a cause": lambda pool: pool.submit(list, NotToBePickledFor()),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_pool_that_nothing_refers_to_ends_though_its_futures_are_kept(kind):
    pool = fp.ForgeExecutor(1)
    worker, future = pool.submit(os.getpid).result(), KEPT[kind](pool)
    other = pool.submit(abs, -1)
    other.result(PATIENCE)
    thread, gone = pool._scheduler._thread, weakref.ref(pool)
    del pool
    assert gone() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()
    wait_until(lambda: is_gone(worker), "the worker to end")
    error = future.exception()
    if error is None:
        assert np.all(np.array(future.result()) == 1.0)
    elif kind != "failed":
        assert "__reduce__" in "".join([str(error.__cause__), *getattr(error, "__notes__", ())])


def test_an_exception_that_the_caller_handles_keeps_its_traceback():
    def submit():
        try:
            int("x")
        except ValueError as error:
            return error, pool.submit(list, NotToBePickled()).exception()

    with fp.ForgeExecutor(1) as pool:
        handled, error = submit()
    assert isinstance(error, TypeError)
    assert handled.__traceback__ is not None
