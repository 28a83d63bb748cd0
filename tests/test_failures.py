"""What goes wrong with one task, and what the others see of it: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, is_gone, wait_until

import forgepar as fp
from forgepar.records.events import WorkflowDeadlockTimeout, WorkflowTaskTimedOut, WorkflowWorkerDied

SHORT = 0.2  # seconds; a timeout that is meant to be passed, by a task that does nothing else
ENOUGH = 3.0  # seconds; the same, but by then it is to have done something, on a busy machine too
LONG = 600.0  # seconds; a timeout that is not


def hang(*_):
    threading.Event().wait()


def failure_of(wf, **rules) -> fp.WorkflowFailed:
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    return caught.value


# Timeouts


@pytest.mark.parametrize("start_method", ["forkserver", "spawn", "fork"])
def test_a_task_that_takes_too_long_is_ended(start_method):
    wf = fp.Workflow()
    wf.add(fp.task(hang).options(name="slow", timeout=SHORT))
    began = time.monotonic()
    failure = failure_of(wf, workers=1, start_method=start_method)
    assert time.monotonic() - began < PATIENCE
    (error,) = failure.exceptions
    assert isinstance(error, fp.TaskTimeout)
    assert isinstance(error, TimeoutError)
    assert error.seconds == SHORT
    assert "task 'slow' took longer than its timeout of 0.2 s" in str(error)
    (event,) = [event for event in failure.result.events if isinstance(event, WorkflowTaskTimedOut)]
    assert (event.task, event.attempt, event.seconds) == ("slow", 1, SHORT)
    assert not [event for event in failure.result.events if isinstance(event, WorkflowWorkerDied)]


def test_only_its_own_worker_is_ended(tmp_path):
    def until_gone(path, slow_path):
        """Run until the slow task was ended."""
        wait_until(slow_path.exists, "the slow task to start")
        pid = int(slow_path.read_text())
        wait_until(lambda: is_gone(pid), "the slow task's end")
        return os.getpid(), path

    def slow(path):
        part = path.with_suffix(".part")
        part.write_text(str(os.getpid()))
        part.rename(path)
        hang()

    slow_path = tmp_path / "slow"
    wf = fp.Workflow()
    others = [wf.add(until_gone, i, slow_path) for i in range(3)]
    wf.add(fp.task(slow).options(timeout=ENOUGH), slow_path)
    result = failure_of(wf, workers=4, fail_fast=False).result
    assert [result.record(other).attempt for other in others] == [1, 1, 1]
    assert len({result[other][0] for other in others}) == 3


def test_the_rest_of_its_batch_runs_elsewhere(tmp_path):
    def note(i):
        with (tmp_path / "log").open("a") as file:
            file.write(f"{i}\n")
        if i == 150:
            hang()
        return i

    wf = fp.Workflow()
    warm = wf.map(lambda i: i, range(50))
    noted = wf.map(fp.task(note).options(after=warm, timeout=ENOUGH), range(300))
    result = failure_of(wf, workers=2, fail_fast=False).result
    others = [handle for i, handle in enumerate(noted) if i != 150]
    assert result[others] == [i for i in range(300) if i != 150]
    assert isinstance(result.errors[noted[150].name], fp.TaskTimeout)


def test_what_it_started_is_ended_too(tmp_path):
    def with_child(path):
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        part = path.with_suffix(".part")
        part.write_text(str(child.pid))
        part.rename(path)
        child.wait()

    wf = fp.Workflow()
    wf.add(fp.task(with_child).options(timeout=ENOUGH), tmp_path / "pid")
    assert isinstance(failure_of(wf, workers=1).exceptions[0], fp.TaskTimeout)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: is_gone(pid), "the child's end")


def with_stubborn_child(path):
    code = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    part = path.with_suffix(".part")
    part.write_text(str(child.pid))
    part.rename(path)
    child.wait()


@pytest.mark.parametrize("way", ["workflow", "executor", "pool"])
def test_what_it_started_is_killed_where_it_does_not_listen(tmp_path, way):
    """The worker ends at the first signal, so its child can only be known from before."""
    path, fn = tmp_path / "pid", fp.task(with_stubborn_child).options(timeout=ENOUGH)
    wf = fp.Workflow()
    wf.add(fn, path)
    if way == "workflow":
        assert isinstance(failure_of(wf, workers=1).exceptions[0], fp.TaskTimeout)
        wait_until(lambda: is_gone(int(path.read_text())), "the child's end")
        return
    with fp.WorkflowExecutor(1) if way == "executor" else fp.ForgeExecutor(1) as executor:
        if isinstance(executor, fp.WorkflowExecutor):
            with pytest.raises(fp.WorkflowFailed):
                executor.run(wf)
        else:
            with pytest.raises(fp.TaskTimeout):
                executor.submit(fn, path).result()
        wait_until(lambda: is_gone(int(path.read_text())), "the child's end")  # the workers stay


def test_it_may_clean_up_first(tmp_path):
    def clean(path):
        def at_term(*_):
            path.write_text("clean")
            os._exit(0)

        signal.signal(signal.SIGTERM, at_term)
        hang()

    wf = fp.Workflow()
    wf.add(fp.task(clean).options(timeout=ENOUGH), tmp_path / "state")
    assert isinstance(failure_of(wf, workers=1).exceptions[0], fp.TaskTimeout)
    assert (tmp_path / "state").read_text() == "clean"


def test_one_that_does_not_listen_is_killed():
    def deaf():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hang()

    wf = fp.Workflow()
    wf.add(fp.task(deaf).options(timeout=ENOUGH))
    (error,) = failure_of(wf, workers=1).exceptions
    assert isinstance(error, fp.TaskTimeout)
    assert any(note.startswith("where it was") and note.endswith("in deaf") for note in error.__notes__)


def test_it_may_be_tried_again(tmp_path):
    def hang_once(path):
        if not path.exists():
            path.touch()
            hang()
        return "done"

    wf = fp.Workflow()
    handle = wf.add(fp.task(hang_once).options(timeout=ENOUGH, retries=1), tmp_path / "tried")
    result = wf.run(workers=1)
    assert result[handle] == "done"
    assert result.record(handle).attempt == 2


def test_tasks_within_their_timeout_are_left_alone(any_backend):
    wf = fp.Workflow()
    handles = wf.map(fp.task(abs).options(timeout=LONG), range(-200, 0))
    assert wf.run(**any_backend)[handles] == list(range(200, 0, -1))


# Retries


def counted(path: Path, n: int, error: type[Exception]):
    """Fail the first n times; count the tries in a file."""
    with path.open("a") as file:
        file.write(f"{time.perf_counter()}\n")
    if len(path.read_text().split()) <= n:
        raise error("not yet")
    return "done"


def test_only_errors_that_are_worth_it_are_tried_again(any_backend, tmp_path):
    options = {"retries": 5, "retry_on": (KeyError, ConnectionError)}
    wf = fp.Workflow()
    again = wf.add(fp.task(counted).options(**options), tmp_path / "again", 2, ConnectionResetError)
    wf.add(fp.task(counted).options(**options, name="once"), tmp_path / "once", 2, ValueError)
    failure = failure_of(wf, **any_backend, fail_fast=False)
    assert [type(error) for error in failure.exceptions] == [ValueError]
    assert failure.result[again] == "done"
    assert len((tmp_path / "again").read_text().split()) == 3
    assert len((tmp_path / "once").read_text().split()) == 1


def test_a_task_that_waits_for_its_next_try_holds_no_worker(any_backend, tmp_path):
    wait = 1.0
    wf = fp.Workflow()
    again = wf.add(fp.task(counted).options(retries=1, backoff=wait), tmp_path / "tries", 1, OSError)
    others = wf.map(lambda _: time.perf_counter(), range(20))
    result = wf.run(**{**any_backend, "workers": 1} if "workers" in any_backend else any_backend)
    first, second = map(float, (tmp_path / "tries").read_text().split())
    assert second - first >= wait
    assert max(result[others]) < second
    assert result[again] == "done"


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0},
        {"timeout": -1.0},
        {"timeout": "1"},
        {"timeout": float("nan")},
        {"backoff": -1},
        {"backoff": "1"},
        {"retry_on": "ValueError"},
        {"retry_on": (int,)},
        {"retry_on": (KeyboardInterrupt,)},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(fp.WorkflowError, match=next(iter(options)) + "|Backoff"):
        fp.task(abs).options(**options)


# The run as a whole


@pytest.mark.parametrize("rule", ["timeout", "layer_timeout"])
def test_a_run_that_takes_too_long_is_ended_and_says_at_what(rule):
    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(name="first"), -1)
    wf.add(fp.task(hang).options(name="stuck"), first)
    failure = failure_of(wf, workers=2, outputs="all", **{rule: ENOUGH})
    (error,) = failure.exceptions
    assert isinstance(error, fp.RunTimeout)
    assert error.running == ["stuck"]
    assert "'stuck'" in str(error)
    assert ", line" in error.stacks["stuck"]
    assert error.stacks["stuck"].endswith("in hang")
    assert any(note.startswith("where 'stuck' was") for note in error.__notes__)
    assert str(error) in str(failure)
    assert failure.result[first] == 1
    assert failure.result.status_counts() == {"completed": 1, "cancelled": 1}
    (event,) = [event for event in failure.result.events if isinstance(event, WorkflowDeadlockTimeout)]
    assert (event.layer_index, event.running) == (-1 if rule == "timeout" else 1, ("stuck",))


def test_time_runs_out_while_nothing_runs(tmp_path):
    wf = fp.Workflow()
    wf.add(fp.task(counted).options(retries=1, backoff=LONG), tmp_path / "tries", 1, OSError)
    error, *_ = failure_of(wf, workers=1, timeout=ENOUGH).exceptions
    assert isinstance(error, fp.RunTimeout)
    assert error.running == []


def test_a_run_within_its_time_is_left_alone(any_backend):
    wf = fp.Workflow()
    total = wf.add(sum, wf.map(abs, range(10)))
    assert wf.run(**any_backend, timeout=LONG, layer_timeout=LONG)[total] == 45


@pytest.mark.parametrize("rule", ["timeout", "layer_timeout"])
@pytest.mark.parametrize("seconds", [0, -1, "1"])
def test_times_that_cannot_be_are_refused(rule, seconds):
    wf = fp.Workflow()
    wf.add(abs, 1)
    with pytest.raises(ValueError, match=f"{rule} must be a positive number of seconds, or None, got"):
        wf.run(backend="inline", **{rule: seconds})


# Death


def test_a_crash_in_c_tells_where_it_was():
    wf = fp.Workflow()
    wf.add(fp.task(lambda: os.abort()).options(name="crash"))
    (error,) = failure_of(wf, workers=1).exceptions
    assert isinstance(error, fp.WorkerDied)
    assert "signal 6 (SIGABRT)" in str(error)
    assert any("Fatal Python error: Aborted" in note and "test_failures.py" in note for note in error.__notes__)


def test_a_dead_worker_tells_what_memory_it_had():
    wf = fp.Workflow()
    first = wf.add(lambda: bytearray(50_000_000)[0])
    wf.add(lambda _: os._exit(3), first)
    (error,) = failure_of(wf, workers=1).exceptions
    assert error.peak_rss > 50_000_000
    assert any("MiB at most" in note for note in error.__notes__)


def test_a_worker_killed_beside_three_others_disturbs_none(tmp_path):
    def wait_for(path):
        wait_until(path.exists, "the death of the other worker")
        return os.getpid()

    def die(path, killed):
        if path.exists():
            killed.touch()  # the second attempt: the others may go on
            return
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    wf = fp.Workflow()
    others = [wf.add(wait_for, tmp_path / "killed") for _ in range(3)]
    wf.add(fp.task(die).options(retries=1), tmp_path / "tried", tmp_path / "killed")
    result = wf.run(workers=4, outputs="all")
    assert [result.record(other).attempt for other in others] == [1, 1, 1]
    assert len({result[other] for other in others}) == 3
    (event,) = [event for event in result.events if isinstance(event, WorkflowWorkerDied)]
    assert event.exit_code == -signal.SIGKILL


# Wear


def pid_of(_):
    return os.getpid()


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_workers_are_renewed_after_so_many_tasks(schedule):
    wf = fp.Workflow()
    first = wf.map(pid_of, range(50))
    second = wf.map(fp.task(pid_of).options(after=first), range(50))
    with fp.WorkflowExecutor(workers=2, max_tasks_per_worker=7) as executor:
        for _ in range(2):  # a worker's tasks count from run to run
            result = executor.run(wf, outputs="all", schedule=schedule)
            pids = result[first] + result[second]
            assert max(pids.count(pid) for pid in pids) <= 7
            assert not [event for event in result.events if isinstance(event, WorkflowWorkerDied)]
            assert {record.attempt for record in result.records} == {1}


def test_a_worker_that_took_much_memory_is_renewed():
    def take(n_bytes):
        bytearray(n_bytes)
        return os.getpid()

    wf = fp.Workflow()
    large = wf.add(fp.task(take).options(name="large"), 200_000_000)
    after = wf.map(fp.task(take).options(after=large), [10] * 20)
    with fp.WorkflowExecutor(workers=1, max_worker_memory="150MB") as executor:
        result = executor.run(wf, outputs="all")
    assert result[large] not in result[after]
    assert len(set(result[after])) == 1


@pytest.mark.parametrize(
    "rule", [{"max_tasks_per_worker": 0}, {"max_tasks_per_worker": 1.5}, {"max_worker_memory": "x"}]
)
def test_wear_that_cannot_be_is_refused(rule):
    with pytest.raises(ValueError, match=r"must be a positive integer or None|must be a number of bytes"):
        fp.WorkflowExecutor(**rule)


# All at once

FATES = {"kill": 0.02, "raise": 0.02, "hang": 0.002}


def fate_of(seed: int, i: int) -> str:
    """What becomes of the first attempt of a task."""
    import random

    at = random.Random(f"{seed} {i}").random()
    for fate, chance in FATES.items():
        if at < chance:
            return fate
        at -= chance
    return "none"


def chaotic(i: int, seed: int, log: str, *inputs: int) -> int:
    """Note the attempt; meet the task's fate at the first; else return a value that depends on the inputs."""
    path = Path(log)
    with path.open("a") as file:
        file.write(f"{i} {os.getpid()} {fp.context().attempt}\n")
    fate = fate_of(seed, i)
    if fate != "none":
        mark = path.with_name(f"{path.name}-{i}")
        if not mark.exists():
            mark.touch()
            if fate == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fate == "raise":
                raise RuntimeError(f"attempt 1 of {i}")
            hang()
    return (i + sum(inputs)) % 1_000_003


