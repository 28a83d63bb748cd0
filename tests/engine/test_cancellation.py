"""Calling off: what the token promises, and what a run does when it is called off."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
from conftest import PATIENCE, own_arenas, wait_until

import forgepar as fp
from forgepar.records.events import WorkflowCancelled, WorkflowTaskCompleted, WorkflowTaskFailed

# The token


def test_a_child_ends_with_its_parent_and_not_the_other_way_round():
    parent = fp.CancellationToken()
    child, other = parent.child(), parent.child()
    grandchild = child.child()
    child.cancel()
    assert [token.is_cancelled for token in (parent, child, grandchild, other)] == [False, True, True, False]
    parent.cancel(kill=True)
    assert [token.is_cancelled for token in (parent, child, grandchild, other)] == [True] * 4
    assert [token.kills for token in (parent, child, grandchild, other)] == [True] * 4


def test_a_child_of_what_is_cancelled_is_cancelled():
    parent = fp.CancellationToken()
    parent.cancel(kill=True)
    assert parent.child().is_cancelled
    assert parent.child().kills


def test_those_who_asked_are_told_once_and_again_for_a_kill():
    token, told = fp.CancellationToken(), []
    token.on_cancel(lambda: told.append("first"))
    forget = token.on_cancel(lambda: told.append("second"))
    forget()
    token.cancel()
    token.cancel()
    assert told == ["first"]
    token.cancel(kill=True)
    token.cancel(kill=True)
    assert told == ["first", "first"]
    token.on_cancel(lambda: told.append("late"))
    assert told[2:] == ["late"]


def test_time_calls_it_off(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    token = fp.CancellationToken.with_timeout(5.0)
    child = token.child()
    short = fp.CancellationToken.with_timeout(2.0, parent=token)
    long = fp.CancellationToken.with_timeout(50.0, parent=token)
    for later, expected in ((1.9, [False] * 4), (2.0, [False, False, True, False]), (5.0, [True] * 4)):
        now[0] = 100.0 + later
        assert [each.is_cancelled for each in (token, child, short, long)] == expected


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="must be a positive number of seconds, or None"):
        fp.CancellationToken.with_timeout(seconds)


def test_a_signal_handler_may_call_it_off_while_the_token_is_busy():
    token = fp.CancellationToken()
    token.on_cancel(lambda: token.cancel(kill=True))  # from within, as a handler would
    token.cancel()
    assert token.kills


def live_tokens():
    gc.collect()
    return sum(type(thing) is fp.CancellationToken for thing in gc.get_objects())


def test_a_parent_keeps_no_children_that_nobody_uses():
    parent, before = fp.CancellationToken(), live_tokens()
    for _ in range(1000):
        parent.child().child().on_cancel(list)()  # what is forgotten again
    held = parent.child()
    assert live_tokens() == before + 1
    assert len(parent._children) == 1
    parent.cancel()
    assert held.is_cancelled


def test_a_run_leaves_no_token_behind():
    parent, before = fp.CancellationToken(), live_tokens()
    for _ in range(5):
        wf = fp.Workflow()
        wf.add(abs, -1)
        wf.run(backend="inline", cancel=parent.child())
    assert live_tokens() == before


@pytest.mark.parametrize("kill", [False, True])
def test_a_child_that_only_its_callback_needs_is_still_called_off(kill):
    parent, told = fp.CancellationToken(), []
    parent.child().child().on_cancel(lambda: told.append("grandchild"))
    forget = parent.child().on_cancel(lambda: told.append("forgotten"))
    kept = parent.child().child().child()  # holds those between
    gc.collect()
    forget()
    parent.cancel(kill=kill)
    assert told == ["grandchild"]
    assert (kept.is_cancelled, kept.kills) == (True, kill)


def test_a_run_by_a_child_that_nobody_else_holds_is_called_off():
    parent = fp.CancellationToken()

    def call_off(event):
        if isinstance(event, WorkflowTaskCompleted):
            gc.collect()
            parent.cancel()

    wf = fp.Workflow()
    value = -1
    for _ in range(20):
        value = wf.add(abs, value)
    result = wf.run(backend="inline", cancel=parent.child(), audit=call_off)
    assert result.status == "cancelled"


def test_threads_that_make_and_cancel_children_do_not_wait_for_each_other():
    parent = fp.CancellationToken()
    told = []

    def live():
        for _ in range(300):
            child = parent.child()
            forget = child.child().on_cancel(lambda: told.append(1))
            child.cancel()
            forget()

    threads = [threading.Thread(target=live) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 4 * 300
    assert len(parent._kept) == 0


# Runs


def note_and_wait(started, go):
    started.touch()
    wait_until(go.exists, "the word to go on")
    return "came to its end"


def test_a_run_that_is_called_off_lets_what_runs_come_to_its_end(tmp_path):
    token = fp.CancellationToken()
    started, go = tmp_path / "started", tmp_path / "go"
    wf = fp.Workflow()
    before = wf.add(abs, -1)
    running = wf.add(fp.task(note_and_wait).options(after=before), started, go)
    after = wf.add(fp.task(abs).options(name="after"), running)

    def call_off():
        wait_until(started.exists, "the task to start")
        token.cancel()

    def let_go(event):
        if isinstance(event, WorkflowCancelled):
            go.touch()

    caller = threading.Thread(target=call_off)
    caller.start()
    result = wf.run(workers=2, cancel=token, outputs="all", audit=let_go)
    caller.join()
    assert result.status == "cancelled"
    assert result[running] == "came to its end"
    assert result.status_counts() == {"completed": 2, "cancelled": 1}
    with pytest.raises(fp.MissingResult, match="it was cancelled"):
        result[after]
    (event,) = [event for event in result.events if isinstance(event, WorkflowCancelled)]
    assert (event.kills, event.running) == (False, ("note_and_wait",))


@pytest.mark.parametrize("at_once", [True, False])
def test_what_runs_may_be_killed_too(tmp_path, at_once):
    token = fp.CancellationToken()
    started = tmp_path / "started"
    wf = fp.Workflow()
    running = wf.add(note_and_wait, started, tmp_path / "never")

    def call_off():
        wait_until(started.exists, "the task to start")
        if not at_once:
            token.cancel()
        token.cancel(kill=True)

    caller = threading.Thread(target=call_off)
    caller.start()
    result = wf.run(workers=1, cancel=token)
    caller.join()
    assert result.status == "cancelled"
    assert result.record(running).status == "cancelled"


def test_a_token_of_some_seconds_calls_off_by_itself():
    token = fp.CancellationToken.with_timeout(3.0)
    wf = fp.Workflow()
    value = 0
    for _ in range(100_000):  # more than three seconds of messages
        value = wf.add(max, value, 1)
    result = wf.run(workers=1, cancel=token)
    assert result.status == "cancelled"
    assert 0 < result.status_counts()["completed"] < 100_000


def test_what_was_called_off_before_does_nothing(any_backend):
    token = fp.CancellationToken()
    token.cancel()
    wf = fp.Workflow()
    wf.map(abs, range(5))
    result = wf.run(**any_backend, cancel=token)
    assert result.status_counts() == {"cancelled": 5}


def test_a_token_that_is_not_used_changes_nothing(any_backend):
    token = fp.CancellationToken()
    wf = fp.Workflow()
    total = wf.add(sum, wf.map(abs, range(5)))
    result = wf.run(**any_backend, cancel=token)
    assert (result[total], result.status) == (10, "completed")
    assert token._callbacks == []


def test_a_timeout_holds_after_the_run_was_called_off(tmp_path):
    token = fp.CancellationToken()
    started = tmp_path / "started"
    wf = fp.Workflow()
    wf.add(fp.task(note_and_wait).options(timeout=3.0), started, tmp_path / "never")

    def call_off():
        wait_until(started.exists, "the task to start")
        token.cancel()

    caller = threading.Thread(target=call_off)
    caller.start()
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1, cancel=token)
    caller.join()
    assert [type(error) for error in caught.value.exceptions] == [fp.TaskTimeout]
    assert caught.value.result.status == "failed"


def test_a_failure_before_is_still_raised(tmp_path):
    token = fp.CancellationToken()

    def fail():
        raise RuntimeError("first")

    def call_off(event):
        if isinstance(event, WorkflowTaskFailed):
            token.cancel(kill=True)

    wf = fp.Workflow()
    wf.add(fail)
    wf.add(note_and_wait, tmp_path / "other", tmp_path / "never")
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=2, cancel=token, fail_fast=False, audit=call_off)
    assert caught.value.result.status == "failed"


# Signals

PROGRAM = """
import hashlib, os, signal, sys
from pathlib import Path
import forgepar as fp

def busy(i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(sys_argv) / str(i)).write_text(str(os.getpid()))
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)  # looks at no signal until it is done, in an hour

sys_argv = sys.argv[1]
wf = fp.Workflow()
wf.map(busy, range(8))
wf.run(workers=8)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)], ids=["INT", "TERM"]
)
def test_a_signal_ends_a_run_whose_workers_listen_to_none(tmp_path, number, code):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    pids = tmp_path / "pids"
    pids.mkdir()
    running = subprocess.Popen([sys.executable, str(program), str(pids)], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len([p for p in pids.iterdir() if p.read_text()]) == 8, "eight workers to be busy")
        workers = [int(path.read_text()) for path in pids.iterdir()]
        running.send_signal(number)
        _, errors = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == code
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert not any(map(psutil.pid_exists, workers))
    mark = f"forgepar-{os.getuid()}-{running.pid}-"
    assert not [name for folder in ("/dev/shm", "/tmp") for name in _names(folder) if name.startswith(mark)]
    assert own_arenas() == set()


def _names(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []  # noqa: PTH112, PTH208


def test_a_handler_of_the_program_stays_in_place():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        wf = fp.Workflow()
        wf.add(abs, 1)
        wf.run(backend="inline")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    wf.run(backend="inline")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
