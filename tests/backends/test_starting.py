"""Workers start without a change to the caller's process, on this version of Python and with its private names."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
from conftest import PATIENCE, wait_until

import forgepar as fp
from forgepar.backends import starting

START_METHODS = ["forkserver", "spawn", "fork"]


def run_script(tmp_path, text, *arguments, flags=("-W", "error"), patience=4 * PATIENCE):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    command = [sys.executable, *flags, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)


def abs_of(executor, number):
    wf = fp.Workflow()
    handle = wf.add(abs, number)
    return executor.run(wf)[handle]


def exit_with(code):
    os._exit(code)


@contextmanager
def other_threads(*actions):
    """Have threads do something again and again; whatever one raises is raised here."""
    over, raised, counts = threading.Event(), [], [0] * len(actions)

    def repeat(which, action):
        try:
            while not over.is_set():
                action()
                counts[which] += 1
                over.wait(0.0001)  # so that this thread does not have the interpreter to itself
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=repeat, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert raised == []
    assert all(counts)


@pytest.mark.parametrize("method", START_METHODS)
class TestContexts:
    """The contexts alone, as `ProcessPoolExecutor` uses them."""

    def test_they_run_jobs(self, method):
        with ProcessPoolExecutor(1, mp_context=starting.context(method)) as pool:
            assert list(pool.map(abs, [-1, -2, -3])) == [1, 2, 3]
        assert starting.context(method).get_start_method() == method

    def test_exit_codes_are_the_processes_own(self, method):
        started = [starting.context(method).Process(target=exit_with, args=(code,)) for code in (0, 3, 77)]
        for process in started:
            process.start()
            assert starting.process_of(process.pid) is process
        for process in started:
            process.join(PATIENCE)
        assert [process.exitcode for process in started] == [0, 3, 77]

    def test_what_belongs_to_processes_is_handed_over(self, method):
        context = starting.context(method)
        queue, lock = context.SimpleQueue(), context.Lock()
        process = context.Process(target=put_locked, args=(queue, lock))
        process.start()
        assert queue.get() == "locked"
        process.join(PATIENCE)
        assert process.exitcode == 0

    def test_a_worker_is_an_ordinary_process_of_multiprocessing(self, method):
        with ProcessPoolExecutor(1, mp_context=starting.context(method)) as pool:
            kind, name, start_method = pool.submit(describe).result()
        assert kind is type(multiprocessing.get_context(method).Process())
        assert name.startswith("_" if method == "fork" else "")
        assert start_method == method

    def test_finalizers_of_a_worker_run_at_its_end(self, method, tmp_path):
        with ProcessPoolExecutor(1, mp_context=starting.context(method)) as pool:
            pool.submit(finalize_by, str(tmp_path / "ended")).result()
        assert (tmp_path / "ended").exists()


def put_locked(queue, lock):
    with lock:
        queue.put("locked")


def describe():
    process = multiprocessing.current_process()
    kind = type(process)
    if kind.__module__ == starting.__name__:  # forked: it is the very object
        kind = kind.__mro__[2]
    return kind, process.name, multiprocessing.get_start_method()


def finalize_by(path):
    multiprocessing.util.Finalize(None, touch, args=(path,), exitpriority=0)


def touch(path):
    with open(path, "w"):  # noqa: PTH123
        pass


@pytest.mark.parametrize("method", START_METHODS)
class TestCaller:
    def test_pickling_warning_and_filtering_in_other_threads_go_on(self, tmp_path, method):
        assert_stress_holds(tmp_path, method, n_workers=10)

    @pytest.mark.slow
    def test_nothing_is_lost_while_200_workers_start(self, tmp_path, method):
        assert_stress_holds(tmp_path, method, n_workers=200)

    def test_the_main_module_is_never_another_one(self, method):
        main, seen = sys.modules["__main__"], set()
        with (
            other_threads(lambda: seen.add(id(sys.modules["__main__"]))),
            fp.ForgeExecutor(2, start_method=method, max_tasks_per_child=1) as executor,
        ):
            list(executor.map(abs, range(4)))
        assert seen == {id(main)}

    def test_the_default_start_method_stays_unsettled(self, tmp_path, method):
        done = run_script(
            tmp_path,
            """
            import multiprocessing, sys
            import forgepar as fp
            wf = fp.Workflow()
            wf.add(abs, -1)
            wf.run(workers=1, start_method=sys.argv[1])
            assert multiprocessing.get_start_method(allow_none=True) is None
            multiprocessing.set_start_method("spawn")
            """,
            method,
        )
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_default_start_method_that_a_library_has_made_is_not_the_workers(self, tmp_path, method):
        done = run_script(
            tmp_path,
            """
            import multiprocessing, sys
            import forgepar as fp
            class Own(multiprocessing.context.SpawnContext):
                _name = "own"
            multiprocessing.context._concrete_contexts["own"] = Own()
            multiprocessing.set_start_method("own")
            with fp.ForgeExecutor(1, start_method=sys.argv[1]) as executor:
                print(executor.submit(abs, -1).result(), multiprocessing.get_start_method())
            """,
            method,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "1 own\n", "")

    def test_a_main_module_without_a_spec_does(self, tmp_path, method):
        done = run_script(
            tmp_path,
            """
            import sys
            import forgepar as fp
            del sys.modules["__main__"].__spec__
            wf = fp.Workflow()
            handle = wf.add(abs, -1)
            print(wf.run(workers=1, start_method=sys.argv[1])[handle])
            """,
            method,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")

    @pytest.mark.parametrize("flags", [("-W", "error"), ("-W", "always")])
    def test_no_warning_is_shown_or_raised_beside_threads(self, tmp_path, method, flags):
        """From 3.12 on Python warns of a fork beside threads, and 3.13 adds no exception to that."""
        done = run_script(
            tmp_path,
            """
            import os, sys, threading, warnings
            import numpy  # it sets filters when it is imported
            import forgepar as fp
            filters = list(warnings.filters)
            over = threading.Event()
            thread = threading.Thread(target=over.wait)
            thread.start()
            with fp.WorkflowExecutor(workers=3, start_method=sys.argv[1]) as executor:
                for _ in range(2):
                    wf = fp.Workflow()
                    wf.map(abs, range(30))
                    executor.run(wf)
                wf = fp.Workflow()
                wf.add(os._exit, 1)
                try:
                    executor.run(wf)
                except fp.WorkflowFailed:
                    pass
            with fp.ForgeExecutor(2, start_method=sys.argv[1], max_tasks_per_child=1) as executor:
                print(sum(executor.map(abs, range(5))))
            over.set()
            thread.join()
            assert warnings.filters == filters
            """,
            method,
            flags=flags,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")

    def test_semaphores_are_not_left_at_exit(self, tmp_path, method):
        done = run_script(
            tmp_path,
            """
            import sys
            import forgepar as fp
            executor = fp.WorkflowExecutor(workers=2, start_method=sys.argv[1])
            wf = fp.Workflow()
            wf.map(abs, range(9))
            executor.run(wf)
            pool = fp.ForgeExecutor(2, start_method=sys.argv[1], max_tasks_per_child=1)
            print(sum(pool.map(abs, range(5))))
            """,
            method,
            flags=(),
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")

    def test_other_children_of_the_caller_are_not_collected(self, method):
        child = multiprocessing.get_context("fork").Process(target=os._exit, args=(5,))
        child.start()
        wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "the child to end")
        with fp.WorkflowExecutor(workers=1, start_method=method) as executor:
            assert abs_of(executor, -1) == 1
            assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 5
        multiprocessing.process._children.discard(child)


STRESS = """
import pickle, random, sys, threading, time, warnings
import forgepar as fp

