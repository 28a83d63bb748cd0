"""Random delays between a caller and its workers, each way, and runs that show what becomes of tasks under them.

What travels one way keeps its order, as it does on a connection; the two ways, and different workers, know nothing of
each other.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import threading
import time
from collections import Counter, deque
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from unittest.mock import patch

import forgepar as fp
from forgepar.backends.dask import backend as dask
from forgepar.backends.dask import cluster as daskcluster
from forgepar.backends.dask import worker_site
from forgepar.records import events


class Line:
    """Says when what is sent at a moment arrives: up to ``most`` seconds later, and behind what was sent before."""

    def __init__(self, seed: object, most: float) -> None:
        self._random = random.Random(str(seed))
        self._most = most
        self._last = 0.0

    def arrival(self, now: float) -> float:
        self._last = max(now + self._random.uniform(0.0, self._most), self._last + 1e-6)
        return self._last


# Futures


class DelayedExecutor(Executor):
    """An executor whose calls, and what comes of them, are under way for a while.

    Args:
        inner: where the calls run.
        seed: what chance derives from.
        most: seconds that a way takes at most.
        is_far: have the calls find no board, as on another machine.
    """

    def __init__(self, inner: Executor, seed: int, most: float, *, is_far: bool = False) -> None:
        self._inner = inner
        self._there, self._back = Line((seed, "there"), most), Line((seed, "back"), most)
        self._is_far = is_far
        self._lock = threading.Lock()

    def submit(self, fn, /, request):
        outer = Future()
        if self._is_far:
            request = request._replace(board="/nowhere/board")
        self._after(self._there, self._arrive, outer, fn, request)
        return outer

    def _arrive(self, outer, fn, request):
        if outer.set_running_or_notify_cancel():
            self._inner.submit(fn, request).add_done_callback(lambda done: self._after(self._back, settle, outer, done))

    def _after(self, line, call, *arguments):
        with self._lock:
            now = time.monotonic()
            timer = threading.Timer(line.arrival(now) - now, call, arguments)
        timer.daemon = True
        timer.start()


def settle(outer, done):
    if (error := done.exception()) is not None:
        outer.set_exception(error)
    else:
        outer.set_result(done.result())


# Dask


def delayed_batch(seconds, *arguments):
    """Stand in for `worker_site.run_batch`: what a worker is sent takes a while to arrive."""
    time.sleep(seconds)
    return worker_site.run_batch(*arguments)


class DelayedClient:
    """A Dask client whose batches are under way for a while."""

    def __init__(self, client, seed, most):
        self._client = client
        self._random = random.Random(f"{seed} batches")
        self._most = most

    def __getattr__(self, name):
        return getattr(self._client, name)

    def submit(self, fn, *arguments, **options):
        if fn is not worker_site.run_batch:
            return self._client.submit(fn, *arguments, **options)
        return self._client.submit(delayed_batch, self._random.uniform(0.0, self._most), *arguments, **options)


class DelayedBackend(fp.DaskBackend):
    """A Dask backend that is far from its workers."""

    def __init__(self, client, seed, most, **options):
        super().__init__(client, **options)
        self._seed, self._most = seed, most

    def open(self, n_wanted):
        if self._cluster is None:
            with _opening, patch.object(dask, "Cluster", partial(DelayedCluster, seed=self._seed, most=self._most)):
                super().open(n_wanted)
            self._far_client = DelayedClient(self._client, self._seed, self._most)
        else:
            super().open(n_wanted)

    def send(self, slot, batch):
        near, self._client = self._client, self._far_client
        try:
            super().send(slot, batch)
        finally:
            self._client = near


_opening = threading.Lock()


class DelayedCluster(daskcluster.Cluster):
    """Orders and events under way for a while, each worker's in their order."""

    def __init__(self, client, seed, most):
        self._seed, self._most = seed, most
        self._lines = {}
        self._tasks = []  # the loop holds no task itself
        super().__init__(client)

    def _send(self, way, address, call):
        loop = asyncio.get_running_loop()
        line, queue = self._lines.setdefault((way, address), (Line((self._seed, way, address), self._most), deque()))
        queue.append(call)
        loop.call_at(line.arrival(loop.time()), lambda: queue.popleft()())

    def _receive(self, event):
        self._send("back", event[1]["worker"], partial(super()._receive, event))

    async def _send_command(self, worker, command):
        arrive = super()._send_command
        self._send("there", worker.address, lambda: self._tasks.append(asyncio.ensure_future(arrive(worker, command))))


