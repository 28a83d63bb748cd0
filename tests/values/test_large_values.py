"""Large values end to end: shared, counted, spilled, released, and nothing left of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, own_arenas, wait_until

import forgepar as fp
from forgepar.records.events import WorkflowValueSpilled
from forgepar.values import arena_folders as folders

MIB = 1 << 20


def zeros(n_bytes):
    return np.zeros(n_bytes, np.uint8)


def plus_one(array):
    return array + 1


def ends(array):
    return int(array[0]), int(array[-1]), array.nbytes


# What others see of it


def test_inputs_cannot_be_written_and_the_error_says_what_to_do(any_backend):
    def write(array):
        array[0] = 1

    wf = fp.Workflow()
    wf.add(fp.task(write).options(name="write"), wf.add(zeros, MIB))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**any_backend)
    (error,) = caught.value.exceptions
    assert isinstance(error, ValueError)
    assert "read-only" in str(error)
    assert any("array.copy()" in note for note in error.__notes__)


def test_other_value_errors_get_no_such_note():
    wf = fp.Workflow()
    wf.add(int, "x")
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(backend="inline")
    assert not any("array.copy()" in note for note in caught.value.exceptions[0].__notes__)


def test_detached_values_can_be_written():
    wf = fp.Workflow()
    first, second = wf.add(zeros, MIB), wf.add(zeros, MIB)
    result = wf.run(backend="inline")
    looked_up = result[first]
    with pytest.raises(ValueError, match="read-only"):
        looked_up[0] = 1
    assert result.detach() is result
    for handle in (first, second):
        result[handle][0] = 7
        assert result[handle][:2].tolist() == [7, 0]
    assert looked_up[0] == 0


def test_a_value_that_a_task_handed_on_can_be_written_when_detached():
    wf = fp.Workflow()
    end = wf.add(np.asarray, wf.add(np.zeros, 50_000))
    array = wf.run(backend="inline").detach()[end]
    array += 1
    assert array.sum() == 50_000


def test_results_outlive_run_and_executor():
    wf = fp.Workflow()
    array = wf.add(zeros, 3 * MIB)
    with fp.WorkflowExecutor(workers=1) as executor:
        result = executor.run(wf)
        again = executor.run(wf)
    assert own_arenas() == set()
    assert ends(result[array]) == ends(again[array]) == (0, 0, 3 * MIB)


# What is written


def test_a_constant_of_many_tasks_is_written_once():
    big = np.ones(4 * MIB, np.uint8)
    wf = fp.Workflow()
    wf.map(lambda _, array: int(array.sum()), range(20), [big] * 20)
    wf.map(lambda _, array: int(array.sum()), range(20), array=big)
    with fp.WorkflowExecutor(workers=2) as executor:
        result = executor.run(wf, outputs="all")
        assert [record.status for record in result.records] == ["completed"] * 40
        assert result.bytes.peak < 1.1 * big.nbytes
        arena = executor._backend.arena
        assert arena.names() == []


def mapped_segments():
    """The segments that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "/forgepar-" in line and not line.endswith(("/meter", "/board"))]


def fails(array):
    raise ValueError(len(array))


@pytest.mark.parametrize("last", [len, fails], ids=["outputs", "failure"])
def test_a_worker_lets_go_of_all_that_it_mapped_for_a_run(last):
    wf = fp.Workflow()
    large = wf.add(zeros, 2 * MIB)
    wf.add(len, wf.add(plus_one, large))
    wf.add(last, large)
    ask = fp.Workflow()
    mapped = ask.add(mapped_segments)
    with fp.WorkflowExecutor(workers=1) as executor:
        assert executor.run(ask)[mapped] == []
        for _ in range(2):
            if last is fails:
                with pytest.raises(fp.WorkflowFailed):
                    executor.run(wf, outputs=[large])
            else:
                assert ends(executor.run(wf, outputs=[large])[large]) == (0, 0, 2 * MIB)
        assert executor.run(ask)[mapped] == []