class Mine:
    def __init__(self, number):
        self.number = number

class Ours(UserWarning):
    pass

over, failures, counts = threading.Event(), [], {}

def again_and_again(action):
    counts[action.__name__] = 0
    try:
        while not over.is_set():
            action()
            counts[action.__name__] += 1
            time.sleep(0.0001)  # so that this thread does not have the interpreter to itself
    except BaseException as error:
        failures.append(f"{action.__name__}: {error!r}")

def pickles():
    number = random.randrange(1000)
    assert pickle.loads(pickle.dumps(Mine(number))).number == number

recorded = []
warnings.showwarning = lambda message, *_: recorded.append(str(message))
given = []

def warns():
    text = f"number {len(given)}"
    given.append(text)
    warnings.warn(text, Ours)

def adds_filters():
    kind = type("Kind", (UserWarning,), {})
    warnings.simplefilter("error", kind)
    entry = ("error", None, kind, None, 0)
    assert entry in warnings.filters
    for _ in range(20):
        assert entry in warnings.filters
        try:
            warnings.warn("an error", kind)
        except kind:
            pass
        else:
            raise AssertionError("the filter was lost")
    warnings.filters.remove(entry)
    warnings._filters_mutated() if hasattr(warnings, "_filters_mutated") else warnings._filters_mutated_lock_held()

