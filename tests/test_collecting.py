"""Clearing a store: what goes, what stays, and that what stays can still be taken up."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.collecting import collect
from forgepar.storefile import files_of


def run(store, offset, **more):
    wf = fp.Workflow("large")
    wf.add(lambda arrays: float(sum(array[0] for array in arrays)), wf.map(np.full, [50_000] * 3, [offset, 1, 2]))
    return wf.run(backend="inline", store=store, **more)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs.db"


def numbers(store):
    with fp.Store.open(store) as opened:
        return [facts.number for facts in opened.runs()]


def n_files(store):
    return len(list(files_of(store).glob("??/*")))


def test_old_runs_go_with_their_values_and_files(store):
    for offset in range(10, 15):
        run(store, offset)
    assert n_files(store) == 7  # two of them are the same in all runs
    collected = collect(store, keep=2)
    assert numbers(store) == [4, 5]
    assert (collected.n_runs, collected.n_values, collected.n_files) == (3, 6, 3)
    assert n_files(store) == 4
    assert collected.bytes_after < collected.bytes_before
    assert run(store, 14, resume=True).status_counts() == {"cached": 4}
    assert run(store, 10, resume=True).status_counts() == {"cached": 2, "completed": 2}


def test_values_that_a_younger_run_took_over_stay(store):
    run(store, 10)
    run(store, 10, resume=True)
    collect(store, keep=1)
    assert numbers(store) == [2]
    with fp.Store.open(store) as opened:
        assert opened.run().value("full-0")[0] == 10
    assert run(store, 10, resume=True).status_counts() == {"cached": 4}


def test_values_of_the_oldest_runs_go_until_the_rest_is_small_enough(store):
    for offset in (10, 11, 12):
        run(store, offset)
    size = 50_000 * 8
    collected = collect(store, max_bytes=4 * size + 10_000)
    assert numbers(store) == [1, 2, 3]
    assert n_files(store) == 4
    assert collected.n_files == 1
    assert run(store, 12, resume=True).status_counts() == {"cached": 4}
    assert run(store, 10, resume=True)["lambda"] == 13.0


def test_nothing_may_stay(store):
    run(store, 10)
    collect(store, keep=0, max_bytes=0)
    assert numbers(store) == []
    assert n_files(store) == 0
    assert run(store, 10, resume=True).status_counts() == {"completed": 4}


def test_without_limits_nothing_goes_but_what_was_torn(store):
    run(store, 10)
    torn = next(files_of(store).glob("??/*")).parent / ".writing-1-1"
    torn.write_bytes(b"x")
    os.utime(torn, (1, 1))
    assert collect(store).n_runs == 0
    assert not torn.exists()
    assert run(store, 10, resume=True).status_counts() == {"cached": 4}


def test_a_run_that_goes_is_left_alone_with_its_files(store, tmp_path):
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    run(store, 10)
    wf = fp.Workflow("live")
    array = wf.add(np.full, 60_000, 5)
    held = wf.add(lambda a: (begun.touch(), wait_until(gate.exists, "the gate"), float(a[0]))[2], array)
    results = []
    thread = threading.Thread(target=lambda: results.append(wf.run(backend="inline", store=store)[held]))
    thread.start()
    wait_until(begun.exists, "the run")
    try:
        collected = collect(store, keep=0, max_bytes=0)
    finally:
        gate.touch()
        thread.join()
    assert (collected.n_runs, collected.n_files) == (1, 0)
    assert results == [5.0]
    assert numbers(store) == [2]


@pytest.mark.parametrize("wrong", [{"keep": -1}, {"max_bytes": -1}])
def test_numbers_below_0_are_told(store, wrong):
    with pytest.raises(ValueError, match="is below 0"):
        collect(store, **wrong)


def test_a_store_that_is_not_there_is_not_made(store):
    with pytest.raises(fp.StoreError, match="there is no run store"):
        collect(store, keep=1)
    assert not store.exists()
