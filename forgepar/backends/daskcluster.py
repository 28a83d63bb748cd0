"""A connection to a Dask cluster: who is there, hearing of workers, and telling them.

dispatcher's thread                        the client's loop
Cluster.order, order_all ────────────────> one line of orders a worker ──> dasksite.obey
Cluster.next <── queue <────────────────── events of sites, and who is there, four times a second

That a worker is gone is heard as an event, too: so it comes behind all that the scheduler had from that worker.
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

from forgepar.backends import dasksite
from forgepar.errors import WorkerStartFailed
from forgepar.validation import shown
from forgepar.version import __version__

_LOOK_SECONDS = 0.25  # between two looks at who is there; as much again for every hundred workers
_STACK_SECONDS = 1.0  # a worker takes a few ms to tell where its thread is, unless C code holds the interpreter
_CONNECT_SECONDS = 10.0
_GOODBYE_SECONDS = 2.0


class Woken(NamedTuple):
    """Somebody wants the dispatcher to look around."""


class Came(NamedTuple):
    """A worker is there that can take work, with so many threads."""

    worker: Worker
    n_threads: int


class Refused(NamedTuple):
    """A worker is there that cannot."""

    address: str
    message: str


class Left(NamedTuple):
    """A worker is there no longer, by the number of its visit: one that comes again has another."""

    address: str
    visit: int


class Heard(NamedTuple):
    """A site told something: what, by `dasksite`; where, and when that was by both clocks."""

    kind: str
    content: tuple[Any, ...]
    address: str
    here: float
    there: float


class Failed(NamedTuple):
    """A task of Dask's did not end well."""

    future: Any


class Freed(NamedTuple):
    """A slot can take work again."""

    slot: int


class Gone(NamedTuple):
    """The scheduler does not answer."""

    error: Exception


News: TypeAlias = Woken | Came | Refused | Left | Heard | Failed | Freed | Gone


class Clock:
    """How far a worker's clock is from this process's, as narrow as what passes between them tells.

    What was sent before it began, and heard of after it ended, bounds it from both sides. Nought if that can be: all
    processes of one machine share a clock.
    """

    def __init__(self) -> None:
        self._low, self._high = float("-inf"), float("inf")

    def sent(self, here: float, there: float) -> None:
        """Take in that what was sent at a time here began at a time there."""
        self._low = max(self._low, here - there)
        self._high = max(self._high, self._low)  # clocks drift

    def heard(self, here: float, there: float) -> None:
        """Take in that what was told at a time there was heard at a time here."""
        self._high = min(self._high, here - there)
        self._low = min(self._low, self._high)

    @property
    def offset(self) -> float:
        """Seconds to add to a time there for the time here."""
        if self._low <= 0.0 <= self._high:
            return 0.0
        known = [bound for bound in (self._low, self._high) if abs(bound) != float("inf")]
        return sum(known) / len(known)

    def as_here(self, marks: bytes) -> bytes:
        """Return float64 times there as times here."""
        offset = self.offset
        return array("d", [at + offset for at in array("d", marks)]).tobytes() if offset else marks


@dataclass(eq=False)
class Worker:
    """A Dask worker.

    Attributes:
        address: Dask's name for it.
        pid: its process, on its machine.
        visit: which of its stays at the cluster this is.
        clock: how its clock is set.
        orders: what it is to be told next; the loop's.
        is_told: whether something is on the way to it; the loop's.
    """

    address: str
    pid: int
    visit: int
    clock: Clock = field(default_factory=Clock)
    orders: list[tuple[Any, ...]] = field(default_factory=list)
    is_told: bool = False