warnings.simplefilter("always", Ours)
threads = [threading.Thread(target=again_and_again, args=(action,)) for action in (pickles, warns, adds_filters)]
for thread in threads:
    thread.start()
n_workers = int(sys.argv[2])
with fp.ForgeExecutor(2, start_method=sys.argv[1], max_tasks_per_child=1) as executor:
    results = [future.result() for future in [executor.submit(abs, -i) for i in range(n_workers)]]
over.set()
for thread in threads:
    thread.join()
assert results == list(range(n_workers)), results
assert failures == [], failures
assert recorded == given, (len(recorded), len(given))
assert min(counts.values()) > 0, counts
print("held")
"""


def assert_stress_holds(tmp_path, method, n_workers):
    patience = PATIENCE * (4 + n_workers / 10)
    done = run_script(tmp_path, STRESS, method, str(n_workers), flags=(), patience=patience)
    assert (done.returncode, done.stdout, done.stderr) == (0, "held\n", "")


class TestForkServer:
    def test_the_callers_own_server_and_preload_are_left_alone(self, tmp_path):
        (tmp_path / "heavy.py").write_text("")
        (tmp_path / "heavy_user.py").write_text(
            "import os, sys\nPRELOADED = 'heavy' in sys.modules\ndef look():\n    return os.getppid(), PRELOADED\n"
        )
        done = run_script(
            tmp_path,
            """
            import multiprocessing, os, sys
            import forgepar as fp
            import heavy_user
            def ask():
                wf = fp.Workflow()
                handle = wf.add(heavy_user.look)
                return wf.run(workers=1, start_method="forkserver")[handle]
            if __name__ == "__main__":
                os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
                context = multiprocessing.get_context("forkserver")
                context.set_forkserver_preload(["heavy"])
                ours, is_preloaded = ask()
                assert not is_preloaded
                with context.Pool(1) as pool:
                    theirs, is_preloaded = pool.apply(heavy_user.look)
                assert is_preloaded
                assert theirs != ours
                assert ask() == (ours, False)
            """,
        )
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_server_that_was_killed_is_replaced(self):
        first = server_pid()
        killed = psutil.Process(first)
        killed.kill()
        wait_until(lambda: killed.status() == psutil.STATUS_ZOMBIE, "the server to end")
        assert server_pid() not in (first, os.getpid())

    def test_a_server_whose_exit_the_caller_has_collected_is_replaced(self):
        first = server_pid()
        psutil.Process(first).kill()
        os.waitpid(first, 0)
        assert server_pid() not in (first, os.getpid())

    def test_workers_do_not_load_what_starts_workers(self):
        wf = fp.Workflow()
        handle = wf.add(lambda: "forgepar.backends.starting" in sys.modules)
        assert wf.run(workers=1, start_method="forkserver")[handle] is False


def server_pid():
    wf = fp.Workflow()
    handle = wf.add(os.getppid)
    return wf.run(workers=1, start_method="forkserver")[handle]


@pytest.mark.parametrize("method", START_METHODS)
def test_modules_come_from_where_the_caller_has_them_and_not_from_the_working_directory(tmp_path, monkeypatch, method):
    folder = tmp_path / "cwd"
    (folder / "forgepar").mkdir(parents=True)
    (folder / "forgepar" / "__init__.py").write_text("raise RuntimeError('another forgepar')")
    (folder / "queue.py").write_text("raise RuntimeError('not the queue of the standard library')")
    monkeypatch.chdir(folder)
    done = run_script(
        tmp_path,
        """
        import sys
        import forgepar as fp
        wf = fp.Workflow()
        handle = wf.add(lambda: sys.modules["forgepar.backends.worker"].__file__)
        print(wf.run(workers=1, start_method=sys.argv[1])[handle] == fp.__file__.replace("__init__", "backends/worker"))
        """,
        method,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_instances_of_a_main_class_as_initargs_reach_the_initializer(tmp_path):
    done = run_script(
        tmp_path,
        """
        import forgepar as fp
        class Settings:
            def __init__(self, scale):
                self.scale = scale
        def remember(settings):
            import builtins
            builtins.scale_given = settings.scale
        def look(_):
            import builtins
            return builtins.scale_given
        for method in ("forkserver", "spawn", "fork"):
            with fp.ForgeExecutor(1, start_method=method, initializer=remember, initargs=(Settings(3),)) as executor:
                print(executor.submit(look, 0).result())
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n3\n3\n", "")


