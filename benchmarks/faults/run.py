"""How long it takes until a fault is over, and what is lost by it.

A timeout: from the limit to the error, for a task that heeds SIGTERM and for one that is deaf to it (which has half a
second of grace), each beside one that goes on. The end of the program: from the signal to the end of the process with
eight workers in C code that looks at no signal, and from its SIGKILL to the end of the last worker. A death: from the
worker's SIGKILL to the next attempt of its task. Lines: what one that a task prints costs until it is here.

    python -m benchmarks.faults.run [--small]
"""

from __future__ import annotations

import functools
import io
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import psutil

import forgepar as fp
from benchmarks._common import Row, main, target
from benchmarks._measure import apart, interleaved, spread

TITLE = "Faults: milliseconds until they are over"
MOST_AFTER_LIMIT_MS = 150.0
GRACE_MS = 500.0
MOST_INTERRUPT_MS = 1000.0
MOST_ORPHAN_MS = 2000.0
BUSY_WORKERS = 8
_TIMEOUT_SECONDS = 0.3
_LINES = 20_000


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure each fault."""
    subjects: dict[str, Callable[[], Any]] = {
        "timeout to error": functools.partial(apart, after_timeout, False),
        "timeout to error, deaf": functools.partial(apart, after_timeout, True),
        "SIGKILL of a worker to the next attempt": functools.partial(apart, after_death),
        f"Ctrl-C to prompt, {BUSY_WORKERS} workers in C": functools.partial(until_ended, signal.SIGINT),
        f"SIGKILL of the program, {BUSY_WORKERS} workers in C": functools.partial(until_ended, signal.SIGKILL),
    }
    limits = [MOST_AFTER_LIMIT_MS, MOST_AFTER_LIMIT_MS + GRACE_MS, None, MOST_INTERRUPT_MS, MOST_ORPHAN_MS]
    timings = interleaved(subjects, 1 if small else repeat)
    found = []
    for (name, samples), limit in zip(timings.items(), limits, strict=True):
        row = {"what": name, **spread("ms", samples)}
        found.append(row if limit is None else target(row, "ms", limit))
    printed = [apart(line_cost, 1000 if small else _LINES) for _ in range(1 if small else repeat)]
    return [*found, {"what": "a line printed by a task", **spread("ms", printed)}]


def hang() -> None:
    threading.Event().wait()


def hang_deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Event().wait()


def after_timeout(is_deaf: bool) -> float:
    """Return the milliseconds from a task's limit to the error."""
    workflow = fp.Workflow()
    workflow.add(fp.task(hang_deaf if is_deaf else hang).options(timeout=_TIMEOUT_SECONDS))
    with fp.WorkflowExecutor(workers=2) as executor:
        warm = fp.Workflow()
        warm.map(abs, range(100))
        executor.run(warm)
        begin = time.perf_counter()
        try:
            executor.run(workflow)
        except fp.WorkflowFailed:
            return (time.perf_counter() - begin - _TIMEOUT_SECONDS) * 1e3
    raise AssertionError("the task was not ended")


def die_once(path: Path) -> float:
    """Kill this process at the first attempt, having noted when; return how long ago that was at the second."""
    if path.exists():
        return (time.perf_counter() - float(path.read_text())) * 1e3
    path.write_text(str(time.perf_counter()))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def after_death() -> float:
    """Return the milliseconds from a worker's death to its task's next attempt."""
    with tempfile.TemporaryDirectory() as folder:
        workflow = fp.Workflow()
        again = workflow.add(fp.task(die_once).options(retries=1), Path(folder) / "died")
        value: float = workflow.run(workers=2)[again]
        return value


def until_ended(number: signal.Signals) -> float:
    """Return the milliseconds from a signal to a program until it and all its workers are gone."""
    command = [sys.executable, "-m", "benchmarks.faults.busy", str(BUSY_WORKERS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "busy\n"
            workers = [p for p in psutil.Process(program.pid).children(recursive=True) if p.cpu_times().user > 0.05]
            begin = time.perf_counter()
            program.send_signal(number)
            program.wait()
            while not all(map(is_gone, workers)):
                time.sleep(0.002)
            return (time.perf_counter() - begin) * 1e3
        finally:
            program.kill()


def is_gone(process: psutil.Process) -> bool:
    """Tell whether a process is dead, if its parent has taken note of that or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def print_lines(n: int) -> None:
    for number in range(n):
        print(number)


def line_cost(n_lines: int) -> float:
    """Return the milliseconds that a printed line takes, beyond what one takes that is kept in the worker."""
    workflow = fp.Workflow()
    workflow.map(print_lines, [n_lines] * 2)
    with fp.WorkflowExecutor(workers=2) as executor, redirect_stdout(io.StringIO()):
        executor.run(workflow)
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            executor.run(workflow)
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken) / (2 * n_lines) * 1e3


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
