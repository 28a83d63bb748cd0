"""The loop between the state machine and a backend: what neither shows alone."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.backends.base import UNKNOWN_POSITION, Joined, Lost, Traits
from forgepar.backends.inline import InlineBackend
from forgepar.engine import run_source
from forgepar.engine.slots import SlotScheduler
from forgepar.values.codec import BLOB_LIMIT


def total(*values):
    return sum(values)


def grid(width, depth):
    """A stencil: tasks at the border take two values, inner ones three, so that templates alternate."""
    wf = fp.Workflow("grid")
    row = [wf.add(total, 1) for _ in range(width)]
    for _ in range(depth - 1):
        row = [wf.add(total, *row[max(i - 1, 0) : i + 2]) for i in range(width)]
    return wf, row


def grid_values(width, depth):
    values = [1] * width
    for _ in range(depth - 1):
        values = [sum(values[max(i - 1, 0) : i + 2]) for i in range(width)]
    return values


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_batches_keep_to_one_template_however_often_the_order_is_weighed(monkeypatch, any_backend, schedule):
    monkeypatch.setattr(run_source, "_WEIGH_SECONDS", 0.0)
    wf, last = grid(30, 12)
    result = wf.run(**any_backend, schedule=schedule)
    assert result[last] == grid_values(30, 12)


def test_the_parent_never_unpickles_what_only_passes_through():
    class Mine:
        """Can be unpickled in a worker only: there, the run says so."""

        def __init__(self, worker):
            self.worker = worker

        def __setstate__(self, state):
            from forgepar.backends.worker import inside_worker

            assert inside_worker(), "unpickled in the parent"
            self.__dict__.update(state)

    wf = fp.Workflow()
    made = wf.map(lambda i: Mine(i), range(6))
    used = wf.map(lambda mine: mine.worker, made)
    assert wf.run(workers=2)[used] == list(range(6))


def test_values_are_freed_as_soon_as_nobody_is_to_take_them(tmp_path):
    """Stage after stage makes a segment; the arena never holds more than those in use."""
    counts = []

    def stage(before):
        return np.zeros(BLOB_LIMIT) + (0 if before is None else before[0] + 1)

    with fp.WorkflowExecutor(backend="inline") as executor:
        wf = fp.Workflow()
        handle = wf.add(stage, None)
        for _ in range(20):
            handle = wf.add(stage, handle)
        executor._backend.open(2)
        arena = executor._backend.arena
        read = arena.read

        def counted(segment):
            counts.append(len(arena.names()))
            return read(segment)

        arena.read = counted
        assert executor.run(wf)[handle][0] == 20
        assert arena.names() == []
    assert len(counts) >= 20
    assert max(counts) <= 2


def test_values_nobody_takes_and_nobody_asked_for_are_freed():
    with fp.WorkflowExecutor(backend="inline") as executor:
        wf = fp.Workflow()
        wf.add(np.zeros, BLOB_LIMIT)
        kept = wf.add(abs, -1)
        assert executor.run(wf, outputs=[kept])[kept] == 1
        assert executor._backend.arena.names() == []


def test_what_is_claimed_from_a_stalled_worker_runs_once(tmp_path):
    """A worker that takes up a slow task gives the tasks behind it back unasked; each runs exactly once."""
    log = tmp_path / "log"

    def step(i, path, n):
        with path.open("a") as file:
            file.write(f"{i}\n")
        if i == 0:
            wait_until(lambda: path.read_text().count("\n") == n, "all others to run")
        return i

    wf = fp.Workflow()
    quick = wf.map(abs, range(3000))
    steps = wf.map(fp.task(step).options(after=quick), range(100), path=log, n=100)
    with fp.WorkflowExecutor(workers=2) as executor:
        assert executor.run(wf)[steps] == list(range(100))
    assert sorted(map(int, log.read_text().split())) == list(range(100))


def test_a_batch_of_one_failing_and_many_good_tasks_keeps_the_good(any_backend):
    wf = fp.Workflow()
    warm = wf.map(abs, range(500))
    values = wf.map(fp.task(lambda i: 10 // (i - 50)).options(after=warm), range(100))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**any_backend, fail_fast=False)
    result = caught.value.result
    assert result.status_counts() == {"completed": 599, "failed": 1}
    assert result[values[49]] == -10
    assert len(result.errors) == 1


def test_an_idle_worker_waits_without_being_asked_again(monkeypatch):
    """While tasks run and nothing can be claimed, the parent sleeps: it is not woken by a timer."""
    patience = []
    asked = SlotScheduler.patience

    def recorded(self, *look_at):
        patience.append(asked(self, *look_at))
        return patience[-1]

    monkeypatch.setattr(SlotScheduler, "patience", recorded)
    wf = fp.Workflow()
    wf.add(abs, -1)
    wf.run(workers=2)
    assert set(patience) == {None}


class Losing(InlineBackend):
    """Loses its worker, without a word where that was, under batches with certain tasks; notes all that it runs."""

    traits = Traits(remembers=False)

    def __init__(self, killers, n_kills=1000):
        super().__init__()
        self.killers = killers
        self.n_kills = n_kills
        self.batches = []

    def wait(self, timeout):
        if self._waiting:
            batch = self._waiting[0]
            first = batch.tasks if isinstance(batch.tasks, int) else None
            assert first is not None, "tasks of one map are consecutive"
            tasks = list(range(first, first + batch.n_tasks))
            self.batches.append(tasks)
            if self.killers.intersection(tasks) and self.n_kills:
                self.n_kills -= 1
                self._waiting.clear()
                return [Lost(0, 1, None, UNKNOWN_POSITION, 0.0, None), Joined(0, 2)]
        return super().wait(timeout)


def test_a_task_that_loses_worker_after_worker_is_found_though_nothing_tells():
    backend = Losing({17})
    wf = fp.Workflow()
    tasks = wf.map(lambda i: i, range(40))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend=backend, fail_fast=False)
    result = caught.value.result
    assert list(result.errors) == ["lambda-17"]
    assert isinstance(result.errors["lambda-17"], fp.WorkerDied)
    assert [result[task] for task in tasks if task.name != "lambda-17"] == [i for i in range(40) if i != 17]
    lost = [batch for batch in backend.batches if 17 in batch]
    assert [len(batch) for batch in lost[1:]] == [1] * len(lost[1:])
    assert len(lost) in (3, 4)  # the first may be counted to the batch before it


def test_tasks_whose_worker_went_for_no_fault_of_theirs_run_again():
    backend = Losing({5, 30}, n_kills=2)
    wf = fp.Workflow()
    tasks = wf.map(lambda i: i, range(40))
    result = wf.run(backend=backend)
    assert result[tasks] == list(range(40))
    assert result.ok


def test_a_batch_brings_all_that_it_needs_where_workers_remember_nothing():
    class Forgetful(InlineBackend):
        traits = Traits(remembers=False)

        def wait(self, timeout):
            if self._waiting:
                self._waiting[0] = self._worker.without_known(self._waiting[0])
                self._worker._begin_run(-1)
                batch = self.sent.pop(0)
                self._waiting[0] = batch
            return super().wait(timeout)

        def send(self, slot, batch):
            self.sent.append(batch)
            super().send(slot, batch)

    backend = Forgetful()
    backend.sent = []
    wf = fp.Workflow()
    level = wf.map(lambda i: [i], range(10))
    for _ in range(3):
        level = wf.map(lambda values: [*values, "x" * 2000], level)
    assert wf.run(backend=backend)[level] == [[i, *["x" * 2000] * 3] for i in range(10)]