def test_a_run_tells_what_its_values_took():
    wf = fp.Workflow()
    handles = [wf.add(zeros, 2 * MIB)]
    for _ in range(3):
        handles.append(wf.add(plus_one, handles[-1]))
    small = wf.add(len, handles[-1])
    with fp.WorkflowExecutor(workers=1) as executor:
        executor.run(wf)
        result = executor.run(wf)
    assert all(2 * MIB <= result.record(handle).bytes < 2.1 * MIB for handle in handles)
    assert result.record(small).bytes == 0
    used = result.bytes
    assert used.written == sum(record.bytes for record in result.records)
    assert used.recycled == used.written
    assert used.spilled == 0
    assert 2 * MIB <= used.peak <= 4 * 2.1 * MIB
    assert "values: 8.0 MiB written, 8.0 MiB of it to recycled memory and 0 B to disk; at most" in result.summary()


def test_runs_without_large_values_tell_of_none():
    wf = fp.Workflow()
    wf.add(abs, -1)
    result = wf.run(backend="inline")
    assert result.bytes[:3] == (0, 0, 0)
    assert "values:" not in result.summary()


def holds(array, folder):
    """Hand on a new array, and say how many segments there were while both were held."""
    found = [name for name in os.listdir(folder) if name[:2] in ("mn", "mr")]  # noqa: PTH208
    return np.full_like(array, min(255, len(found) + 1))


