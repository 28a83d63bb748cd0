"""Runs as tables, for tests of what is made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from forgepar.records.table import RunTable
from forgepar.scheduling.run_state import Status


def a_table(**changes: Any) -> RunTable:
    """Two layers on two workers: load-0 and load-1, then join, which takes both; half a second between the layers."""
    table = RunTable(
        run_id="r1",
        workflow="nightly",
        status="completed",
        schedule="layers",
        n_workers=2,
        began_at=1_700_000_000.0,
        wall_seconds=6.0,
        cpu_seconds=5.0,
        peak_rss=1 << 20,
        names=["load-0", "load-1", "join"],
        callables=["load", "join"],
        callable_of=np.array([0, 0, 1], np.int32),
        layer=np.array([0, 0, 1], np.int32),
        status_of=np.full(3, Status.COMPLETED, np.int8),
        start=np.array([0.5, 0.5, 3.0]),
        seconds=np.array([2.0, 1.0, 2.5]),
        worker=np.array([0, 1, 1], np.int32),
        attempt=np.ones(3, np.int32),
        bytes=np.array([100, 1000, 50], np.int64),
        sources=np.array([0, 1], np.int32),
        targets=np.array([2, 2], np.int32),
    )
    return replace(table, **changes)


def a_large_table(n_layers: int, width: int, n_workers: int = 8, seed: int = 0) -> RunTable:
    """Layers of one width, a task waiting for two of the layer before, laid out worker by worker."""
    chance = np.random.default_rng(seed)
    n = n_layers * width
    layer, place = np.divmod(np.arange(n), width)
    seconds = chance.exponential(0.01, n)
    worker = place % n_workers
    start, now = np.empty(n), 0.01
    for begin in range(0, n, width):
        ends = np.full(n_workers, now)
        for slot in range(n_workers):
            rows = np.arange(begin + slot, begin + width, n_workers)
            start[rows] = now + np.cumsum(seconds[rows] + 1e-4) - seconds[rows]
            ends[slot] = (start[rows] + seconds[rows]).max(initial=now)
        now = float(ends.max()) + 1e-3
    later = np.arange(width, n)
    sources = np.concatenate([later - width, layer[width:] * width - width + (place[width:] + 1) % width])
    callables = [f"step_{number}" for number in range(12)]
    called = layer % len(callables)
    return a_table(
        workflow="large",
        n_workers=n_workers,
        wall_seconds=now,
        names=[f"{callables[number]}-{i}" for i, number in enumerate(called.tolist())],
        callables=callables,
        callable_of=called.astype(np.int32),
        layer=layer.astype(np.int32),
        status_of=np.full(n, Status.COMPLETED, np.int8),
        start=start,
        seconds=seconds,
        worker=worker.astype(np.int32),
        attempt=np.ones(n, np.int32),
        bytes=chance.integers(0, 1 << 20, n),
        sources=sources.astype(np.int32),
        targets=np.concatenate([later, later]).astype(np.int32),
    )
