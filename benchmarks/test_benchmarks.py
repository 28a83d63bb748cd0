"""Small stencils under pytest-benchmark: ``pytest benchmarks --benchmark-only``; the rest is elsewhere."""

from __future__ import annotations

import pytest

from benchmarks._measure import warm
from benchmarks.patterns import PATTERNS, check, noop, spin, stencil
from benchmarks.systems import load

WORKERS = 2


@pytest.mark.parametrize("key", ["serial", "forgepar", "forgepar_eager", "process_pool"])
@pytest.mark.parametrize("kernel", [noop, spin(1e-4)], ids=["noop", "spin_100us"])
def test_stencil(benchmark, key, kernel):
    if reason := load([key])[key].available():
        pytest.skip(reason)
    pattern = stencil(50, 5)
    with warm(key, WORKERS) as runner:
        benchmark.extra_info["tasks"] = pattern.n_tasks
        last_row = benchmark.pedantic(
            runner.run, setup=lambda: ((runner.declare(pattern, kernel),), {}), rounds=5, warmup_rounds=1
        )
    check(pattern, last_row)


@pytest.mark.parametrize("name", PATTERNS)
def test_declaring(benchmark, name):
    pattern = PATTERNS[name](100, 20)
    with warm("forgepar", 1) as runner:
        workflow, _ = benchmark.pedantic(runner.declare, (pattern, noop), rounds=5)
    assert len(workflow) == pattern.n_tasks
