"""What it takes until something runs: imports, and the first result from cold; each in a fresh process, interleaved.

"import forgepar" loads names when they are first used, so a second row uses those that every program needs.

The first result is that of one task on workers of which none is up yet, as many as there are cores, beside a bare
``ProcessPoolExecutor`` of the same size and start method. Its imports are a column of their own: they are held against
numpy's above.

All find their modules compiled, as after a first run, whatever this environment says about bytecode.

    python -m benchmarks.startup.run [--small]
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks._common import Row, cores, main, target
from benchmarks._measure import interleaved, run_python, spread

TITLE = "Start-up: milliseconds from cold"
IMPORTS = {
    "import numpy": "import numpy",
    "import forgepar": "import forgepar",
    "import forgepar, use its names": "import forgepar as fp; fp.Workflow, fp.WorkflowExecutor",
}
SYSTEMS = {"process_pool": "ProcessPoolExecutor", "forgepar": "forgepar"}
MOST_IMPORT_RATIO = 1.25
MOST_FIRST_RATIO = 1.3
_LEAST_REPEAT = 11  # each takes a fraction of a second, and varies


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure imports and first results."""
    repeat = repeat if small else max(repeat, _LEAST_REPEAT)
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(run_python, environment=compiling_into(folder))
        return [*imports(run, repeat), *first_results(run, repeat)]


def compiling_into(folder: str) -> dict[str, str]:
    """Return this environment, but that modules are compiled once, into a folder of ours."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": folder}


def imports(run: Callable[..., Any], repeat: int) -> list[Row]:
    """Time each import, without the start of Python."""
    subjects = {name: functools.partial(import_ms, run, code) for name, code in IMPORTS.items()}
    for subject in subjects.values():
        subject()  # compiles
    timings = interleaved(subjects, repeat)
    made = [{"what": name, **spread("ms", samples)} for name, samples in timings.items()]
    base = made[0]["ms"]
    ours = [target({**row, "ratio": row["ms"] / base}, "ratio", MOST_IMPORT_RATIO) for row in made[1:]]
    return [made[0], *ours]


def import_ms(run: Callable[..., Any], code: str) -> float:
    program = f"import time; begin = time.perf_counter()\n{code}\nprint((time.perf_counter() - begin) * 1e3)"
    return float(run("-c", program))


def first_results(run: Callable[..., Any], repeat: int) -> list[Row]:
    """Time each system's first result under each start method."""
    methods = [name for name in ("fork", "forkserver", "spawn") if name in multiprocessing.get_all_start_methods()]
    subjects = {
        (method, key): functools.partial(run, "-m", f"benchmarks.startup.cold_{key}", method, str(cores()))
        for method in methods
        for key in SYSTEMS
    }
    for subject in subjects.values():
        subject()  # compiles
    timings = interleaved(subjects, repeat)
    found = []
    for method in methods:
        bare, ours = (first_result(method, key, timings[method, key]) for key in SYSTEMS)
        found += [bare, target({**ours, "ratio": ours["ms"] / bare["ms"]}, "ratio", MOST_FIRST_RATIO)]
    return found


def first_result(method: str, key: str, samples: list[dict[str, float]]) -> Row:
    return {
        "what": f"first result, {method}, {SYSTEMS[key]}",
        **spread("ms", [sample["first"] * 1e3 for sample in samples]),
        "imports ms": statistics.median(sample["imports"] * 1e3 for sample in samples),
        "close ms": statistics.median(sample["close"] * 1e3 for sample in samples),
    }


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
