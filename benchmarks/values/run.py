"""One large array, many consumers: seconds until all have read it; and what flows through the parent's memory.

A task makes an array of 256 MiB; 16 tasks each add up squares of all of it, block by block. "Cold" is the first such
run on workers that are up, "warm" the second on the same workers, which finds memory that the first one used; each
system has a process of its own. Ratios are to the first run in one process without an engine. "In place" makes the
array by `forgepar.empty`.

The other rows are forgepar's alone: 64 stages that hand on 64 MiB each, and what the parent's resident memory grew by.

    python -m benchmarks.values.run [--small] [--systems forgepar,joblib]
"""

from __future__ import annotations

import functools
import gc
import statistics
from typing import Any

import psutil

from benchmarks._common import Row, cores, main, target
from benchmarks._measure import Outcome, apart, timed, tolerant, warm
from benchmarks.patterns import Pattern
from benchmarks.scaling.run import peak_rss
from benchmarks.systems import load

TITLE = "Values: seconds from one array of 256 MiB to 16 consumers"
ARRAY_BYTES = 256 << 20
SMALL_ARRAY_BYTES = 16 << 20
CONSUMERS = 16
MOST_COLD, MOST_WARM = 1.0, 0.6  # of a run in one process
LEAST_TO_BEST_PEER, LEAST_TO_POOL = 2.0, 20.0
STAGES, STAGE_BYTES, SMALL_STAGE_BYTES = 64, 64 << 20, 4 << 20
MOST_GROWTH_MIB = 8.0
_IN_PLACE = "in_place"
_NO_PEERS = ("serial", "forgepar", _IN_PLACE)
_BLOCK = 1 << 17  # elements: 1 MiB, so that only the array itself is large


def rows(small: bool, repeat: int, systems: list[str] | None = None) -> list[Row]:
    """Measure every system, and forgepar's parent."""
    n_bytes = SMALL_ARRAY_BYTES if small else ARRAY_BYTES
    chosen = {key: system for key, system in load(systems).items() if key != "forgepar_eager"}
    reasons = {key: system.available() for key, system in chosen.items()}
    subjects = {key: functools.partial(apart, seconds, key, n_bytes) for key in chosen if not reasons[key]}
    outcomes = tolerant(subjects, repeat)
    found = {key: row(chosen[key].NAME, outcome) for key, outcome in outcomes.items()}
    absent = [{"system": chosen[key].NAME, "note": reason} for key, reason in reasons.items() if reason]
    if "forgepar" in found:
        in_place = tolerant({_IN_PLACE: functools.partial(apart, seconds, _IN_PLACE, n_bytes)}, repeat)
        found |= {key: row("forgepar, in place", outcome) for key, outcome in in_place.items()}
    compared = [compare(key, made, found, small) for key, made in found.items()]
    return [*compared, *absent, *(parent_rows(small) if "forgepar" in chosen else [])]


def seconds(key: str, n_bytes: int) -> dict[str, float]:
    """Run the graph twice on a system's workers."""
    kernel = functools.partial(fill_or_read if key == _IN_PLACE else make_or_read, n_bytes)
    with warm("forgepar" if key == _IN_PLACE else key, cores()) as runner:
        found, values = {}, []
        for name in ("cold", "warm"):
            gc.collect()
            declared = runner.declare(fan_out(CONSUMERS), kernel)
            found[name], value = timed(runner.run, declared)
            values.append(value)
    if values != [[make_or_read(n_bytes, make_or_read(n_bytes))] * CONSUMERS] * 2:
        raise RuntimeError(f"{key} gave wrong values: {values}")
    return found


def fan_out(width: int) -> Pattern:
    """One task, and tasks that all take its value."""
    return Pattern("fan_out", width, 2, lambda _layer, _i: (0,), lambda layer: width if layer else 1)


def make_or_read(n_bytes: int, *inputs: Any) -> Any:
    """Make an array, or add up the squares of what one differs from 1 by."""
    import numpy as np

    if not inputs:
        return np.arange(n_bytes // 8, dtype=np.float64)
    (array,) = inputs
    blocks = (array[begin : begin + _BLOCK] for begin in range(0, len(array), _BLOCK))
    return sum(float(((block - 1.0) ** 2).sum()) for block in blocks)


def fill_or_read(n_bytes: int, *inputs: Any) -> Any:
    """Do the same, but make the array where those who read it will find it."""
    import numpy as np

    import forgepar as fp

    if inputs:
        return make_or_read(n_bytes, *inputs)
    array = fp.empty(n_bytes // 8)
    for begin in range(0, len(array), _BLOCK):
        block = array[begin : begin + _BLOCK]
        block[:] = np.arange(begin, begin + len(block))
    return array


def row(name: str, outcome: Outcome[dict[str, float]]) -> Row:
    if isinstance(outcome, str):
        return {"system": name, "note": outcome}
    return {"system": name, **{which: statistics.median(sample[which] for sample in outcome) for which in outcome[0]}}


def compare(key: str, made: Row, found: dict[str, Row], small: bool) -> Row:
    """Return a row with its ratios to one process and, for forgepar, to the peers, held against the targets."""
    serial = found.get("serial", {})
    if "cold" not in made or "cold" not in serial:
        return made
    made = {**made, "cold x serial": made["cold"] / serial["cold"], "warm x serial": made["warm"] / serial["cold"]}
    if key not in ("forgepar", _IN_PLACE) or small:
        return made
    judged = [target(made, "cold x serial", MOST_COLD), target(made, "warm x serial", MOST_WARM)]
    peers = {other: entry["cold"] for other, entry in found.items() if other not in _NO_PEERS and "cold" in entry}
    if peers:
        made["best peer x"] = min(peers.values()) / made["cold"]
        judged.append(target(made, "best peer x", LEAST_TO_BEST_PEER, at_least=True))
    if "process_pool" in peers:
        made["pool x"] = peers["process_pool"] / made["cold"]
        judged.append(target(made, "pool x", LEAST_TO_POOL, at_least=True))
    return {**made, "target": ", ".join(each["target"] for each in judged), "met": all(each["met"] for each in judged)}


def parent_rows(small: bool) -> list[Row]:
    """Measure what the parent's memory grows by while values flow from worker to worker."""
    n_bytes = SMALL_STAGE_BYTES if small else STAGE_BYTES
    grown = apart(parent_growth, n_bytes)
    what = f"parent MiB for {STAGES * n_bytes / (1 << 30):g} GiB"
    return [target({"system": "forgepar", what: grown / (1 << 20)}, what, MOST_GROWTH_MIB)]


def parent_growth(n_bytes: int) -> int:
    """Run stages that each hand a new array to the next; return what the parent's memory grew by at its highest."""
    import forgepar as fp

    with fp.WorkflowExecutor(workers=cores()) as executor:
        executor.run(stages(fp.Workflow(), 2, 1 << 20))
        gc.collect()
        before, peak_before = psutil.Process().memory_info().rss, peak_rss()
        executor.run(stages(fp.Workflow(), STAGES, n_bytes))
        grown = psutil.Process().memory_info().rss - before
    return max(grown, peak_rss() - before if peak_rss() > peak_before else 0)


def stages(workflow: Any, n_stages: int, n_bytes: int) -> Any:
    """Add a chain of tasks to a workflow, the last of which returns a number."""
    handle = workflow.add(make_or_read, n_bytes)
    for _ in range(n_stages - 1):
        handle = workflow.add(_add_one, handle)
    workflow.add(len, handle)
    return workflow


def _add_one(array: Any) -> Any:
    return array + 1.0


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
