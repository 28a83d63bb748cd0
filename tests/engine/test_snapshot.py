"""A run seen from other threads: always as a whole, never half of one moment and half of the next."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from conftest import wait_until

import forgepar as fp


def watched(executor, wf, look, **rules):
    """Run a workflow while a thread looks at its state without pause; return the result and what was seen."""
    seen, failures, over = [], [], threading.Event()

    def watch():
        try:
            while not over.is_set():
                if (state := executor.state) is not None:
                    seen.append(look(state))
        except BaseException as error:
            failures.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = executor.run(wf, **rules)
    finally:
        over.set()
        watcher.join()
    assert not failures
    return result, seen


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_state_is_whole_however_often_it_is_read(schedule):
    """100,000 tasks; each snapshot adds up, and none is older than the one before."""

    def look(state):
        assert sum(state.counts.values()) == state.n_tasks == 100_000
        assert len(state.running) <= 2
        assert 0 <= state.fraction <= 1
        assert len({task.worker for task in state.running}) == len(state.running)
        assert all(task.seconds >= 0 for task in state.running)
        assert state.elapsed_seconds >= 0
        assert state.seconds_left >= 0 or math.isnan(state.seconds_left)
        return state.counts.get("completed", 0), state.layer, state.elapsed_seconds

    wf = fp.Workflow("many")
    row = wf.map(abs, range(10_000))
    for _ in range(9):
        row = wf.map(abs, row)
    with fp.WorkflowExecutor(workers=2) as executor:
        result, seen = watched(executor, wf, look, schedule=schedule)
        assert executor.state is None
    assert result.ok
    assert len(seen) > 5
    assert seen == sorted(seen)


def test_state_names_what_runs_and_how_far_it_is(tmp_path):
    def work(path):
        fp.context().progress(0.5, "halfway")
        (path / "told").touch()
        wait_until((path / "go").exists, "the snapshot")

    wf = fp.Workflow("slow")
    first = wf.add(abs, 1)
    wf.add(fp.task(work).options(name="work", after=first), tmp_path)
    wf.add(fp.task(abs).options(name="later", after=wf.handle("work")), 2)
    states = []

    def look():
        wait_until((tmp_path / "told").exists, "the task to tell")

        def has_told():
            states.append(executor.state)
            return states[-1] is not None and states[-1].running and states[-1].running[0].text == "halfway"

        wait_until(has_told, "the snapshot to have it")
        (tmp_path / "go").touch()

    with fp.WorkflowExecutor(workers=1) as executor:
        looker = threading.Thread(target=look)
        looker.start()
        assert executor.run(wf).ok
        looker.join()
    state = states[-1]
    assert state.workflow == "slow"
    assert dict(state.counts) == {"pending": 1, "running": 1, "completed": 1}
    assert (state.layer, state.n_layers) == (1, 3)
    (running,) = state.running
    assert (running.task, running.worker, running.fraction) == ("work", 0, 0.5)
    assert running.pid > 0
    assert state.seconds_left >= 0


def test_state_tells_the_bytes_that_values_take():
    wf = fp.Workflow()
    array = wf.add(np.zeros, 1 << 20)
    wf.add(np.sum, array)
    with fp.WorkflowExecutor(workers=1) as executor:
        _, seen = watched(executor, wf, lambda state: state.bytes_held)
    assert max(seen) in (0, *range(8 << 20, 17 << 20))


def test_without_a_run_there_is_no_state():
    with fp.WorkflowExecutor(backend="inline") as executor:
        assert executor.state is None


def test_state_grows_with_the_run(either_backend):
    def look(state):
        assert sum(state.counts.values()) == state.n_tasks
        return state.n_tasks

    wf = fp.Workflow()
    listed = wf.add(lambda: list(range(50)))
    for _ in range(3):
        listed = wf.map(abs, listed)
    with fp.WorkflowExecutor(**either_backend) as executor:
        result, seen = watched(executor, wf, look)
    assert seen == sorted(seen)
    assert len(result.records) == 4 + 3 * 51


def test_a_task_sees_how_its_run_stands(either_backend):
    def look(*_):
        return fp.context().run

    wf = fp.Workflow()
    first = wf.map(abs, range(20))
    second = wf.add(look, first)
    run = wf.run(**either_backend)[second]
    assert isinstance(run, fp.RunProgress)
    assert run.n_tasks == 21
    assert run.n_settled <= 20
    assert run.layer in (0, 1)
