"""How the loop of a run calls a display: by its clock, at once for failures, and never so that it ends the run."""

from __future__ import annotations

import math
import threading
import time

import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.records.display import GuardedDisplay


class Recorded:
    """A display that notes its calls.

    Args:
        seconds: between two looks.
        raises: the name of the call that fails.
    """

    def __init__(self, seconds=math.inf, raises=None):
        self.look_at = math.inf
        self.seconds, self.raises = seconds, raises
        self.calls, self.looks, self.failures, self.threads = [], [], [], set()

    def _note(self, call):
        self.calls.append(call)
        self.threads.add(threading.get_ident())
        if call == self.raises:
            raise RuntimeError(f"cannot {call}")

    def begin(self, look):
        self.look = look
        self._note("begin")
        self.look_at = time.perf_counter() + self.seconds

    def beat(self, now):
        self._note("beat")
        assert now >= self.look_at
        self.looks.append(self.look())
        self.look_at = time.perf_counter() + self.seconds

    def failed(self, failure):
        self._note("failed")
        self.failures.append(failure)

    def close(self):
        self._note("close")


def waiting(tmp_path):
    """A workflow whose last task waits until it is told to go on."""

    def wait(path):
        wait_until((path / "go").exists, "being told to go on")

    wf = fp.Workflow("waiting")
    wf.add(fp.task(wait).options(name="wait", after=wf.map(abs, range(10))), tmp_path)
    return wf


def failing(x, retries_file=None):
    raise ValueError(f"no {x}")


def test_it_looks_by_the_clock_while_a_task_runs(tmp_path):
    class Patient(Recorded):
        def beat(self, now):
            super().beat(now)
            if len(self.looks) == 5:
                (tmp_path / "go").touch()

    display = Patient(0.001)
    assert waiting(tmp_path).run(workers=2, progress=display).ok
    assert len(display.looks) >= 5
    assert (display.calls[0], display.calls[-1]) == ("begin", "close")
    assert display.threads == {threading.get_ident()}
    last = display.looks[-1]
    assert last.workflow == "waiting"
    assert last.by_layers
    assert last.now >= last.began > 0
    assert len(last.status) == len(last.layer) == len(last.template) == len(last.start) == 11
    assert len(last.pids) == 2


def test_it_sees_what_runs(tmp_path):
    class Curious(Recorded):
        def beat(self, now):
            super().beat(now)
            if [task.task for _, task in self.looks[-1].running] == ["wait"]:
                (tmp_path / "go").touch()

    display = Curious(0.001)
    assert waiting(tmp_path).run(workers=2, progress=display).ok
    ((number, running),) = next(look.running for look in display.looks if look.running and look.running[0][0] == 10)
    assert (number, running.task) == (10, "wait")
    assert running.pid in display.looks[-1].pids


def test_a_failure_is_told_with_its_attempt(either_backend):
    wf = fp.Workflow()
    wf.add(fp.task(failing).options(name="bad", retries=1, backoff=0.0), 7)
    wf.add(fp.task(failing).options(name="caught", fallback=3), 8)
    display = Recorded()
    with pytest.raises(fp.WorkflowFailed):
        wf.run(**either_backend, fail_fast=False, progress=display)
    assert sorted(display.failures) == [
        ("bad", 1, "ValueError: no 7", True),
        ("bad", 2, "ValueError: no 7", False),
        ("caught", 1, "ValueError: no 8", True),
    ]
    assert display.calls.count("close") == 1


@pytest.mark.parametrize("call", ["begin", "beat", "failed", "close"])
def test_one_that_raises_is_off_and_the_run_goes_on(call):
    wf = fp.Workflow()
    wf.map(abs, wf.map(abs, range(20)))
    wf.add(fp.task(failing).options(fallback=3), 8)
    display = Recorded(0.0, raises=call)
    with pytest.warns(RuntimeWarning, match=f"cannot {call}. It is disabled; the run continues") as warned:
        assert wf.run(backend="inline", progress=display).ok
    assert len(warned) == 1
    assert display.calls.count(call) == (2 if call == "close" else 1)
    assert display.calls[-1] == "close"


def test_an_interrupt_closes_it():
    class Interrupting(Recorded):
        def beat(self, now):
            super().beat(now)
            raise KeyboardInterrupt

    display = Interrupting(0.0)
    wf = fp.Workflow()
    wf.map(abs, range(20))
    with pytest.raises(KeyboardInterrupt):
        wf.run(backend="inline", progress=display)
    assert display.calls == ["begin", "beat", "close"]


def test_one_that_wants_no_look_is_not_called():
    display = Recorded(math.inf)
    wf = fp.Workflow()
    wf.map(abs, range(20))
    wf.run(backend="inline", progress=display)
    assert display.calls == ["begin", "close"]


def test_it_follows_a_run_that_grows():
    wf = fp.Workflow()
    wf.map(abs, wf.add(lambda: list(range(50))))
    display = Recorded(0.0)
    wf.run(backend="inline", progress=display)
    sizes = [len(look.status) for look in display.looks]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (2, 53)
    assert all(len(look.layer) == len(look.status) for look in display.looks)


@pytest.mark.parametrize("progress", [None, False])
def test_without_one_nothing_is_shown(progress, capsys):
    wf = fp.Workflow()
    wf.map(abs, range(20))
    wf.run(backend="inline", progress=progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", ["bar", 1, object()])
def test_what_cannot_show_is_refused_before_anything_starts(progress):
    wf = fp.Workflow()
    wf.add(abs, 1)
    with pytest.raises(ValueError, match=r"progress must be True, False, or a forgepar\.Display, got"):
        wf.run(progress=progress)


def test_a_shield_passes_on_when_to_look():
    display = Recorded(5.0)
    shield = GuardedDisplay(display)
    assert shield.look_at == math.inf
    shield.begin(lambda: None)
    assert shield.look_at == display.look_at
    shield.beat(0.0)
    assert display.calls == ["begin"]
    shield.close()
    assert shield.look_at == math.inf
