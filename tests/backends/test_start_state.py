"""A worker starts with the umask, CPU affinity, niceness and soft resource limits that its caller has by then."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import warnings

import pytest
from conftest import PATIENCE

import forgepar as fp
from forgepar.backends.start_state import StartState

START_METHODS = ["forkserver", "spawn", "fork"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the umask or the affinity")

LOOK = """
import os, resource, sys, threading
import forgepar as fp

def look():
    umask = os.umask(0)
    os.umask(umask)
    limits = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)]
    return umask, sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0), limits

def change():
    os.umask(0o027)
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    os.nice(3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

method = sys.argv[1]
"""


def run_script(text, *arguments):
    command = [sys.executable, "-W", "error", "-c", LOOK + textwrap.dedent(text), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@LINUX
@pytest.mark.parametrize("method", START_METHODS)
class TestWorkers:
    def test_a_new_executor_has_what_was_changed_since_the_last(self, method):
        run_script(
            """
            def ask():
                wf = fp.Workflow()
                handle = wf.add(look)
                return wf.run(workers=1, start_method=method)[handle]
            assert ask() == look()
            before = look()
            change()
            assert look() != before
            assert ask() == look(), (ask(), look())
            """,
            method,
        )

    def test_a_worker_that_takes_the_place_of_another_has_it_too(self, method):
        """The pool's own thread starts it, which has the affinity and niceness of the time when it was made."""
        run_script(
            """
            with fp.ForgeExecutor(1, start_method=method, max_tasks_per_child=1) as executor:
                assert executor.submit(look).result() == look()
                change()
                assert executor.submit(os.getpid).result() != os.getpid()  # its worker may have started before
                assert executor.submit(look).result() == look()
            """,
            method,
        )

    def test_the_affinity_and_niceness_are_those_of_the_thread_that_runs(self, method):
        run_script(
            """
            def ask():
                os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
                os.nice(2)
                wf = fp.Workflow()
                handle = wf.add(look)
                seen.append((wf.run(workers=1, start_method=method)[handle], look()))
            seen = []
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
            (there, here), = seen
            assert there == here, (there, here)
            """,
            method,
        )

    def test_an_initializer_sees_it(self, method):
        run_script(
            """
            def note():
                global seen
                seen = look()
                import builtins
                builtins.seen_first = seen
            def tell():
                import builtins
                return builtins.seen_first
            wf = fp.Workflow()
            wf.add(abs, -1)
            wf.run(workers=1, start_method=method)
            change()
            with fp.ForgeExecutor(1, start_method=method, initializer=note) as executor:
                assert executor.submit(tell).result() == look()
            """,
            method,
        )


class TestStartState:
    def test_it_is_that_of_this_process_and_asking_changes_nothing(self):
        umask = os.umask(0o022)
        try:
            state = StartState.here()
            assert state == StartState.here()
            assert os.umask(0o022) == 0o022
        finally:
            os.umask(umask)
        assert state.niceness == os.getpriority(os.PRIO_PROCESS, 0)
        assert state.limits["RLIMIT_NOFILE"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if sys.platform == "linux":
            assert state.umask == 0o022
            assert state.cpus == os.sched_getaffinity(0)

    def test_to_take_over_ones_own_changes_nothing(self):
        state = StartState.here()
        assert state.take_over() == ()
        assert StartState.here() == state

    @LINUX
    def test_a_thread_that_has_ended_stands_for_the_main_thread(self):
        assert StartState.here(thread=1 << 30) == StartState.here(os.getpid())

    def test_where_the_umask_cannot_be_read_it_is_left(self, monkeypatch):
        monkeypatch.setattr("forgepar.backends.start_state._STATUS", "/no/such/file")
        state = StartState.here()
        assert state.umask is None
        assert state.take_over() == ()

    def test_a_soft_limit_stays_within_the_hard_limit(self):
        code = (
            "import resource; from forgepar.backends.start_state import StartState\n"
            "state = StartState.here()._replace(limits={'RLIMIT_NOFILE': 150, 'RLIMIT_FSIZE': -1, 'RLIMIT_NEW': 1})\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 100))\n"
            "refused = state.take_over()\n"
            "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 100)\n"
            'assert refused == ("RLIMIT_NOFILE 150 (the worker\'s hard limit is 100)",), refused\n'
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    def test_what_may_not_be_is_told_and_the_rest_is_taken_over(self, monkeypatch):
        def forbidden(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "setpriority", forbidden)
        state = StartState.here()
        umask = os.umask(0o077)
        try:
            refused = state._replace(niceness=state.niceness - 1).take_over()
            assert os.umask(0o077) == (umask if sys.platform == "linux" else 0o077)
        finally:
            os.umask(umask)
        assert refused == (f"niceness {state.niceness - 1} ([Errno 13] Permission denied)",)


@LINUX
@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("action", ["always", "error"])
def test_what_workers_cannot_take_over_is_one_warning_and_the_run_goes_on(method, action, monkeypatch):
    impossible = StartState.here()._replace(cpus=frozenset([1000]))
    monkeypatch.setattr(StartState, "here", lambda _=0: impossible)
    wf = fp.Workflow()
    handles = wf.map(abs, range(6))
    with warnings.catch_warnings(record=True) as caught, fp.WorkflowExecutor(2, start_method=method) as executor:
        warnings.simplefilter(action)
        assert executor.run(wf)[handles] == list(range(6))
        while len(executor._backend.joined()) < 2:
            executor._backend.wait(PATIENCE)
        assert executor.run(wf)[handles] == list(range(6))
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert "could not take over" in str(warning.message)
    assert "CPU affinity 1000" in str(warning.message)
