"""What a task can ask for while it runs."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from conftest import PATIENCE, wait_until

import forgepar as fp
from forgepar.workflow.context import RunContext, TaskContext, inside


def told(*_):
    here = fp.context()
    return here.task, here.layer, here.attempt


def test_a_task_knows_its_name_layer_and_attempt(either_backend, tmp_path):
    def second_time(path):
        if not path.exists():
            path.touch()
            raise OSError
        return told()

    wf = fp.Workflow()
    first = wf.map(told, range(200))
    named = wf.add(fp.task(told).options(name="given"), first)
    again = wf.add(told, named)
    retried = wf.add(fp.task(second_time).options(retries=1), tmp_path / "tried")
    for schedule in ("layers", "eager"):
        (tmp_path / "tried").unlink(missing_ok=True)
        result = wf.run(**either_backend, outputs="all", schedule=schedule)
        assert result[first] == [(f"told-{i}", 0, 1) for i in range(200)]
        assert result[named] == ("given", 1, 1)
        assert result[again] == (again.name, 2, 1)
        assert result[retried] == ("second_time", 0, 2)


def test_names_and_layers_are_right_where_tasks_of_a_batch_are_far_apart(either_backend):
    """Every other task waits, so that batches hold every other number, and under "eager" tasks of several layers."""
    wf = fp.Workflow()
    gate = wf.add(abs, 1)
    handles = []
    for i in range(300):
        handles.append(wf.add(told, handles[i - 3] if i % 3 == 2 and i > 2 else gate if i % 2 else 0))
    expected = [
        (name, layer) for handle in handles for name, layer in [(handle.name, int(wf.plan().layers[handle.index]))]
    ]
    for schedule in ("layers", "eager"):
        result = wf.run(**either_backend, outputs="all", schedule=schedule)
        assert [value[:2] for value in result[handles]] == expected


def test_all_tasks_of_a_run_share_its_facts(either_backend):
    def facts(_):
        here = fp.context()
        return here.run_id, here.workflow, here.seed

    wf = fp.Workflow("nightly")
    handles = wf.map(facts, range(4))
    with fp.WorkflowExecutor(**either_backend) as executor:
        first, second = ({*executor.run(wf, seed=7)[handles]} for _ in range(2))
    (one,), (other,) = first, second
    assert one[1:] == ("nightly", 7)
    assert one[0] != other[0]


def test_outside_of_tasks_there_is_none(either_backend):
    with pytest.raises(fp.NotInTask, match="outside of a task"):
        fp.context()
    wf = fp.Workflow()
    wf.add(told)
    wf.run(**either_backend)
    assert inside() is None


def test_threads_of_a_task_share_its_context(either_backend):
    def ask():
        found = []
        thread = threading.Thread(target=lambda: found.append(fp.context() is mine))
        mine = fp.context()
        thread.start()
        thread.join()
        return found

    wf = fp.Workflow()
    asked = wf.add(ask)
    assert wf.run(**either_backend)[asked] == [True]


def test_a_run_inside_of_a_task_has_contexts_of_its_own(either_backend):
    def outer():
        inner = fp.Workflow("inner")
        name = inner.add(lambda: fp.context().workflow)
        before = fp.context()
        value = inner.run()[name]
        return value, fp.context().workflow, before is fp.context()

    wf = fp.Workflow("outer")
    asked = wf.add(outer)
    assert wf.run(**either_backend)[asked] == ("inner", "outer", True)


# Random numbers


def draw(*_):
    rng = fp.context().rng()
    return rng.random(), fp.context().rng().random()


def test_random_numbers_depend_on_seed_and_name_alone(tmp_path):
    def build():
        wf = fp.Workflow()
        first = wf.map(draw, range(50))
        return wf, [*first, wf.add(fp.task(draw).options(name="last"), first)]

    wf, handles = build()
    expected = wf.run(backend="inline", seed=3, outputs="all")[handles]
    assert len({value for pair in expected for value in pair}) == 2 * len(handles)
    for rules in ({"workers": 1}, {"workers": 2, "schedule": "eager"}, {"workers": 3, "start_method": "fork"}):
        wf, handles = build()
        assert wf.run(**rules, seed=3, outputs="all")[handles] == expected
    assert wf.run(backend="inline", seed=4, outputs="all")[handles] != expected


def test_another_attempt_draws_the_same_numbers(tmp_path):
    def draw_and_fail(path):
        value = float(fp.context().rng().random())
        with path.open("a") as file:
            file.write(f"{value}\n")
        if fp.context().attempt < 3:
            raise OSError

    wf = fp.Workflow()
    wf.add(fp.task(draw_and_fail).options(retries=2), tmp_path / "drawn")
    wf.run(workers=1, seed=11)
    drawn = (tmp_path / "drawn").read_text().split()
    assert len(drawn) == 3
    assert len(set(drawn)) == 1


# Cancellation and time


@pytest.mark.parametrize("how", ["token", "failure", "timeout"])
def test_a_task_sees_that_its_run_was_called_off(tmp_path, how):
    def until_cancelled(started, seen):
        before = fp.context().cancelled()
        started.touch()
        wait_until(fp.context().cancelled, "the end of the run")
        seen.write_text(str(before))

    def fail(started):
        wait_until(started.exists, "the other task to start")
        raise OSError

    wf = fp.Workflow()
    wf.add(until_cancelled, tmp_path / "started", tmp_path / "seen")
    if how == "failure":
        wf.add(fail, tmp_path / "started")
    token = fp.CancellationToken()
    with fp.WorkflowExecutor(workers=2) as executor:
        for _ in range(2):  # the second run knows nothing of the first one's end
            if how == "token":
                token = fp.CancellationToken()
                canceller = threading.Thread(
                    target=lambda now=token: (wait_until((tmp_path / "started").exists, "the start"), now.cancel())
                )
                canceller.start()
                assert executor.run(wf, cancel=token).ok
                canceller.join()
            else:
                # Within its grace all is done, so that a run out of time is none that failed.
                with pytest.raises(fp.WorkflowFailed) if how == "failure" else nullcontext():
                    executor.run(wf, timeout=1.0 if how == "timeout" else None)
            assert (tmp_path / "seen").read_text() == "False"
            (tmp_path / "seen").unlink()
            (tmp_path / "started").unlink()


def test_in_this_process_a_token_is_seen_at_once(tmp_path):
    def ask(asked):
        before = fp.context().cancelled()
        asked.touch()
        wait_until(fp.context().cancelled, "the token")
        return before

    token = fp.CancellationToken()
    asked = tmp_path / "asked"
    canceller = threading.Thread(target=lambda: (wait_until(asked.exists, "the task to start"), token.cancel()))
    canceller.start()
    wf = fp.Workflow()
    handle = wf.add(ask, asked)
    assert wf.run(backend="inline", cancel=token)[handle] is False
    canceller.join()


def test_a_task_knows_when_its_time_is_over(either_backend):
    def left():
        here = fp.context()
        return None if here.deadline is None else here.deadline - time.monotonic()

    wf = fp.Workflow()
    free = wf.add(fp.task(left).options(name="free"))
    timed = wf.add(fp.task(left).options(name="timed", timeout=1000))
    assert wf.run(**either_backend)[[free]] == [None]
    result = wf.run(**either_backend, timeout=500)
    assert 500 - PATIENCE < result[free] <= 500
    assert 500 - PATIENCE < result[timed] <= 500
    assert 1000 - PATIENCE < wf.run(**either_backend)[timed] <= 1000


# Scratch and progress


def test_each_attempt_has_a_folder_of_its_own_that_goes_with_it(either_backend):
    def use(_):
        folder = fp.context().scratch
        assert folder == fp.context().scratch
        assert not list(folder.iterdir())
        (folder / "file").write_text("x")
        return folder

    wf = fp.Workflow()
    folders = wf.map(use, range(10))
    with fp.WorkflowExecutor(**either_backend) as executor:
        found = executor.run(wf)[folders]
        assert len(set(found)) == 10
        assert not any(folder.exists() for folder in found)


def test_the_folder_of_a_task_that_dies_goes_too(tmp_path):
    def die(path):
        import os

        part = path.with_suffix(".part")
        part.write_text(str(fp.context().scratch))
        part.rename(path)
        os._exit(1)

    wf = fp.Workflow()
    wf.add(die, tmp_path / "scratch")
    with fp.WorkflowExecutor(workers=1) as executor:
        with pytest.raises(fp.WorkflowFailed):
            executor.run(wf)
        from pathlib import Path

        assert not Path((tmp_path / "scratch").read_text()).exists()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_progress_is_a_share(fraction):
    facts = RunContext("id", "wf", 0, math.inf)
    ways = {"is_cancelled": bool, "say": lambda *_: None, "look": tuple}
    here = TaskContext(facts, "t", 0, 1, 0, ends_at=math.inf, folder=None, **ways)
    with pytest.raises(ValueError, match=f"fraction must be between 0 and 1, got {fraction}"):
        here.progress(fraction)


# Several runs in the threads of one process


BOTH = threading.Barrier(2)


def tell_beside(label):
    """Meet the other run's task before, amid and after."""
    BOTH.wait(PATIENCE)
    before = fp.context().task
    values = fp.empty(100_000)
    BOTH.wait(PATIENCE)
    values[:] = ord(label)
    with ThreadPoolExecutor(1) as threads:
        of_thread = threads.submit(inside).result()
    BOTH.wait(PATIENCE)
    return [before, fp.context().task, of_thread], values


def test_runs_in_several_threads_know_their_own_tasks():
    """Each run's task waits for the other's, so that both are at one at the same moment."""

    def told(label):
        wf = fp.Workflow(label)
        handles = [wf.add(fp.task(tell_beside).options(name=f"{label}{i}"), label) for i in range(5)]
        result = wf.run(backend="inline")
        return [(result[handle][0], set(result[handle][1].tolist())) for handle in handles]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(told, "ab"))
    for label, tasks in zip("ab", found, strict=True):
        # A thread of a task may belong to either: it is told none rather than the wrong one.
        assert tasks == [([f"{label}{i}", f"{label}{i}", None], {float(ord(label))}) for i in range(5)]
    with pytest.raises(fp.NotInTask):
        fp.context()


def test_a_thread_of_a_task_knows_the_task_where_only_one_runs(any_backend):
    def tell():
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(lambda: fp.context().task).result()

    wf = fp.Workflow()
    name = wf.add(fp.task(tell).options(name="one"))
    assert wf.run(**any_backend)[name] == "one"