class Cluster:
    """A caller's connection to a cluster, from opening to closing a backend.

    Args:
        client: a `distributed.Client`.

    Attributes:
        client: the same.
        token: names this caller in keys and events.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.token = os.urandom(6).hex()
        self._topic = dasksite.topic_of(self.token)
        self._queue: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._pieces: dict[tuple[str, int], list[bytes]] = {}
        client.subscribe_topic(self._topic, self._hear)
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), client.loop.asyncio_loop)

    def close(self, workers: Sequence[Worker]) -> None:
        """Have sites end what they are at, and hear of them no more."""
        self._watching.cancel()

        async def say_goodbye() -> None:
            present = await self.client.scheduler.ncores()
            if addresses := [worker.address for worker in workers if worker.address in present]:
                await self.client.run(dasksite.obey, self.token, [("close",)], workers=addresses, on_error="ignore")
            await self.client.run_on_scheduler(dasksite.forget_topic, self.token)

        with suppress(Exception):  # the scheduler may be gone, or a worker; it is no more than polite
            self.client.unsubscribe_topic(self._topic)
            self.client.sync(asyncio.wait_for, say_goodbye(), _GOODBYE_SECONDS)

    # Who is there

    async def _watch(self) -> None:
        """Look who is there, and ask those who are new what they are; nobody waits for one that does not answer."""
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
                self._queue.put(Gone(error))
                return
            for address, n_threads in found.items():
                if address not in asked or (asked[address].done() and asked[address].exception() is not None):
                    n_visits += 1
                    visits[address] = n_visits
                    asked[address] = asyncio.ensure_future(self._meet(address, n_threads, n_visits))
            await asyncio.sleep(_LOOK_SECONDS * (1 + len(found) / 100))

    async def _meet(self, address: str, n_threads: int, visit: int) -> None:
        """Ask a worker what it is.

        Raises:
            OSError: it does not answer; if it is still there at the next look, it is asked again.
        """
        before = time.perf_counter()
        answer = (await self.client.run(dasksite.probe, workers=[address], on_error="return"))[address]
        if isinstance(answer, OSError):
            raise answer
        if fault := _fault_of(answer):
            self._queue.put(
                Refused(
                    address,
                    f"the Dask worker {address} {fault}. Workers, scheduler and caller need the same forgepar and the "
                    f"same Python; here are forgepar {__version__} and Python {platform.python_version()}.",
                )
            )
            return
        worker = Worker(address, answer[2], visit)
        worker.clock.sent(before, answer[3])
        worker.clock.heard(time.perf_counter(), answer[3])
        self._queue.put(Came(worker, n_threads))

    # Hearing

    def next(self, timeout: float | None) -> News:
        """Return what is new.

        Raises:
            queue.Empty: nothing is for so many seconds; None: however long it takes.
        """
        return self._queue.get(timeout=timeout)

    def put(self, news: News) -> None:
        """Have something be the last that `next` returns; from any thread or signal handler."""
        self._queue.put(news)

    def watch_over(self, future: Any) -> None:
        """Hear of a task of Dask's that does not end well."""

        def look(ended: Any) -> None:
            if ended.status != "finished":
                self._queue.put(Failed(ended))

        future.add_done_callback(look)

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """Put the pieces of what a site tells together; in the client's loop."""
        told = event[1]
        if told["kind"] == "left":
            self._queue.put(Left(told["worker"], told["visit"]))
            return
        key = (told["worker"], told["number"])
        pieces = self._pieces.setdefault(key, [])
        pieces.append(told["data"])
        if not told["left"]:
            content = pickle.loads(b"".join(self._pieces.pop(key)))
            self._queue.put(Heard(told["kind"], content, told["worker"], time.perf_counter(), told["now"]))

    # Telling

    def order(self, worker: Worker, order: tuple[Any, ...]) -> None:
        """Have a site do something, after what it was told before.

        Args:
            worker: whose.
            order: see `dasksite.obey`; what comes of it is told as an event.
        """
        self.client.loop.add_callback(self._line_up, worker, order)

    async def _line_up(self, worker: Worker, order: tuple[Any, ...]) -> None:
        worker.orders.append(order)
        if worker.is_told:
            return
        worker.is_told = True
        try:
            while worker.orders:
                orders, worker.orders = worker.orders, []
                # One that does not answer is gone, or will be told to be.
                await self.client.run(dasksite.obey, self.token, orders, workers=[worker.address], on_error="ignore")
        finally:
            worker.is_told = False

    def stacks(self, batches: Mapping[int, tuple[Worker, int]]) -> dict[int, str]:
        """Return where threads are that run batches, by slot, of those that tell within a second."""

        async def ask(worker: Worker, batch: int) -> str:
            asked = self.client.run(
                dasksite.obey, self.token, [("stack", batch)], workers=[worker.address], on_error="ignore"
            )
            with suppress(TimeoutError):
                return "".join(*(await asyncio.wait_for(asked, _STACK_SECONDS)).values())
            return ""

        async def ask_all() -> list[str]:
            return await asyncio.gather(*(ask(*where) for where in batches.values()))

        told = zip(batches, self.client.sync(ask_all), strict=True)
        return {slot: stack for slot, stack in told if stack}

    def restart(self, worker: Worker) -> None:
        """Have a worker's nanny end its process and start another."""
        self.client.loop.add_callback(self._restart, worker)

    async def _restart(self, worker: Worker) -> None:
        try:
            await self.client.restart_workers([worker.address], raise_for_error=False)
        except Exception as error:
            warnings.warn(
                f"the Dask worker {worker.address} cannot be restarted ({error}), so what it is at goes on.",
                stacklevel=1,
            )


