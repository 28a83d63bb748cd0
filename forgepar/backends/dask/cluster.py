"""The connection to a Dask cluster: its workers, commands to them, and events from them.

    dispatcher's thread                        the client's event loop
    Cluster.command ─────────────────────────> a queue of commands per worker ──> worker_site.run_commands
    Cluster.next <── queue <────────────────── events of worker sites; list of workers, looked up 4 times a second

That a worker left is sent as an event of the scheduler, too. So it arrives after all that the scheduler had received
from that worker.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import platform
import queue
import tempfile
import time
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from forgepar._validate import has, shown
from forgepar.backends.dask import worker_site
from forgepar.errors import WorkerStartFailed
from forgepar.version import __version__

_LOOK_SECONDS = 0.25  # between two look-ups of the list of workers; as much again per hundred workers
_STACK_SECONDS = 1.0  # a worker takes a few ms to return a stack, unless C code holds the interpreter lock
_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 2.0


class WakeUp(NamedTuple):
    """`Cluster.next` is to return now."""


class WorkerFound(NamedTuple):
    """A worker that can run batches is on the cluster."""

    worker: ClusterWorker
    n_threads: int


class WorkerRefused(NamedTuple):
    """A worker that cannot run batches is on the cluster."""

    address: str
    message: str


class WorkerLeft(NamedTuple):
    """A worker has left the cluster; ``visit`` differs from that of its next stay."""

    address: str
    visit: int


class SiteMessage(NamedTuple):
    """A message of a worker site.

    Attributes:
        kind: see `worker_site`.
        content: likewise.
        address: the worker.
        received: when it was received, seconds of this process's clock.
        sent: when it was sent, seconds of the worker's clock.
    """

    kind: str
    content: tuple[Any, ...]
    address: str
    received: float
    sent: float


class DaskTaskFailed(NamedTuple):
    """A task of Dask failed or was cancelled."""

    future: Any


class SlotFreed(NamedTuple):
    """A slot can take batches again."""

    slot: int


class SchedulerLost(NamedTuple):
    """The scheduler does not answer."""

    error: Exception


ClusterEvent: TypeAlias = (
    WakeUp | WorkerFound | WorkerRefused | WorkerLeft | SiteMessage | DaskTaskFailed | SlotFreed | SchedulerLost
)


class ClockOffset:
    """The offset between a worker's clock and this process's, bounded by the messages between them.

    What one side sent cannot have begun on the other side before that, and cannot have been received before it was
    sent. The offset is 0 if the bounds allow it: all processes of one machine share a clock.
    """

    def __init__(self) -> None:
        self._low, self._high = float("-inf"), float("inf")

    def add_sent(self, here: float, there: float) -> None:
        """Note that what was sent at a time of this clock began at a time of the worker's clock."""
        self._low = max(self._low, here - there)
        self._high = max(self._high, self._low)  # clocks drift

    def add_received(self, here: float, there: float) -> None:
        """Note that what the worker sent at a time of its clock was received at a time of this clock."""
        self._high = min(self._high, here - there)
        self._low = min(self._low, self._high)

    @property
    def offset(self) -> float:
        """Seconds to add to a time of the worker's clock for the time of this clock."""
        if self._low <= 0.0 <= self._high:
            return 0.0
        known = [bound for bound in (self._low, self._high) if abs(bound) != float("inf")]
        return sum(known) / len(known)

    def as_here(self, marks: bytes) -> bytes:
        """Convert float64 times of the worker's clock to this clock."""
        offset = self.offset
        return array("d", [at + offset for at in array("d", marks)]).tobytes() if offset else marks


@dataclass(eq=False)
class ClusterWorker:
    """A Dask worker.

    Attributes:
        address: Dask's name for it.
        pid: its process, on its machine.
        visit: number of its stay on the cluster.
        clock: the offset of its clock.
        commands: what is to be sent next; used in the event loop alone.
        is_sending: whether commands are on their way; used in the event loop alone.
    """

    address: str
    pid: int
    visit: int
    clock: ClockOffset = field(default_factory=ClockOffset)
    commands: list[tuple[Any, ...]] = field(default_factory=list)
    is_sending: bool = False


