"""The protocol of a backend, and what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias

from forgepar.backends.messages import Batch, Reply
from forgepar.backends.output_capture import OutputRecord
from forgepar.values.arena import Arena

UNKNOWN_POSITION = -1  # of a lost worker if nothing shows its current task


class Joined(NamedTuple):
    """A slot has a new worker, which has received nothing yet.

    Attributes:
        slot: the slot's number.
        pid: the worker's process, on its own machine.
        address: the worker's address, if it is not a process of this machine.
    """

    slot: int
    pid: int
    address: str = ""


class Lost(NamedTuple):
    """A slot's worker ended; `Backend.wait` has returned all that it sent before.

    Attributes:
        slot: the slot's number.
        pid: the process that ended.
        exit_code: as `multiprocessing.Process.exitcode`; None if unknown.
        position: the mark of its current task; `UNKNOWN_POSITION` if unknown.
        started: when it began that task, seconds of `time.perf_counter`.
        fault: the exception that ended `serve`, for example that the disk is full.
        dump: the stacks of its threads, if it crashed and could write them.
        is_out_of_memory: whether the kernel has killed a process for lack of memory since the last loss.
        also: marks of other tasks that it was or may have been at, in other batches or after ``position``.
    """

    slot: int
    pid: int
    exit_code: int | None
    position: int
    started: float
    fault: BaseException | None
    dump: str = ""
    is_out_of_memory: bool = False
    also: Sequence[int] = ()


class OutputNotice(NamedTuple):
    """Output, log records, warnings or progress of a slot's tasks.

    Attributes:
        slot: the slot's number.
        records: the output, in order.
        position: the mark of the slot's current task when the output was read.
    """

    slot: int
    records: Sequence[OutputRecord]
    position: int


Notice: TypeAlias = Reply | Joined | Lost | OutputNotice


class Traits(NamedTuple):
    """What a backend can do. The defaults are those of worker processes on this machine.

    Attributes:
        is_local: workers are processes of this machine, so their memory can be measured.
        remembers: a worker keeps callables and small values for later batches; else each batch brings all it needs.
        ends_tasks: killing a slot ends its task; else the task continues, and its outcome is ignored.
        ends_workers: `Backend.kill` ends processes; else no task is killed for its use of memory.
        may_run_here: tasks may run in this process, and print to its streams.
        is_far: a slot sees a limit late, see `Backend.may_be_at`.
        batch_seconds: target duration of a batch, long enough that the cost of a message is small.
        stall_seconds: a slot that sends nothing for longer has a task with a wrong duration estimate.
        claim_seconds: time after which a slot has surely seen a limit.
        tells_at_end: all outcomes of a batch come together, when it has ended.
    """

    is_local: bool = True
    remembers: bool = True
    ends_tasks: bool = True
    ends_workers: bool = True
    may_run_here: bool = False
    is_far: bool = False
    batch_seconds: float = 0.005
    stall_seconds: float = 0.005
    claim_seconds: float = 0.001
    tells_at_end: bool = False


class Backend(Protocol):
    """Slots that run batches. A backend knows neither layers nor names, and no run except that of the current batch.

    Calls come from one thread. Only `wait` blocks. It returns what a slot sends in order: replies, answers to a limit,
    and the slot's loss.

    Attributes:
        name: the backend's name.
        traits: what it can do.
        n_slots: how many batches run at once.
        arena: the arena with the large values.
    """

    name: str
    traits: Traits
    n_slots: int
    arena: Arena

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held from before `open` until the tasks are done, and while the backend is closed."""

    def open(self, n_wanted: int) -> None:
        """Start those of the first ``n_wanted`` slots that do not run; each is reported as `Joined`, now or later.

        This undoes `call_off`. If the system allows fewer workers, the backend continues with these.
        """

    def joined(self) -> Sequence[Joined]:
        """Return the slots that have a worker at this moment."""

    def send(self, slot: int, batch: Batch) -> None:
        """Send a batch to a slot that has joined. If the slot is lost, `wait` reports it; this does not raise."""

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened, after at most ``timeout`` seconds if nothing does (None: no limit).

        Raises:
            WorkerStartFailed: workers end before they join, several times in a row; or the last worker ended, and the
                system does not allow this process to start another.
        """

    def rest(self) -> Sequence[OutputNotice]:
        """Return unfinished lines as if they had ended."""

    def wake(self) -> None:
        """Make `wait` return soon, with nothing; from any thread or signal handler."""

    def position(self, slot: int) -> int:
        """Return the mark of the slot's current task."""

    def may_be_at(self, slot: int) -> int | None:
        """Return the farthest mark that the slot may have reached while it is limited; None until it has reported that.

        This is `position` if the slot sees a limit at once.
        """

    def withdraw(self, slot: int) -> None:
        """Ask the slot to report batches that it has not begun; does nothing if it reports them without being asked."""

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark or a later one."""

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Publish the progress of the run to tasks; see `context.RunProgress`."""

    def call_off(self, *, is_off: bool = True) -> None:
        """Publish to tasks whether the run was cancelled, and `wake`; from any thread or signal handler.

        Args:
            is_off: False undoes it.
        """

    def started(self, slot: int) -> float:
        """Return when the slot began its current task, in seconds of `time.perf_counter`."""

    def where(self, slots: Sequence[int]) -> dict[int, str]:
        """Return the current stacks of workers, innermost call first, of those that answer within a moment."""

    def n_given(self, slot: int) -> int:
        """Return the number of tasks that the slot's worker has received since it started."""

    def renew(self, slot: int) -> None:
        """Replace the slot's worker, which has no work, with a new one; the slot joins again."""

    def terminate(self, slot: int) -> None:
        """Ask the slot's worker and its child processes to end; if they do not, call `kill`."""

    def kill(self, slot: int) -> None:
        """Kill the slot's worker and its child processes; the slot is lost, and starts again."""

    def close(self) -> None:
        """End all workers and remove the arena. May be called twice."""
