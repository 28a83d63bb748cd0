"""One soak: a program that uses a warm executor for some seconds and measures itself meanwhile.

It prints a line of JSON: what each mark found, and how many jobs were done by then. With ``--samples`` each sample is
printed as it is taken, too.

    python -m benchmarks.soak.one workflows|jobs|joblib SECONDS [--samples]
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import sys
import time
from typing import Any

from benchmarks.soak.gauge import reading

MARKS = (0.1, 0.5, 1.0)  # as shares of the whole: of ten minutes the first, the fifth and the last
DISTURBED = (0.1, 0.5)  # between these shares of the time workers are killed now and then
_SAMPLES = 100  # in the whole time; a mark is the median of the last few
_LAST = 5


def soak(name: str, seconds: float, prints: bool) -> list[dict[str, float]]:
    """Run pieces of work until the time is over; return what was found at the start and at each mark.

    Samples are taken between two pieces, when nothing is running, and behind one that is always the same: so there are
    as many workers at each, and none is dead.
    """
    load: Any = importlib.import_module(f"benchmarks.soak.load_{name}")
    with load.opened() as pieces:
        n_jobs = sum(piece(number, disturbs) for disturbs in (True, False) for number, piece in enumerate(pieces))
        n_jobs += pieces[0](0, False)
        found = [_sample(n_jobs, 0.0, prints)]
        begin = time.monotonic()
        samples: list[dict[str, float]] = []
        marks = list(MARKS)
        number = len(pieces)
        while marks:
            share = (time.monotonic() - begin) / seconds
            n_jobs += pieces[number % len(pieces)](number, DISTURBED[0] <= share < DISTURBED[1])
            number += 1
            share = (time.monotonic() - begin) / seconds
            if share * _SAMPLES >= len(samples) + 1 or share >= marks[0]:
                n_jobs += pieces[0](0, False)
                samples.append(_sample(n_jobs, share * seconds, prints))
            if share >= marks[0]:
                found.append(_medians(samples[-_LAST:]))
                del marks[0]
    return found


def _sample(n_jobs: int, seconds: float, prints: bool) -> dict[str, float]:
    gc.collect()  # so that it does not matter when it last ran by itself
    taken = {"jobs": n_jobs, **reading()}
    if prints:
        print(json.dumps({"seconds": round(seconds, 1), **{name: round(value, 1) for name, value in taken.items()}}))
        sys.stdout.flush()
    return taken


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: samples[-1][name] if name == "jobs" else statistics.median(sample[name] for sample in samples)
        for name in samples[0]
    }


if __name__ == "__main__":
    print(json.dumps(soak(sys.argv[1], float(sys.argv[2]), "--samples" in sys.argv)))