class Cluster:
    """The connection of a backend to a cluster, while the backend is open.

    Args:
        client: a `distributed.Client`.

    Attributes:
        client: the same.
        token: identifies this caller in keys and events.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.token = os.urandom(6).hex()
        self._topic = worker_site.topic_of(self.token)
        self._queue: queue.SimpleQueue[ClusterEvent] = queue.SimpleQueue()
        self._pieces: dict[tuple[str, int], list[bytes]] = {}
        client.subscribe_topic(self._topic, self._receive)
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), client.loop.asyncio_loop)

    def close(self, workers: Sequence[ClusterWorker]) -> None:
        """Have worker sites end what they run, and stop receiving events."""
        self._watching.cancel()

        async def end_sites() -> None:
            present = await self.client.scheduler.ncores()
            if addresses := [worker.address for worker in workers if worker.address in present]:
                await self.client.run(
                    worker_site.run_commands, self.token, [("close",)], workers=addresses, on_error="ignore"
                )
            await self.client.run_on_scheduler(worker_site.forget_topic, self.token)

        with suppress(Exception):  # the scheduler or a worker may have ended; then there is nothing to close
            self.client.unsubscribe_topic(self._topic)
            self.client.sync(asyncio.wait_for, end_sites(), _CLOSE_SECONDS)

    # Workers

    async def _watch(self) -> None:
        """Look up the workers again and again, and probe new ones; one that does not answer delays no other."""
        asked: dict[str, asyncio.Task[None]] = {}
        visits: dict[str, int] = {}
        n_visits = 0
        while True:
            try:
                found = await self.client.scheduler.ncores()
                for address in asked.keys() - found.keys():
                    asked.pop(address).cancel()
                    left = {"kind": "left", "worker": address, "visit": visits.pop(address)}
                    await self.client.scheduler.log_event(topic=self._topic, msg=left)
            except Exception as error:
                self._queue.put(SchedulerLost(error))
                return
            for address, n_threads in found.items():
                if address not in asked or (asked[address].done() and asked[address].exception() is not None):
                    n_visits += 1
                    visits[address] = n_visits
                    asked[address] = asyncio.ensure_future(self._meet(address, n_threads, n_visits))
            await asyncio.sleep(_LOOK_SECONDS * (1 + len(found) / 100))

    async def _meet(self, address: str, n_threads: int, visit: int) -> None:
        """Probe a worker.

        Raises:
            OSError: it does not answer. It is probed again if the next look-up finds it.
        """
        before = time.perf_counter()
        answer = (await self.client.run(worker_site.probe, workers=[address], on_error="return"))[address]
        if isinstance(answer, OSError):
            raise answer
        if fault := _fault_of(answer):
            self._queue.put(
                WorkerRefused(
                    address,
                    f"The Dask worker {address} {fault}. Install the same forgepar and the same Python on workers, "
                    f"scheduler and caller; the caller has forgepar {__version__} and Python "
                    f"{platform.python_version()}.",
                )
            )
            return
        worker = ClusterWorker(address, answer[2], visit)
        worker.clock.add_sent(before, answer[3])
        worker.clock.add_received(time.perf_counter(), answer[3])
        self._queue.put(WorkerFound(worker, n_threads))

    # Events

    def next(self, timeout: float | None) -> ClusterEvent:
        """Return the next event.

        Args:
            timeout: seconds to wait for one; None: any time.

        Raises:
            queue.Empty: there was none.
        """
        return self._queue.get(timeout=timeout)

    def put(self, event: ClusterEvent) -> None:
        """Append an event for `next`; may be called in any thread or signal handler."""
        self._queue.put(event)

    def watch_over(self, future: Any) -> None:
        """Report the end of a Dask task, unless it succeeds."""

        def report(ended: Any) -> None:
            if ended.status != "finished":
                self._queue.put(DaskTaskFailed(ended))

        future.add_done_callback(report)

    def _receive(self, event: tuple[float, dict[str, Any]]) -> None:
        """Assemble the pieces of a message of a site; called in the event loop."""
        piece = event[1]
        if piece["kind"] == "left":
            self._queue.put(WorkerLeft(piece["worker"], piece["visit"]))
            return
        key = (piece["worker"], piece["number"])
        pieces = self._pieces.setdefault(key, [])
        pieces.append(piece["data"])
        if not piece["n_more"]:
            content = pickle.loads(b"".join(self._pieces.pop(key)))
            self._queue.put(SiteMessage(piece["kind"], content, piece["worker"], time.perf_counter(), piece["now"]))

    # Commands

    def command(self, worker: ClusterWorker, command: tuple[Any, ...]) -> None:
        """Send a command to the site of a worker, after the earlier ones.

        Args:
            worker: the worker.
            command: see `worker_site.run_commands`; its outcome arrives as an event.
        """
        self.client.loop.add_callback(self._send_command, worker, command)

    async def _send_command(self, worker: ClusterWorker, command: tuple[Any, ...]) -> None:
        worker.commands.append(command)
        if worker.is_sending:
            return
        worker.is_sending = True
        try:
            while worker.commands:
                commands, worker.commands = worker.commands, []
                # A worker that does not answer has left, or will be reported to have.
                await self.client.run(
                    worker_site.run_commands, self.token, commands, workers=[worker.address], on_error="ignore"
                )
        finally:
            worker.is_sending = False

    def stacks(self, batches: Mapping[int, tuple[ClusterWorker, int]]) -> dict[int, str]:
        """Return the stacks of threads that run batches, by slot; without those that do not answer in a second."""

        async def ask(worker: ClusterWorker, batch: int) -> str:
            asked = self.client.run(
                worker_site.run_commands, self.token, [("stack", batch)], workers=[worker.address], on_error="ignore"
            )
            with suppress(TimeoutError):
                return "".join(*(await asyncio.wait_for(asked, _STACK_SECONDS)).values())
            return ""

        async def ask_all() -> list[str]:
            return await asyncio.gather(*(ask(*where) for where in batches.values()))

        stacks = zip(batches, self.client.sync(ask_all), strict=True)
        return {slot: stack for slot, stack in stacks if stack}

    def restart(self, worker: ClusterWorker) -> None:
        """Have a worker's nanny end its process and start another one."""
        self.client.loop.add_callback(self._restart, worker)

    async def _restart(self, worker: ClusterWorker) -> None:
        try:
            await self.client.restart_workers([worker.address], raise_for_error=False)
        except Exception as error:
            warnings.warn(
                f"The Dask worker {worker.address} cannot be restarted ({error}), so its tasks continue.",
                stacklevel=1,
            )