# Runs


def note(log, seconds, holds, *_):
    """Note that this attempt of the task begins, and take some time; the value is the task's name."""
    context = fp.context()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{context.task} {context.attempt}\n".encode())
    os.close(descriptor)
    if holds:  # the interpreter
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    else:
        time.sleep(seconds)
    return context.task


def linger(log):
    """Outlast the timeout of the first attempt."""
    if (context := fp.context()).attempt == 1:
        note(log, 0.0, False)
        until = time.monotonic() + 20.0
        while not context.cancelled() and time.monotonic() < until:
            time.sleep(0.01)
        return "late"
    return note(log, 0.0, False)


def graph(seed, log, holds):
    """A workflow of some layers, most of its tasks short, some much longer than those declared alike."""
    chance = random.Random(seed)
    wf = fp.Workflow(f"delays-{seed}")
    level = []
    for _ in range(chance.randint(1, 3)):
        n = chance.randint(3, 40)
        slow = {chance.randrange(n) for _ in range(chance.choice([0, 1, 2]))}
        seconds = [chance.uniform(0.3, 0.7) if i in slow else chance.choice([0.0, 0.001]) for i in range(n)]
        effects = chance.random() < 0.2
        fn = fp.task(note).options(effects=effects, timeout=60.0 if chance.random() < 0.2 else None)
        sources = [level[chance.randrange(len(level))] for _ in range(n)] if level else [None] * n
        level = wf.map(fn, [log] * n, seconds, [holds and i in slow for i in range(n)], sources)
    return wf, chance


def check_run(seed, backend, folder, *, holds=False):
    """Run a workflow and see that each attempt of a task began once, each task has one outcome, and the run ends."""
    log = Path(folder, f"log-{seed}")
    wf, chance = graph(seed, str(log), holds)
    kind = chance.choice(["plain", "plain", "timeout", "cancelled", "lingers"])
    rules = {"schedule": chance.choice(["layers", "eager"]), "rollback": "none"}
    if kind == "timeout":
        rules["timeout"] = chance.uniform(0.2, 2.0)
    elif kind == "cancelled":
        rules["cancel"] = token = fp.CancellationToken()
        timer = threading.Timer(chance.uniform(0.0, 1.0), token.cancel)
        timer.start()
    elif kind == "lingers":
        # Where no board is shared, the time that an answer is under way counts too, and most attempts end by that: of
        # ten, all did in about one run of twenty.
        wf.add(fp.task(linger).options(timeout=0.5, retries=99), str(log))
    with fp.WorkflowExecutor(backend=backend) as executor:
        result = result_of(executor, wf, rules)
    if kind in ("plain", "lingers"):
        assert result.status == "completed"
    if kind == "cancelled":
        timer.join()
    check_result(result, Counter(log.read_text().split("\n")[:-1]) if log.exists() else Counter(), kind)
    return kind


def result_of(executor, wf, rules):
    """Run a workflow, which may fail by the time it was given alone."""
    try:
        return executor.run(wf, outputs="all", **rules)
    except fp.WorkflowFailed as failure:
        if "timeout" not in rules or [type(error) for error in failure.exceptions] != [fp.RunTimeout]:
            raise
        return failure.result


def check_result(result, begun, kind=""):
    """See that a run's records and events agree with what its tasks did."""
    assert max(begun.values(), default=1) == 1, f"attempts that began twice: {begun.most_common(3)}"
    tries = Counter(line.split()[0] for line in begun)
    told = Counter(type(event).__name__ + " " + event.task for event in result.events if getattr(event, "task", None))
    started = Counter((e.task, e.attempt) for e in result.events if isinstance(e, events.WorkflowTaskStarted))
    assert max(started.values(), default=1) == 1
    assert sum(result.status_counts().values()) == len(result.records)
    for record in result.records:
        n_done = told[f"WorkflowTaskCompleted {record.name}"]
        if record.status == "completed":
            assert result[record.name] == record.name, (record, result[record.name], kind)
            assert (n_done, tries[record.name]) == (1, record.attempt), (record, kind)
        else:
            assert (record.status, n_done) == ("cancelled", 0)
            assert tries[record.name] <= max(record.attempt, 1)