def connected(given: Any) -> Any:
    """Return a client: the one that is given, or a new one for an address or a cluster.

    Raises:
        ImportError: `distributed` is missing.
        WorkerStartFailed: no scheduler answers.
        ValueError: what is given is none of these.
    """
    try:
        import distributed
    except ImportError as error:
        raise _missing(error) from error
    if isinstance(given, distributed.Client):
        if given.asynchronous or given.status != "running":
            raise ValueError(
                f"client={given!r} is asynchronous or closed. Give Client(address), and close it after the run."
            )
        return given
    if not isinstance(given, str) and not hasattr(given, "scheduler_address"):
        raise ValueError(
            f"client={shown(given)} is no cluster. Give a distributed.Client, or an address such as 'tcp://host:8786'."
        )
    try:
        return distributed.Client(given, set_as_default=False, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise WorkerStartFailed(
            f"no Dask scheduler answers at {given!r} within {_CONNECT_SECONDS:g} s: {error}"
        ) from error


@contextmanager
def local_cluster(n_workers: int) -> Iterator[Any]:
    """Start a cluster on this machine, for this process alone: one thread per worker.

    A port of the loopback interface is open to every user of the machine, and a Dask scheduler runs the code of every
    client that connects. So all parts authenticate each other by TLS, with a certificate that exists only in their
    memory. The HTTP servers, which know no authentication, serve no page, and workers keep their files in a folder of
    this user.

    Args:
        n_workers: how many processes.

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
            "a Dask cluster made for one run is secured by TLS, which needs cryptography: pip install 'forgepar[dask]'"
        ) from error
    no_pages: dict[str, Any] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
    with (
        tempfile.TemporaryDirectory(prefix="forgepar-dask-") as folder,
        dask.config.set(no_pages),  # what workers are told of it when they start
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
    return ImportError(f"a Dask cluster needs distributed ({error}): pip install 'forgepar[dask]'")


def n_threads(client: Any) -> dict[str, int]:
    """Return how many threads each worker has."""
    found: dict[str, int] = client.sync(client.scheduler.ncores)
    return found


def _fault_of(answer: Any) -> str:
    """Say what is wrong with a worker by its answer to a probe, nothing if it is right."""
    if isinstance(answer, ImportError):
        return f"has no forgepar, or cannot import it ({answer})"
    if isinstance(answer, Exception):
        return f"does not answer as it should ({type(answer).__name__}: {answer})"
    version, python, *_ = answer
    if version != __version__ or python.split(".")[:2] != platform.python_version().split(".")[:2]:
        return f"has forgepar {version} and Python {python}"
    return ""