@pytest.mark.parametrize(
    ("schedule", "seed", "n_tasks"),
    [
        ("layers", 1, 2000),
        ("layers", 2, 2000),
        ("layers", 3, 2000),
        ("eager", 1, 2000),
        pytest.param("layers", 4, 20_000, marks=pytest.mark.slow),
        pytest.param("eager", 4, 20_000, marks=pytest.mark.slow),
    ],
)
def test_chaos(tmp_path, seed, n_tasks, schedule):
    width = 50
    log = tmp_path / "log"
    options = {"retries": 3, "timeout": 1.0}
    wf, expected, before = fp.Workflow("chaos"), [], []
    handles = []
    for i in range(n_tasks):
        inputs = [i - width, i - width + 1] if i >= 2 * width else []
        before.append(inputs)
        handles.append(wf.add(fp.task(chaotic).options(**options), i, seed, str(log), *[handles[j] for j in inputs]))
        expected.append((i + sum(expected[j] for j in inputs)) % 1_000_003)
    result = wf.run(workers=4, outputs="all", schedule=schedule)
    assert [result[handle] for handle in handles] == expected
    numbers = {handle.name: i for i, handle in enumerate(handles)}
    attempts: dict[int, list[int]] = {}
    pid_of: dict[tuple[int, int], int] = {}
    for line in log.read_text().splitlines():
        i, pid, attempt = map(int, line.split())
        attempts.setdefault(i, []).append(pid)
        pid_of[i, attempt] = pid
    dead = {pid for i, pids in attempts.items() if fate_of(seed, i) in ("kill", "hang") for pid in pids[:1]}
    for event in result.events:  # on a busy machine others may be too slow as well
        if isinstance(event, WorkflowTaskTimedOut):
            dead.add(pid_of.get((numbers[event.task], event.attempt)))  # None: ended before it could note itself
    for i, pids in attempts.items():
        lost = [pid for pid in pids[:-1] if pid not in dead]
        assert len(lost) == (fate_of(seed, i) == "raise" and pids[0] not in dead), (i, pids)
    assert set(attempts) == set(range(n_tasks))
