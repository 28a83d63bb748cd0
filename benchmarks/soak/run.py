"""Whether what long-lived executors hold stays the same, for ten minutes: memory, descriptors, threads, files.

Three programs run side by side for ten minutes, each with an executor of two workers: a warm `WorkflowExecutor`, a
`ForgeExecutor` that gets at least 200,000 jobs, and joblib's backend. How long a job takes is no matter here, so that
they may share the cores; what each holds is its own and its descendants'. What they do is in ``load_*.py``: values of
all sizes, closures of which no two are the same, failures, retries, cancellations, timeouts, dead workers. Workers are
killed now and then from the first to the fifth minute, and not later, as a new one would hide what an old one keeps:
those of the first minute are one minute old, those at the end five.

"start" is after a warm-up in which each kind of work was done twice. Every figure behind it is the median of the last
five of a hundred samples, each taken while nothing runs, after a garbage collection in the parent. A row's "growth" is
the figure at the end by that of the first minute, both taken to be no less than the row's floor, below which nothing is
judged:

    what                    most growth   floor
    memory                         1.15   32 MiB of the parent, 64 MiB of all workers together
    descriptors                    1.15   40
    threads, processes             1.15   10
    shared memory, files           1.5    32 MiB, 40 files: the sizes that are kept for later values come and go
    left behind at the end            0   files in shared memory and in the temporary folder; processes

Memory that grows by less than 15 % in nine minutes and nearly 200,000 jobs would take more than an hour to double. The
small form takes seconds, in which no process has come to its usual size: it judges all but memory.

The programs run with ``MALLOC_ARENA_MAX=1``. By default glibc has an arena for each of up to eight threads per core,
and each keeps the most that its threads had, some 5 MiB. joblib's calls start new threads with each number of workers,
so that takes many minutes to come to its end.

    python -m benchmarks.soak.run [--small]
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from benchmarks._common import Row, main, target
from benchmarks._measure import finished, started
from benchmarks.soak.gauge import files_below, files_in_shared_memory
from benchmarks.soak.one import MARKS

TITLE = "Soak: what executors of 2 workers hold, as time goes by"
SUBJECTS = {"workflows": "WorkflowExecutor", "jobs": "ForgeExecutor", "joblib": "joblib"}
SECONDS = 600.0
SMALL_SECONDS = 2.0
LEAST_JOBS = 200_000
MUST_MEET = True  # a target that is missed is a leak, and ends the program with an exit code of 1
_MORE_SECONDS = 120.0  # for starting, warming up and ending, on a busy machine
_MOST_SECONDS_TO_END = 5.0  # of what a program started, behind its own end

# The most growth, and the figure below which nothing is judged.
_MEMORY, _COUNT = 1.15, 1.15
BOUNDS = {
    "parent USS, MiB": (_MEMORY, 32),
    "parent PSS, MiB": (_MEMORY, 32),
    "parent descriptors": (_COUNT, 40),
    "parent threads": (_COUNT, 10),
    "workers USS, sum, MiB": (_MEMORY, 64),
    "workers USS, largest, MiB": (_MEMORY, 32),
    "workers PSS, sum, MiB": (_MEMORY, 64),
    "workers descriptors": (_COUNT, 40),
    "workers threads": (_COUNT, 10),
    "processes": (_COUNT, 10),
    "shared memory, MiB": (1.5, 32),
    "shared memory, files": (1.5, 40),
    "temporary folder, MiB": (1.5, 1),
    "temporary folder, files": (1.5, 10),
}


def rows(small: bool, repeat: int) -> list[Row]:  # noqa: ARG001  (ten minutes are enough of it)
    """Soak all three side by side."""
    seconds = SMALL_SECONDS if small else SECONDS
    # The stack is left first: at an interrupt it ends the programs that the threads wait for.
    with ThreadPoolExecutor(len(SUBJECTS)) as threads, ExitStack() as stack:
        running = [threads.submit(_soaked, *_start(stack, name, seconds), seconds) for name in SUBJECTS]
        found = [future.result() for future in running]
    columns, made = _columns(seconds), list[Row]()
    for (name, title), (marks, n_left) in zip(SUBJECTS.items(), found, strict=True):
        n_jobs, *held = _judged(title, marks, columns, judges_memory=not small)
        is_counted = name == "jobs" and not small
        made += [target(n_jobs, columns[-1], LEAST_JOBS, at_least=True) if is_counted else n_jobs, *held]
        made.append(target({"what": title, "held": "left behind", columns[-1]: n_left}, columns[-1], 0))
    return made


def _start(stack: ExitStack, name: str, seconds: float) -> tuple[subprocess.Popen[str], Path]:
    """Start a soak with a temporary folder of its own; both go with the stack."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True))
    environment = {**os.environ, "TMPDIR": folder, "MALLOC_ARENA_MAX": "1"}
    program = started("-m", "benchmarks.soak.one", name, str(seconds), environment=environment)
    return stack.enter_context(program), Path(folder)


def _soaked(program: subprocess.Popen[str], folder: Path, seconds: float) -> tuple[list[dict[str, float]], int]:
    """Wait for a soak; return what it found at each mark, and how many files and processes it left behind."""
    marks = finished(program, seconds + _MORE_SECONDS)
    _, alive = psutil.wait_procs(list(_of_session(program.pid)), timeout=_MOST_SECONDS_TO_END)
    files = [*files_below(folder), *files_in_shared_memory(program.pid)]
    return marks, len(alive) + len(files)


def _of_session(number: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == number:
                yield process


def _columns(seconds: float) -> list[str]:
    times = [share * seconds for share in MARKS]
    return ["start", *(f"{time / 60:g} min" if seconds >= 60 else f"{time:g} s" for time in times)]


def _judged(
    title: str, marks: Sequence[Mapping[str, float]], columns: Sequence[str], *, judges_memory: bool
) -> list[Row]:
    """Return a row for what each program held, the number of its jobs first."""
    made: list[Row] = []
    for name in ("jobs", *BOUNDS):
        values = [mark[name] for mark in marks]
        row: Row = {"what": title, "held": name, **dict(zip(columns, values, strict=True))}
        if name in BOUNDS:
            most, floor = BOUNDS[name]
            row["growth"] = max(values[-1], floor) / max(values[1], floor)
            if judges_memory or "MiB" not in name:
                row = target(row, "growth", most)
        made.append(row)
    return made


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows, must_meet=MUST_MEET))
