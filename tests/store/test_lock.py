"""The lock that a run holds on its workflow: one at a time, let go of by whoever ends, however it does."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from forgepar.errors import StoreBusy, StoreError
from forgepar.store.lock import RunLock, remove_stale
from forgepar.system import life_locks

HOLDER = """
import ctypes, os, sys, pathlib, signal
from forgepar.store.lock import RunLock, remove_stale
from forgepar.system import life_locks
lock = RunLock(pathlib.Path(sys.argv[1]), "w", [b"a"])
lock.acquire(wait=False)
if sys.argv[2] == "fork" and os.fork() == 0:
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
if sys.argv[2] == "fork in C" and ctypes.CDLL(None).fork() == 0:
    print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
if sys.argv[2] == "plain":
    print("held", flush=True)
signal.pause()
"""


def lock_on(folder, name="w", fingerprints=(b"a",)):
    return RunLock(folder, name, fingerprints)


def test_one_at_a_time(tmp_path):
    first, second = lock_on(tmp_path), lock_on(tmp_path)
    assert first.try_acquire()
    assert not second.try_acquire()
    with pytest.raises(StoreBusy, match=f"by process {os.getpid()}"):
        second.acquire(wait=False)
    first.release()
    second.acquire(wait=False)
    second.release()
    assert list(tmp_path.iterdir()) == []


def before_the_first_flock(monkeypatch, act):
    """Have something happen between the opening of a file and its locking."""
    flock, calls = fcntl.flock, []

    def late(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            act()
        return flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    return calls


def test_a_file_that_its_holder_removed_after_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    first, second, third = lock_on(tmp_path), lock_on(tmp_path), lock_on(tmp_path)
    assert first.try_acquire()
    before_the_first_flock(monkeypatch, first.release)
    assert second.try_acquire()
    assert len(list(tmp_path.iterdir())) == 1
    assert not third.try_acquire()
    second.release()
    assert third.try_acquire()
    third.release()


def test_nor_is_one_that_another_run_replaced(tmp_path, monkeypatch):
    first, second, third = lock_on(tmp_path), lock_on(tmp_path), lock_on(tmp_path)
    assert first.try_acquire()

    def replace():
        first.release()
        assert third.try_acquire()

    before_the_first_flock(monkeypatch, replace)
    assert not second.try_acquire()
    third.release()
    assert list(tmp_path.iterdir()) == []


def test_releasing_removes_no_file_that_another_run_made(tmp_path):
    first, second = lock_on(tmp_path), lock_on(tmp_path)
    assert first.try_acquire()
    (path,) = tmp_path.iterdir()
    path.unlink()  # as somebody may who cleans up
    assert second.try_acquire()
    first.release()
    assert path.exists()
    assert not lock_on(tmp_path).try_acquire()
    second.release()


def test_stale_locks_are_removed_unless_another_run_has_replaced_them(tmp_path, monkeypatch):
    left = tmp_path / "0123.lock"
    left.touch()
    remove_stale(tmp_path, ())
    assert not left.exists()
    left.touch()

    def replace():
        left.unlink()
        left.touch()

    before_the_first_flock(monkeypatch, replace)
    remove_stale(tmp_path, ())
    assert left.exists()


def test_life_files_go_with_their_runs_unless_these_are_said_to_run(tmp_path):
    for name in ("ended", "killed", "held"):
        path = str(tmp_path / f"{name}.run")
        assert life_locks.hold(path)
        if name != "held":
            life_locks.release(path)
    remove_stale(tmp_path, {"killed"})
    assert {path.name for path in tmp_path.iterdir()} == {"killed.run", "held.run"}
    life_locks.release(str(tmp_path / "held.run"))


@pytest.mark.parametrize("other", [("v", (b"a",)), ("w", (b"b",)), ("w", (b"a", b"b")), ("w", (None,))])
def test_other_workflows_have_other_locks(tmp_path, other):
    first, second = lock_on(tmp_path), lock_on(tmp_path, *other)
    assert first.try_acquire()
    assert second.try_acquire()
    first.release()
    second.release()


def test_waiting_ends_when_the_other_lets_go(tmp_path):
    first, second = lock_on(tmp_path), lock_on(tmp_path)
    first.acquire(wait=True)
    got = threading.Event()
    thread = threading.Thread(target=lambda: (second.acquire(wait=True), got.set()))
    thread.start()
    assert not got.is_set()
    first.release()
    thread.join()
    assert got.is_set()
    assert not lock_on(tmp_path).try_acquire()
    second.release()


def test_many_that_wait_get_it_one_after_the_other(tmp_path):
    inside, most = [], []

    def work():
        lock = lock_on(tmp_path)
        lock.acquire(wait=True)
        inside.append(1)
        most.append(len(inside))
        inside.pop()
        lock.release()

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 16


def test_a_killed_holder_lets_go(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), "plain"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(StoreBusy, match=f"by process {holder.pid}"):
            lock_on(tmp_path).acquire(wait=False)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lock = lock_on(tmp_path)
        lock.acquire(wait=False)
        lock.release()


def test_a_child_of_a_killed_holder_holds_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), "fork"], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert not lock_on(tmp_path).try_acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lock = lock_on(tmp_path)
        assert lock.try_acquire()  # while the child lives
        lock.release()
        holder.stdin.close()


def test_a_child_that_c_code_of_a_killed_holder_forked_is_waited_for(tmp_path, monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), "fork in C"], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with monkeypatch.context() as patched:
            patched.setattr("forgepar.store.lock._UNKNOWN_SECONDS", 0.05)
            with pytest.raises(
                StoreBusy, match=f"by a process that was started by process {holder.pid}, which has ended"
            ):
                lock_on(tmp_path).acquire(wait=False)
        lock, got = lock_on(tmp_path), threading.Event()
        thread = threading.Thread(target=lambda: (lock.acquire(wait=False), got.set()))
        thread.start()
        assert not got.is_set()
        holder.stdin.close()  # at which the child ends
        thread.join()
        assert got.is_set()
        lock.release()


def test_a_child_neither_lets_go_of_nor_keeps_its_parents_lock(tmp_path):
    lock = lock_on(tmp_path)
    assert lock.try_acquire()
    if (child := os.fork()) == 0:
        lock.release()
        del lock
        os._exit(0 if not lock_on(tmp_path).try_acquire() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not lock_on(tmp_path).try_acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_whoever_does_not_say_who_it_is_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """As it is for the moment between the lock and the note, or where the holder runs in another container."""
    monkeypatch.setattr("forgepar.store.lock._UNKNOWN_SECONDS", 0.05)
    first = lock_on(tmp_path)
    assert first.try_acquire()
    (path,) = tmp_path.iterdir()
    pid, _, namespace, kernel, host = path.read_text().split(" ")
    for note, who in {
        "": "an unknown process",
        "1 never": "an unknown process",
        f"{pid} never {namespace} {kernel} {host}": f"a process that was started by process {pid}, which has ended",
        f"{pid} never 7 {kernel} box": f"process {pid} of another container, box",
        f"{pid} never 7 another box": f"process {pid} of another machine, box",
    }.items():
        path.write_text(note)
        with pytest.raises(StoreBusy, match=f"by {who}"):
            lock_on(tmp_path).acquire(wait=False)
    first.release()


def test_a_lock_that_is_let_go_of_is_free_though_forked_children_have_its_file(tmp_path):
    lock = lock_on(tmp_path)
    assert lock.try_acquire()
    (path,) = tmp_path.iterdir()
    with path.open() as waiting:
        reader, writer = os.pipe()
        if (child := ctypes.CDLL(None).fork()) == 0:  # of the other forks' children none has it
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
        lock.release()
        fcntl.flock(waiting, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as whoever waits for it does, without the last
        os.close(writer)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(StoreError, match="cannot be created"):
        lock_on(tmp_path / "nowhere").try_acquire()