def sized_to(free_bytes):
    """Return as many bytes per value, up to 64 MiB, as leave room for eight of them."""
    return min(64 * MIB, max(MIB, free_bytes // 8 // MIB * MIB))


def free_shared_memory():
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0


@pytest.mark.parametrize(("free_bytes", "expected"), [(0, 1), (64 * MIB, 8), (100 * MIB, 12), (1 << 40, 64)])
def test_values_of_tests_fit_in_shared_memory(free_bytes, expected):
    assert sized_to(free_bytes) == expected * MIB


def test_a_pipeline_never_holds_more_than_four_segments():
    n_stages, n_bytes = 200, sized_to(free_shared_memory())
    with fp.WorkflowExecutor(workers=2) as executor:
        warm = fp.Workflow()
        warm.add(abs, 1)
        executor.run(warm)
        arena = executor._backend.arena
        wf = fp.Workflow()
        handle = wf.add(zeros, n_bytes)
        most = []
        for _ in range(n_stages - 1):
            handle = wf.add(holds, handle, str(arena.folder))
            most.append(wf.add(lambda array: int(array[0]), handle))
        result = executor.run(wf, outputs=most)
        assert max(result[most]) <= 4
        assert result.bytes.peak <= 4 * 1.1 * n_bytes
        assert arena.usage().n_segments == 0


# Where there is little room


def spill_workflow(n, n_bytes):
    wf = fp.Workflow()
    arrays = [wf.add(np.full, n_bytes, i, np.uint8) for i in range(n)]
    return wf, [wf.add(ends, wf.add(plus_one, array)) for array in arrays]


def test_what_exceeds_the_budget_is_spilled_with_equal_results():
    n, n_bytes = 8, 4 * MIB
    wf, found = spill_workflow(n, n_bytes)
    with fp.WorkflowExecutor(workers=2, memory_budget="10MiB") as executor:
        result = executor.run(wf)
        assert executor._backend.arena.usage().peak <= 10 * MIB
    assert result[found] == [(i + 1, i + 1, n_bytes) for i in range(n)]
    assert result.bytes.spilled >= n_bytes
    (event,) = [event for event in result.events if isinstance(event, WorkflowValueSpilled)]
    assert (event.task.partition("-")[0], event.budget) == ("full", 10 * MIB)


@pytest.fixture
def small_memory(tmp_path, monkeypatch):
    """A file system of 64 MiB in the place of shared memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.getuid() != 0:
        pytest.skip("mounting a file system takes root")
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    monkeypatch.setattr(folders, "_MEMORY", folder)
    yield folder
    subprocess.run([shutil.which("umount"), "-l", str(folder)], check=True)  # the failed run may still be looked at


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_a_small_shared_memory_is_used_and_what_does_not_fit_spilled(small_memory, monkeypatch, budget):
    if budget:  # believe in more than there is, so that the file system is really full
        monkeypatch.setattr(folders, "_free_memory", lambda: 1 << 40)
    n, n_bytes = 10, 16 * MIB
    wf, found = spill_workflow(n, n_bytes)
    result = wf.run(workers=2, memory_budget=budget)
    assert result[found] == [(i + 1, i + 1, n_bytes) for i in range(n)]
    assert result.bytes.spilled >= 4 * n_bytes
    assert list(small_memory.iterdir()) == []


def test_no_room_anywhere_is_the_tasks_own_error(small_memory, monkeypatch):
    monkeypatch.setattr(folders.tempfile, "tempdir", str(small_memory))
    wf = fp.Workflow()
    wf.add(fp.task(zeros).options(name="large"), 80 * MIB)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1)
    (error,) = caught.value.exceptions
    assert isinstance(error, fp.ArenaFull)
    assert "Give a larger memory_budget=" in str(error)


@pytest.mark.parametrize("budget", ["much", -1, 1.5])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="must be a number of bytes, or a string such as"):
        fp.WorkflowExecutor(memory_budget=budget)


# What is left

PROGRAM = """
import os, signal, sys, threading, time
import numpy as np
import forgepar as fp

def make(i):
    if kill_worker and i == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full(2_000_000, i)

kill_worker = sys.argv[1] == "worker"
print("begins", flush=True)
with fp.WorkflowExecutor(workers=2) as executor:
    for _ in range(int(sys.argv[2])):
        wf = fp.Workflow()
        sums = wf.map(np.sum, wf.map(make, range(8)))
        try:
            result = executor.run(wf)
            print(sum(result[sums]), flush=True)
        except fp.WorkflowFailed as failed:
            assert isinstance(failed.exceptions[0], fp.WorkerDied), failed.exceptions
            kill_worker = False
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def left_by(pids) -> list[str]:
    """Arenas of some processes."""
    roots = [root for root in (Path("/dev/shm"), Path(folders.tempfile.gettempdir())) if root.is_dir()]
    marks = tuple(f"forgepar-{os.getuid()}-{pid}-" for pid in pids)
    return [entry.name for root in roots for entry in root.iterdir() if entry.name.startswith(marks)]


def run_and_kill(program, seed):
    """Run the program and kill it at a random moment after it began; return its number."""
    with subprocess.Popen(
        [sys.executable, str(program), "parent", "1000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        running.stdout.readline()
        delay = random.Random(seed).uniform(0.0, 0.6)
        try:
            running.wait(delay)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.stdout.read()  # workers have it too: at its end they are gone
    assert running.returncode == -signal.SIGKILL
    return running.pid


def check_a_run(program, kind):
    """Run the program to its end; return its number."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(program), kind, "2"], stdout=pipe, stderr=pipe, text=True) as running:
        told, errors = running.communicate(timeout=PATIENCE)
    assert (running.returncode, errors) == (0, "")
    n_good = 1 if kind == "worker" else 2
    assert told.split()[1:] == [str(2_000_000 * 28)] * n_good
    return running.pid


@pytest.mark.parametrize("n_runs", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_leave_nothing_once_another_has_run(program, n_runs):
    pids = []
    for number in range(n_runs):
        kind = ("parent", "none", "worker", "none", "none")[number % 5]
        pids.append(run_and_kill(program, number) if kind == "parent" else check_a_run(program, kind))
    pids.append(check_a_run(program, "none"))
    wait_until(lambda: not left_by(pids), "everything to be swept")
