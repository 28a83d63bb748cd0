"""A run in a store goes as long as its process lives: in whatever container that is, and whoever forked from it."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import pytest
from unsharing import unshared

import forgepar as fp
from forgepar.store.database import files_of
from forgepar.store.gc import collect
from forgepar.system import life_locks as lifelocks

RUN = """
import os, sys, threading
import forgepar as fp
def wait(path):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    threading.Event().wait()
wf = fp.Workflow("live")
wf.add(fp.task(wait).options(after=[wf.add(bytes, 5000)]), sys.argv[2])
wf.run(backend="inline", store=sys.argv[1])
"""


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs.db"


@pytest.fixture
def start(store, tmp_path):
    """Starts a run that is at a task, and whose first value is in the store."""
    processes = []

    def begin(*before):
        gate = tmp_path / f"at-task-{len(processes)}"
        command = [*before, sys.executable, "-c", RUN, str(store), str(gate)]
        processes.append(subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE))
        wait_until(gate.exists)
        return processes[-1]

    yield begin
    for process in processes:
        kill(process)


def kill(process):
    """Kill a process and all that it started, and wait until that is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not process.stdout.closed:
        process.stdout.read()
        process.stdout.close()


def wait_until(condition):
    for _ in range(10_000):
        if condition():
            return
        threading.Event().wait(0.002)
    pytest.fail("not within 20 s")


def status(store):
    with fp.Store.open(store) as opened:
        return opened.runs()[-1].status


def test_a_run_of_another_pid_namespace_goes_until_it_is_killed(store, start):
    process = start(*unshared())
    assert status(store) == "running"
    assert collect(store, keep=0, max_bytes=0).n_runs == 0
    kill(process)
    wait_until(lambda: status(store) == "interrupted")


def test_what_tells_that_a_run_is_dead_goes_with_its_row(store, start):
    process = start()
    life = next(files_of(store).glob("*.run"))
    kill(process)
    assert status(store) == "interrupted"
    collect(store, keep=1)
    assert life.exists()
    collect(store, keep=0)
    assert not life.exists()


def test_a_run_that_ended_leaves_no_file(store):
    wf = fp.Workflow()
    wf.add(abs, -1)
    wf.run(backend="inline", store=store)
    assert list(files_of(store).iterdir()) == []
    assert status(store) == "completed"


def test_where_locks_do_not_work_a_run_counts_as_going(store, start):
    """As it does for whoever cannot see the locks of another machine."""
    process = start()
    kill(process)
    life = next(files_of(store).glob("*.run"))
    life.write_text(lifelocks.NO_LOCK)
    assert status(store) == "running"
    life.write_text("another kernel")
    assert status(store) == "interrupted"  # this machine before a restart
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("UPDATE runs SET host = 'elsewhere'")
        connection.commit()
    assert status(store) == "running"
    life.write_text(lifelocks.kernel_id())  # another name for this machine, as a container has
    assert status(store) == "interrupted"


FORK = """
import os, sys, threading
import forgepar as fp
parent, children = os.getpid(), []
def fork(*_):
    if os.getpid() == parent and not children:
        children.append(os.fork())
        if not children[0]:
            children[0] = os.getpid()
            {child}
wf = fp.Workflow("forks")
first = wf.add(fp.task(bytes).options(name="first"), 5000)
second = wf.add(lambda value: print("hello") or len(value), first)
code = 0
try:
    result = wf.run(**{run}, store=sys.argv[1], resume=True)
    assert os.getpid() == parent, "the child went on"
    assert result.ok and result[second] == 5000
except fp.WrongProcess:
    assert os.getpid() != parent
    os._exit(9)
code = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
with fp.Store.open(sys.argv[1]) as store:
    print(code, store.run().facts.status, len(list(store.run().events())))
"""


def run_script(tmp_path, text, *arguments):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    command = [sys.executable, "-W", "ignore", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)


@pytest.mark.parametrize("backend", ["workers=1", "backend='inline'"])
@pytest.mark.parametrize("where", ["audit=fork", "show=fork", "audit=[fork, 'run.jsonl']"])
@pytest.mark.parametrize(("child", "code"), [("sys.exit(7)", 7), ("return", 9)])
def test_a_child_that_a_callback_forks_leaves_the_run_to_its_parent(store, tmp_path, backend, where, child, code):
    if (where, backend) == ("show=fork", "backend='inline'"):
        pytest.skip("what is printed inline is not handed to a callback before the end of the task")
    text = FORK.replace("{child}", child).replace("{run}", f"dict({backend}, {where})")
    done = run_script(tmp_path, text, str(store))
    said = done.stdout.splitlines()
    assert done.stderr == ""
    assert said[-1].split()[:2] == [str(code), "completed"]
    if "jsonl" in where:
        log = fp.AuditLog.load(tmp_path / "run.jsonl")
        assert [event.seq for event in log.events] == list(range(len(log.events)))
        assert log.replay().counts == {"completed": 2}


def test_a_child_that_lives_on_does_not_keep_the_lock_of_its_killed_parent(store, tmp_path):
    script = """
    import os, signal, sys
    import forgepar as fp
    parent = os.getpid()
    def fork(event):
        if os.getpid() == parent and type(event).__name__ == "WorkflowTaskStarted":
            if os.fork() == 0:
                signal.pause()
            os.kill(parent, signal.SIGKILL)
    wf = fp.Workflow("forks")
    wf.add(abs, -1)
    wf.run(backend="inline", store=sys.argv[1], resume=True, **({"audit": fork} if sys.argv[2] == "dies" else {}))
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, "-W", "ignore", str(path), str(store)]
    first = subprocess.Popen([*command, "dies"], start_new_session=True, stdout=subprocess.PIPE)
    try:
        assert first.wait() == -signal.SIGKILL
        wait_until(lambda: status(store) == "interrupted")  # once the child has run what follows a fork
        done = subprocess.run([*command, "lives"], capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        kill(first)


def in_child(body):
    """Run a function in a forked child; return its exit code, 0 if it raised nothing."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_store_that_is_open_is_its_own_processes_alone(store):
    wf = fp.Workflow()
    wf.add(abs, -1)
    wf.run(backend="inline", store=store)
    with fp.Store.open(store) as opened:

        def body():
            with pytest.raises(fp.WrongProcess, match="Open the store in this process"):
                opened.runs()
            opened.close()
            assert status(store) == "completed"

        assert in_child(body) == 0
        assert opened.run().value("abs") == 1


@pytest.mark.parametrize("options", [{"workers": 1}, {"backend": "inline"}])
def test_a_child_calls_nothing_of_its_parent_off(options):
    token, codes = fp.CancellationToken(), []

    def fork(event):
        if type(event).__name__ == "WorkflowTaskParallelStarted" and not codes:
            codes.append(in_child(token.cancel))

    wf = fp.Workflow()
    handle = wf.add(lambda: fp.context().cancelled())
    result = wf.run(audit=fork, cancel=token, **options)
    assert (codes, result.status, result[handle]) == ([0], "completed", False)


def test_a_child_frees_nothing_of_its_parents_arena(tmp_path):
    from forgepar.values.arena_folders import open_arena, remove_arena

    arena = open_arena()
    segment = arena.write([b"x" * 100_000])
    try:

        def body():
            arena.free(segment)
            arena.free_strays(os.getppid(), frozenset())
            with pytest.raises(fp.WrongProcess):
                arena.write([b"y" * 100_000])
            remove_arena(arena)

        assert in_child(body) == 0
        assert bytes(arena.read(segment)[0]) == b"x" * 100_000
    finally:
        remove_arena(arena)
