"""A Dask cluster as the workers: batches are Dask tasks, and large values stay on the cluster as futures.

    DaskBackend.send ──> client.submit(run_batch) ──> scheduler ──> worker: WorkerSite
    DaskBackend.wait <── SlotTable <── Cluster.next <── events <── scheduler <──┘  replies, positions, output

Dask moves values between workers, frees them, recomputes lost ones, authenticates and encrypts. The dispatcher keeps
the order of tasks, retries and records, as with every backend. A slot is a thread of a Dask worker; a worker that joins
later gets the slots of one that left.

Dask cannot end a thread; see ``on_kill``.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

from forgepar._validate import MOST_WORKERS, check_choice, check_count, is_number, refusal
from forgepar.backends.base import Joined, Notice, OutputNotice, Traits
from forgepar.backends.dask import worker_site
from forgepar.backends.dask.cluster import (
    Cluster,
    ClusterEvent,
    ClusterWorker,
    SchedulerLost,
    SiteMessage,
    SlotFreed,
    WakeUp,
    WorkerFound,
    WorkerLeft,
    WorkerRefused,
    connected,
    n_threads,
)
from forgepar.backends.dask.slot_table import SlotTable
from forgepar.backends.dask.slots import SentBatch
from forgepar.backends.dask.values import ClusterArena
from forgepar.backends.hosted_worker import batch_segments
from forgepar.backends.messages import Batch
from forgepar.backends.worker_board import NO_LIMIT
from forgepar.errors import WorkerStartFailed
from forgepar.system.forking import fork_safe
from forgepar.values.arena import Arena
from forgepar.version import public

_MEET_SECONDS = 10.0  # for the workers on the cluster to answer when a backend is opened


@public
class DaskBackend:
    """Runs workflows on a Dask cluster: ``wf.run(backend=DaskBackend("tcp://host:8786"))``.

    The caller's process receives outputs, numbers and short text; other values go from worker to worker. Workers and
    scheduler need the same version of this package, and workers need the modules that tasks come from; what is defined
    in a script is sent.

    If a worker leaves during a run, the tasks that it ran are run again, up to three times each, and Dask recomputes
    the values that it had. Workers that fetch values from a killed worker wait for Dask's
    ``distributed.comm.timeouts.connect``, 30 s by default.

    Encryption and authentication are Dask's: pass a client made with its ``Security``. The progress of a run that a
    task can ask for is that at the time when its batch was sent.

    Args:
        client: a `distributed.Client`, which stays open; or an address, for which the backend makes a client and
            closes it.
        n_slots: how many tasks run at once; None: as many as the cluster has threads at that moment. Slots beyond the
            number of threads are filled when workers join.
        on_kill: what happens to a task that is to end because of its timeout or the end of its run. Dask cannot end a
            thread. "forget" lets the task continue, ignores its outcome and gives its slot no work until it returns;
            `TaskContext.cancelled` is then true in it. "restart" has the nanny of its worker end the process, with all
            that runs in it, including tasks of other users.
        patience: how long to wait for a worker while there is none, seconds.

    Raises:
        ImportError: `distributed` is missing.
        WorkerStartFailed: no scheduler answers, there is no worker, or workers lack this package (at the first run).

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> doubled = wf.map(divmod, [7, 9], [2, 2])
        >>> wf.run(backend=DaskBackend("tcp://host:8786"))[doubled]  # doctest: +SKIP
        [(3, 1), (4, 1)]
    """

    name = "dask"
    # A message takes 10 ms, so batches are larger, and fewer are reclaimed.
    traits = Traits(
        is_local=False,
        remembers=False,
        ends_tasks=False,
        ends_workers=False,
        is_far=True,
        batch_seconds=0.05,
        stall_seconds=0.25,
        claim_seconds=0.05,
        tells_at_end=True,
    )

    arena: Arena

    def __init__(
        self,
        client: Any,
        *,
        n_slots: int | None = None,
        on_kill: Literal["forget", "restart"] = "forget",
        patience: float = 60.0,
    ) -> None:
        if n_slots is not None:
            check_count("n_slots", n_slots, 1, MOST_WORKERS)
        check_choice("on_kill", on_kill, ("forget", "restart"))
        if not is_number(patience) or patience < 0:
            raise refusal("patience", "a number of seconds, at least 0", patience)
        self.lock = fork_safe(threading.RLock())
        self._given = client
        self._restarts = on_kill == "restart"
        self.traits = self.traits._replace(ends_tasks=self._restarts)
        self._patience = patience
        self._client = connected(client)
        self.n_slots = n_slots or sum(n_threads(self._client).values())
        if not self.n_slots:
            self._disconnect()
            raise WorkerStartFailed(
                f"The Dask cluster at {client!r} has no worker. Start some, or pass n_slots= if workers join later."
            )
        self._table: SlotTable | None = None
        self._cluster: Cluster | None = None
        self._era = 0
        self._run = (0, 0, 0, -1)

    def __repr__(self) -> str:
        return f"<DaskBackend of {self.n_slots} slots at {self._given!r}>"

    # Opening and closing

    def open(self, n_wanted: int) -> None:  # noqa: ARG002
        """Connect to the workers on the cluster."""
        self._era += 1  # a call-off of an earlier run, when it arrives, does not apply to later batches
        if self._cluster is not None:
            return
        self._client = self._client or connected(self._given)
        self._newest = self._n_series = 0
        self._cluster = cluster = Cluster(self._client)
        self.arena = self._values = ClusterArena(self._client, cluster.token)
        self._table = SlotTable(self.n_slots, cluster, self._values, restarts=self._restarts)
        try:
            self._meet_workers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up all batches, release all values, and close the client if the backend made it."""
        if self._cluster is not None:
            cluster, self._cluster = self._cluster, None
            table, self._table = self._open_table, None
            for slot in table.slots:
                slot.clear()
            self._values.close()
            cluster.close(list(table.workers.values()))
        self._disconnect()

    def _disconnect(self) -> None:
        if self._client is not None and self._client is not self._given:
            self._client.close()
            self._client = None

    @property
    def _open_cluster(self) -> Cluster:
        assert self._cluster is not None, "the backend is not open"
        return self._cluster

    @property
    def _open_table(self) -> SlotTable:
        assert self._table is not None, "the backend is not open"
        return self._table

    def _meet_workers(self) -> None:
        """Wait for the workers on the cluster; one that does not answer in time may join later."""
        missing = set(n_threads(self._client))
        until = time.perf_counter() + _MEET_SECONDS
        while missing and time.perf_counter() < until:
            with suppress(queue.Empty):
                event = self._open_cluster.next(until - time.perf_counter())
                if isinstance(event, WorkerRefused):
                    raise WorkerStartFailed(event.message)
                if isinstance(event, WorkerFound):
                    missing.discard(event.worker.address)
                elif isinstance(event, WorkerLeft):
                    missing.discard(event.address)
                self._take(event)
        if not self._open_table.workers:
            self._open_table.no_worker_since = time.perf_counter()

    def joined(self) -> Sequence[Joined]:
        """Return the slots that can take work now."""
        return [slot.joined() for slot in self._table.slots if slot.can_work] if self._table is not None else []

    # Batches

    def send(self, slot: int, batch: Batch) -> None:
        """Submit a batch as a Dask task."""
        if not batch.n_tasks:
            return  # it only names values to drop, and workers keep none
        entry = self._open_table.slots[slot]
        assert entry.worker is not None, f"slot {slot} has no worker"
        if entry.loss is not None:
            entry.sent.append(SentBatch(batch.id, None, time.perf_counter()))
            return  # the slot is about to be lost with all its batches
        batch = self._prepared(batch, entry.worker)
        sources = self._values.sources(batch_segments(batch))
        if batch.id <= self._newest:
            self._n_series += 1  # another executor, which counts from the start
        self._newest = batch.id
        token, series = self._open_cluster.token, self._n_series
        key = f"forgepar-batch-{token}-{series}-{batch.id}"
        is_once = any(template.has_effects for template in batch.templates)
        once = (entry.worker.address, entry.worker.pid) if is_once else None
        future = self._client.submit(
            worker_site.run_batch,
            worker_site.BatchTicket(token, slot, batch.id, series, key, once, self._era, self._run),
            pickle.dumps(tuple(batch), protocol=5),
            list(sources),
            *sources.values(),
            key=key,
            workers=[entry.worker.address],  # the worker removes this restriction when the batch has succeeded
            priority=-batch.id,  # in the order of sending, before other tasks
            pure=False,
        )
        self._open_cluster.watch_over(future)
        entry.sent.append(SentBatch(batch.id, future, time.perf_counter()))
        entry.n_given += batch.n_tasks

    def _prepared(self, batch: Batch, worker: ClusterWorker) -> Batch:
        """Store large callables on the cluster, and convert the end of the run to the worker's clock."""
        callables: Any = [
            (number, self._values.place_callable(batch.run, number, pickled)) for number, pickled in batch.callables
        ]
        facts = batch.facts
        if facts is not None:
            facts = (facts[0]._replace(ends_at=facts[0].ends_at - worker.clock.offset), facts[1])
        return batch._replace(callables=callables, facts=facts)

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened; if nothing does within ``timeout`` seconds, an empty list."""
        deadline = None if timeout is None else time.perf_counter() + timeout
        notices = list[Notice]()
        while True:
            try:
                event = self._open_cluster.next(0.0 if notices else self._seconds_to_wait(deadline))
            except queue.Empty:
                notices += self._open_table.give_up_silent()
                if notices or (deadline is not None and time.perf_counter() >= deadline):
                    return notices
                continue
            notices += self._take(event)
            if isinstance(event, WakeUp) or (isinstance(event, SiteMessage) and event.kind == "limited"):
                return notices

    def _seconds_to_wait(self, deadline: float | None) -> float | None:
        """Return how long to wait at most.

        Raises:
            WorkerStartFailed: there has been no worker for longer than ``patience``.
        """
        now = time.perf_counter()
        ends = [end for end in (deadline, self._open_table.next_loss()) if end is not None]
        if self._open_table.no_worker_since is not None:
            ends.append(self._open_table.no_worker_since + self._patience)
            if ends[-1] <= now:
                raise WorkerStartFailed(
                    f"The Dask cluster at {self._given!r} has had no worker for {self._patience:g} s (patience=). "
                    "Start some."
                )
        return max(0.0, min(ends) - now) if ends else None

    def _take(self, event: ClusterEvent) -> list[Notice]:
        if isinstance(event, SchedulerLost):
            raise WorkerStartFailed(
                f"The Dask scheduler at {self._given!r} does not answer any more: {type(event.error).__name__}: "
                f"{event.error}"
            ) from event.error
        return self._open_table.take(event)

    def rest(self) -> Sequence[OutputNotice]:
        """Return nothing: output arrives in whole lines."""
        return ()

    def wake(self) -> None:
        """Make `wait` return soon."""
        if self._cluster is not None:
            self._cluster.put(WakeUp())

    # Progress, limits and positions

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Publish the progress of the run to tasks of later batches."""
        self._run = (n_tasks, n_settled, n_out, -1 if layer is None else layer)

    def call_off(self, *, is_off: bool = True) -> None:
        """Set the cancelled flag of all tasks, and `wake`."""
        if not is_off:
            self._era += 1
        elif self._cluster is not None:
            for worker in list(self._open_table.workers.values()):
                self._cluster.command(worker, ("call_off", self._era))
        self.wake()

    def position(self, slot: int) -> int:
        """Return the mark of the task that the slot runs, at most a tenth of a second old."""
        return self._open_table.slots[slot].mark[0]

    def may_be_at(self, slot: int) -> int | None:
        """Return the highest mark that the slot can have reached under its limit; None: not known yet."""
        entry = self._open_table.slots[slot]
        return None if entry.loss is not None else entry.farthest

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark, and all later ones."""
        entry = self._open_table.slots[slot]
        entry.limit, entry.farthest = mark, None
        entry.n_limits += 1
        if mark != NO_LIMIT and entry.worker is not None and entry.sent:
            command = ("limit", slot, entry.n_limits, self._n_series, mark, self._newest)
            self._open_cluster.command(entry.worker, command)

    def withdraw(self, slot: int) -> None:
        """Ask the slot's worker to answer for batches that it has not begun."""
        entry = self._open_table.slots[slot]
        if entry.worker is None or entry.loss is not None:
            return
        for sent in entry.sent:
            if sent.batch not in entry.withdrawn:
                entry.withdrawn.add(sent.batch)
                self._open_cluster.command(entry.worker, ("withdraw", sent.batch))

    def started(self, slot: int) -> float:
        """Return when the slot began the task that it runs."""
        return self._open_table.slots[slot].started

    def where(self, slots: Sequence[int]) -> dict[int, str]:
        """Return the stacks of the tasks that slots run, by slot; without workers that do not answer in a second."""
        batches = {}
        for number in slots:
            slot = self._open_table.slots[number]
            if slot.worker is not None and slot.sent:
                batches[number] = (slot.worker, slot.sent[0].batch)
        return self._open_cluster.stacks(batches)

    def n_given(self, slot: int) -> int:
        """Return how many tasks the slot got since its worker joined."""
        return self._open_table.slots[slot].n_given

    def renew(self, slot: int) -> None:
        """Report the slot as joined, with the same worker; Dask can replace it (``dask worker --lifetime``)."""
        self._open_table.slots[slot].n_given = 0
        self._open_cluster.put(SlotFreed(slot))

    # Ending

    def terminate(self, slot: int) -> None:
        """Do the same as `kill`: a Dask worker has no gentler way to end a task."""
        self.kill(slot)

    def kill(self, slot: int) -> None:
        """Give up the batches of a slot; its thread continues to the end of its task, or its worker is restarted."""
        self._open_table.end(self._open_table.slots[slot])
