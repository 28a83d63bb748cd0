"""What workers of a pool are told to unmap, and pools whose workers do not start at the first attempt."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from conftest import PATIENCE, is_gone, wait_until

import forgepar as fp
from forgepar.backends import worker_starter


def length(array):
    return len(array)


def mapped_bytes():
    """Return how much of the arena this worker has mapped, for writing or reading."""
    with open("/proc/self/maps") as file:  # noqa: PTH123
        lines = [line.split() for line in file if "forgepar-" in line and "board" not in line]
    return sum(int(line[0].split("-")[1], 16) - int(line[0].split("-")[0], 16) for line in lines)


@pytest.mark.parametrize("kind", ["argument", "result"])
def test_workers_unmap_a_large_value_that_is_freed(kind):
    """The one that takes it, and one that made it: each has it mapped."""
    n_bytes = 16 << 20
    with fp.ForgeExecutor(1) as pool:
        before = pool.submit(mapped_bytes).result(PATIENCE)
        if kind == "argument":
            assert pool.submit(length, np.ones(n_bytes // 8)).result(PATIENCE) == n_bytes // 8
        else:
            large = pool.submit(np.ones, n_bytes // 8)
            assert pool.submit(length, large).result(PATIENCE) == n_bytes // 8
            assert pool.submit(mapped_bytes).result(PATIENCE) >= before + n_bytes
            del large
        wait_until(lambda: pool.submit(mapped_bytes).result(PATIENCE) < before + n_bytes, "the worker to unmap it")


def test_an_idle_worker_is_told_at_once_what_to_unmap():
    with fp.ForgeExecutor(1) as pool:
        sent = []
        large = pool.put(np.ones(2 << 20))
        pool.submit(length, large).result(PATIENCE)
        backend = pool._scheduler.backend
        send, backend.send = backend.send, lambda slot, batch: (sent.append(batch), send(slot, batch))
        name = large.wire[0][0] if isinstance(large.wire[0], tuple) else large.wire[0]
        del large
        wait_until(lambda: any(batch.drop for batch in sent), "the message")
        assert [batch.n_tasks for batch in sent] == [0]
        assert str(name) in map(str, sent[0].drop)


def stumble(path):
    """End the process unless it is the last of the attempts that a slot has in a row."""
    with path.open("a") as file:
        file.write("x")
    if path.stat().st_size % worker_starter._START_ATTEMPTS:
        os._exit(3)


def test_failed_starts_count_only_in_a_row(tmp_path):
    """Each worker starts at the last attempt; so a second one starts only if the count began anew."""
    path = tmp_path / "attempts"
    with fp.ForgeExecutor(1, initializer=stumble, initargs=(path,)) as pool:
        for n_workers in (1, 2):
            pid = pool.submit(os.getpid).result(PATIENCE)
            assert path.stat().st_size == n_workers * worker_starter._START_ATTEMPTS
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: is_gone(pid), "the worker to end")
            wait_until(lambda n=n_workers: path.stat().st_size > n * worker_starter._START_ATTEMPTS, "the next start")