@pytest.mark.parametrize("own", START_METHODS)
@pytest.mark.parametrize("kind", ["fork", "spawn", "forkserver"])
def test_a_child_of_multiprocessing_that_leaves_workers_open_ends(tmp_path, own, kind):
    done = run_script(
        tmp_path,
        """
        import multiprocessing, sys
        import forgepar as fp
        def body(method):
            global executor, pool
            executor = fp.WorkflowExecutor(workers=1, start_method=method)
            wf = fp.Workflow()
            handle = wf.add(abs, -1)
            pool = fp.ForgeExecutor(1, start_method=method)
            print(executor.run(wf)[handle], pool.submit(abs, -2).result(), flush=True)
        if __name__ == "__main__":
            process = multiprocessing.get_context(sys.argv[2]).Process(target=body, args=(sys.argv[1],))
            process.start()
            process.join()
            print(process.exitcode)
        """,
        own,
        kind,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 2\n0\n", "")


@pytest.mark.parametrize("own", START_METHODS)
def test_a_daemonic_process_may_have_workers(own):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def body():
        with fp.WorkflowExecutor(workers=1, start_method=own) as executor:
            queue.put(abs_of(executor, -4))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 3.12 on: of the fork that the test makes
        process = context.Process(target=body, daemon=True)
        process.start()
    assert queue.get() == 4
    process.join(PATIENCE)
    assert process.exitcode == 0


@pytest.mark.parametrize("pool", ["multiprocessing.Pool", "loky", "joblib", "ProcessPoolExecutor"])
def test_workers_of_other_pools_may_have_workers(tmp_path, pool):
    for library in {"loky", "joblib"} & {pool}:
        pytest.importorskip(library)
    done = run_script(
        tmp_path,
        """
        import multiprocessing, sys
        from concurrent.futures import ProcessPoolExecutor
        import forgepar as fp
        def double(x):
            return 2 * x
        def use(method):
            wf = fp.Workflow()
            doubled = wf.map(double, [1, 2])
            with fp.ForgeExecutor(1, start_method=method) as executor:
                jobs = list(executor.map(double, [3, 4]))
            return [*wf.run(workers=1, start_method=method)[doubled], *jobs]
        if __name__ == "__main__":
            methods = ["forkserver", "spawn", "fork"]
            if sys.argv[1] == "multiprocessing.Pool":  # its workers are daemonic
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(use, methods))
            elif sys.argv[1] == "loky":  # theirs have a default start method that no other process knows
                import loky
                with loky.ProcessPoolExecutor(1) as pool:
                    print(list(pool.map(use, methods)))
            elif sys.argv[1] == "joblib":
                import joblib
                print(joblib.Parallel(n_jobs=2)(joblib.delayed(use)(method) for method in methods))
            else:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    print(list(pool.map(use, methods)))
        """,
        pool,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{[[2, 4, 6, 8]] * 3}\n", "")


def test_a_worker_is_forked_while_another_thread_imports_what_it_needs(tmp_path, monkeypatch):
    """The thread holds the module's lock, and the child, which has no such thread, a copy of that."""
    begun, pipe = str(tmp_path / "begun"), str(tmp_path / "pipe")
    (tmp_path / "amid_import.py").write_text(
        "import os, pathlib\nVALUE = 'half'\n"
        f"if os.getpid() == {os.getpid()}:\n"
        f"    pathlib.Path({begun!r}).touch()\n"
        f"    pathlib.Path({pipe!r}).read_text()\n"
        "VALUE = 'whole'\n"
    )
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.syspath_prepend(tmp_path)
    importing = threading.Thread(target=importlib.import_module, args=["amid_import"])
    importing.start()
    try:
        wait_until((tmp_path / "begun").exists, "the import to begin")

        def value():
            return importlib.import_module("amid_import").VALUE

        wf = fp.Workflow()
        handle = wf.add(value)
        assert wf.run(workers=1, start_method="fork", timeout=PATIENCE)[handle] == "whole"
    finally:
        (tmp_path / "pipe").write_text("")
        importing.join()
        sys.modules.pop("amid_import", None)
