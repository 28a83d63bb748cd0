"""Runs whose messages are under way for a while, each way: tasks begin once, have one outcome, and the runs end."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from conftest import SLOW_SHARE
from daskcluster import cluster, restore_exceptions
from delays import DelayedBackend, DelayedExecutor, check_run

import forgepar as fp

PATIENCE = 300.0  # seconds: of a run that ends in a tenth of that


def side_by_side(n, n_threads, run):
    """Run so many runs, and return how many there were of each kind; the first fault is raised."""
    with ThreadPoolExecutor(n_threads) as threads:
        return Counter(future.result(PATIENCE) for future in [threads.submit(run, seed) for seed in range(n)])


def through_futures(tmp_path, n, n_threads, most):
    with ProcessPoolExecutor(4) as processes, ThreadPoolExecutor(16) as threads:
        # Forked before there are threads that hold locks.
        list(processes.map(os.path.exists, ["/"] * 8))

        def run(seed):
            inner = processes if seed % 2 else threads
            far = DelayedExecutor(inner, seed, most, is_far=seed % 3 == 0)
            return check_run(seed, fp.FuturesBackend(far, 3), tmp_path)

        return side_by_side(n, n_threads, run)


def through_dask(tmp_path, n, n_threads, most, n_workers=2, *, holds=False):
    distributed = pytest.importorskip("distributed", reason="distributed is in the extra dask")
    restore_exceptions()
    with cluster(n_workers, 16) as address, distributed.Client(address, set_as_default=False) as client:

        def run(seed):
            backend = DelayedBackend(client, seed, most, n_slots=3)
            return check_run(seed, backend, tmp_path, holds=holds and seed % 5 == 0)

        return side_by_side(n, n_threads, run)


@pytest.mark.filterwarnings("ignore:The task on worker")
def test_runs_through_futures(tmp_path):
    kinds = through_futures(tmp_path, 8, 8, 0.2)
    assert kinds.total() == 8


def test_runs_on_a_cluster(tmp_path):
    kinds = through_dask(tmp_path, 6, 6, 0.4, holds=True)
    assert kinds.total() == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The task on worker")
def test_many_runs_far_away_through_futures(tmp_path):
    n = 250 // SLOW_SHARE
    assert through_futures(tmp_path, n, 25, 2.0).total() == n


@pytest.mark.slow
def test_many_runs_on_a_cluster_far_away(tmp_path):
    n = 250 // SLOW_SHARE
    assert through_dask(tmp_path, n, 25, 2.0, holds=True).total() == n