def connected(given: Any) -> Any:
    """Return ``given`` if it is a client, or a new client for an address or a cluster.

    Raises:
        ImportError: `distributed` is missing.
        WorkerStartFailed: no scheduler answers.
        ValueError: ``given`` is none of these, or an asynchronous or closed client.
    """
    try:
        import distributed
    except ImportError as error:
        raise _missing(error) from error
    if isinstance(given, distributed.Client):
        if given.asynchronous or given.status != "running":
            raise ValueError(
                f"client must be synchronous and open, got {shown(given)}. Pass Client(address), and close it "
                "after the run."
            )
        return given
    if not isinstance(given, str) and not has(given, "scheduler_address"):
        raise ValueError(
            f"client must be a distributed.Client, or an address such as 'tcp://host:8786', got {shown(given)}."
        )
    try:
        return distributed.Client(given, set_as_default=False, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise WorkerStartFailed(
            f"No Dask scheduler answers at {shown(given)} within {_CONNECT_SECONDS:g} s: {error}"
        ) from error


@contextmanager
def local_cluster(n_workers: int) -> Iterator[Any]:
    """Start a cluster on this machine for this process alone, with one thread per worker.

    A port of the loopback interface is open to every user of the machine, and a Dask scheduler runs the code of every
    client that connects. So all parts authenticate each other by TLS, with a certificate that exists only in their
    memory. The HTTP servers have no authentication, so they serve no page. Workers keep files in a folder of this user.

    Args:
        n_workers: how many processes to start.

    Yields:
        The `distributed.LocalCluster`, which a backend takes in place of an address: it has the certificate.

    Raises:
        ImportError: `distributed` or `cryptography` is missing.
    """
    try:
        import dask
        from distributed import LocalCluster, Security
    except ImportError as error:
        raise _missing(error) from error
    try:
        security = Security.temporary()
    except ImportError as error:
        raise ImportError(
            "A Dask cluster made for one run is secured by TLS, which needs cryptography: pip install 'forgepar[dask]'"
        ) from error
    no_pages: dict[str, Any] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
    with (
        tempfile.TemporaryDirectory(prefix="forgepar-dask-") as folder,
        dask.config.set(no_pages),  # workers read it when they start
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            security=security,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            local_directory=folder,
        ) as cluster,
    ):
        yield cluster


def _missing(error: ImportError) -> ImportError:
    return ImportError(f"A Dask cluster needs distributed ({error}): pip install 'forgepar[dask]'")


def n_threads(client: Any) -> dict[str, int]:
    """Return the number of threads of each worker, by address."""
    found: dict[str, int] = client.sync(client.scheduler.ncores)
    return found


def _fault_of(answer: Any) -> str:
    """Return what is wrong with a worker, by its answer to a probe; empty if nothing is."""
    if isinstance(answer, ImportError):
        return f"has no forgepar, or cannot import it ({answer})"
    if isinstance(answer, Exception):
        return f"fails when it is probed ({type(answer).__name__}: {answer})"
    version, python, *_ = answer
    if version != __version__ or python.split(".")[:2] != platform.python_version().split(".")[:2]:
        return f"has forgepar {version} and Python {python}"
    return ""
