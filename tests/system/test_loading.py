"""Loading keeps interrupts back: a module is loaded whole, then the interrupt takes effect."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from forgepar.system.loading import loading


@pytest.fixture(autouse=True)
def python_handles_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def free():
    """Tell whether another thread can take the lock."""
    taken = threading.Event()

    def take():
        with loading:
            taken.set()

    threading.Thread(target=take, daemon=True).start()
    return taken.wait(10)


def test_an_interrupt_takes_effect_at_the_end_of_the_outermost_block():
    reached = []

    def load():
        with loading:
            with loading:
                signal.raise_signal(signal.SIGINT)
                reached.append("inner")
            reached.append("outer")
        reached.append("behind")

    with pytest.raises(KeyboardInterrupt):
        load()
    assert reached == ["inner", "outer"]
    assert free()


def test_interrupts_in_quick_succession_are_one():
    reached = []

    def load():
        with loading:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        load()
    assert reached == ["end"]
    assert free()


def test_an_interrupt_long_after_the_first_takes_effect_at_once(monkeypatch):
    reached = []

    def load():
        with loading:
            signal.raise_signal(signal.SIGINT)
            reached.append("first")
            monkeypatch.setattr(signal.getsignal(signal.SIGINT), "first", -10.0)
            signal.raise_signal(signal.SIGINT)
            reached.append("second")

    with pytest.raises(KeyboardInterrupt):
        load()
    assert reached == ["first"]
    assert free()


def test_an_error_of_a_module_is_told_and_leaves_the_lock_free():
    with pytest.raises(ImportError), loading:
        raise ImportError
    assert free()


def test_an_interrupt_while_another_thread_loads_takes_effect_at_once():
    inside, leave = threading.Event(), threading.Event()

    def load():
        with loading:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=load)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    leave.set()
    thread.join()


def test_an_interrupt_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with loading:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_child_forked_while_the_main_thread_loads_can_be_interrupted():
    ended = []

    def fork():
        pid = os.fork()
        if not pid:
            os._exit(0 if signal.getsignal(signal.SIGINT) is signal.default_int_handler and free_here() else 1)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    def free_here():
        with loading:
            return True

    with loading:
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert ended == [0]


WHILE_NUMPY_LOADS = """
import builtins, signal, sys
import forgepar as fp
workflow = fp.Workflow()
workflow.add(abs, -1)
real = builtins.__import__
def interrupting(name, *rest):
    if name != "numpy" or "numpy" in sys.modules:
        return real(name, *rest)
    signal.raise_signal(signal.SIGINT)
    module = real(name, *rest)
    print("loaded", flush=True)
    return module
builtins.__import__ = interrupting
RUN
"""


@pytest.mark.parametrize(
    "run",
    [
        "workflow.run(workers=1)",
        "fp.WorkflowExecutor(1).run(workflow)",
        "fp.ForgeExecutor(1).submit(abs, -1).result()",
        "workflow.check()",
        "workflow.diagram()",
        "workflow.plan()",
        "workflow.execution_layers()",
    ],
)
def test_an_interrupt_while_numpy_loads_is_an_interrupt(run):
    program = WHILE_NUMPY_LOADS.replace("RUN", run)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (-signal.SIGINT, 130), done.stderr
    assert done.stdout == "loaded\n"
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
