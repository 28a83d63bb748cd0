"""A child that a task forks is nobody's worker: it answers for nothing, and ends when it comes back from the task."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import psutil
import pytest

import forgepar as fp

START_METHODS = ("forkserver", pytest.param("spawn", marks=pytest.mark.slow), "fork")
PRELUDE = """
import os, pathlib, signal, sys
import forgepar as fp

def note(text):
    with open("log", "a") as file:
        file.write(text + "\\n")

def forks(number, how):
    '''Fork in the task of number 1, whose child comes back from it in one way or another.'''
    if number == 1:
        child = os.fork()
        if child == 0:
            print("said by the child")
            if how == "return":
                return 100
            if how == "return much":
                return bytes(200_000)
            if how == "raise":
                raise ValueError("of the child")
            sys.exit(3 if how == "exit" else "a word" if how == "exit with a word" else None)
        note(f"child {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
    note(f"ran {number}")
    return number

def check(values, how):
    code = {"return": 0, "return much": 0, "exit with none": 0, "exit": 3, "raise": 1, "exit with a word": 1}[how]
    assert values == [0, 1, 2, 3, 4], values
    assert os.getpid() == MAIN, "the child went on"
    assert sorted(pathlib.Path("log").read_text().splitlines()) == [f"child {code}", *(f"ran {n}" for n in range(5))]
    pathlib.Path("log").unlink()

MAIN = os.getpid()
"""
WORKFLOW = """
for how in sys.argv[2:]:
    wf = fp.Workflow()
    handles = wf.map(forks, range(5), [how] * 5)
    check(wf.run(**eval(sys.argv[1]))[handles], how)
"""
WAYS = ("return", "return much", "raise", "exit", "exit with a word", "exit with none")
FEW_WAYS = ("return", "raise")


def run_script(folder, text, *arguments):
    path = folder / "script.py"
    path.write_text(PRELUDE + textwrap.dedent(text))
    command = [sys.executable, "-W", "ignore", str(path), *arguments]
    # Files, not pipes: the resource tracker of multiprocessing keeps these open as long as a child lives.
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        done = subprocess.run(command, stdout=out, stderr=err, timeout=60, check=False, cwd=folder)
    done.stdout, done.stderr = (folder / "out").read_text(), (folder / "err").read_text()
    return done


@pytest.mark.parametrize("options", ["backend='inline'", *(f"start_method={m!r}" for m in ("forkserver", "fork"))])
def test_in_a_workflow(tmp_path, options):
    workers = "" if "inline" in options else ", workers=1"
    done = run_script(tmp_path, WORKFLOW, f"dict({options}{workers})", *WAYS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("said by the child\n") == len(WAYS)
    assert "ValueError: of the child" in done.stderr
    assert "a word\n" in done.stderr


@pytest.mark.parametrize("method", ["forkserver", "fork"])
@pytest.mark.parametrize("chunksize", [1, 5])
def test_in_a_pool(tmp_path, method, chunksize):
    text = """
    with fp.ForgeExecutor(1, start_method=sys.argv[1]) as pool:
        for how in sys.argv[3:]:
            check(list(pool.map(forks, range(5), [how] * 5, chunksize=int(sys.argv[2]))), how)
    """
    done = run_script(tmp_path, text, method, str(chunksize), *FEW_WAYS)
    assert done.returncode == 0, done.stderr


def test_in_joblib(tmp_path):
    pytest.importorskip("joblib")
    text = """
    import joblib, forgepar.joblib
    for how in sys.argv[1:]:
        calls = (joblib.delayed(forks)(number, how) for number in range(5))
        check(joblib.Parallel(2, backend="forgepar", batch_size=5)(calls), how)
    forgepar.joblib.close()
    """
    done = run_script(tmp_path, text, *FEW_WAYS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_in_workers_of_other_executors(tmp_path, kind):
    text = f"""
    if __name__ == "__main__":
        from concurrent.futures import {kind.__name__}
        with {kind.__name__}(1) as executor:
            for how in sys.argv[1:]:
                wf = fp.Workflow()
                handles = wf.map(forks, range(5), [how] * 5)
                check(wf.run(backend=fp.FuturesBackend(executor))[handles], how)
    """
    done = run_script(tmp_path, text, *FEW_WAYS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("kind", ["workflow", "pool"])
def test_the_death_of_a_worker_is_seen_though_a_child_of_its_task_lives(tmp_path, method, kind):
    text = """
    def die(first):
        if os.path.exists("log"):
            return "second"
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.pause()
        note(str(child))
        os.kill(os.getpid(), signal.SIGKILL)

    method, kind = sys.argv[1:]
    if kind == "pool":
        with fp.ForgeExecutor(1, start_method=method) as pool:
            print(pool.submit(fp.task(die).options(retries=1), 1).result())
    else:
        wf = fp.Workflow()
        handle = wf.add(fp.task(die).options(retries=1), 1)
        print(wf.run(workers=1, start_method=method)[handle])
    os.kill(int(pathlib.Path("log").read_text()), 0)  # it lives
    """
    try:
        done = run_script(tmp_path, text, method, kind)
        assert (done.returncode, done.stdout) == (0, "second\n"), done.stderr
        child = int((tmp_path / "log").read_text())
        for _ in range(2000):
            if fork_servers(tmp_path) in ([], [child]):
                break
            threading.Event().wait(0.005)
        assert fork_servers(tmp_path) in ([], [child])  # the child's command line is that of the server
    finally:
        os.kill(int((tmp_path / "log").read_text()), signal.SIGKILL)


def fork_servers(folder):
    """The processes that a fork server of a program in a folder is, or has forked."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and "multiprocessing.forkserver" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def empty_in_a_child():
    child = os.fork()
    if child == 0:
        array = fp.empty(100_000)
        array[:] = 1.0
        os._exit(int(array.sum() == 100_000))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("options", [{"backend": "inline"}, {"workers": 1, "start_method": "fork"}])
def test_arrays_made_in_a_child_are_its_own(options):
    wf = fp.Workflow()
    handle = wf.add(empty_in_a_child)
    assert wf.run(**options)[handle] == 1
