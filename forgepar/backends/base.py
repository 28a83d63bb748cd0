"""What the dispatcher asks of whatever runs batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

from forgepar.backends.output import Said
from forgepar.backends.wire import Batch, Reply
from forgepar.values.arena import Arena

UNKNOWN_POSITION = -1  # of a lost worker that could not tell what it was at


class Joined(NamedTuple):
    """A slot has a new worker, which knows nothing yet.

    Attributes:
        slot: which.
        pid: its process, on its own machine.
        address: where it is, if that is not this machine's affair.
    """

    slot: int
    pid: int
    address: str = ""


class Lost(NamedTuple):
    """A slot's worker ended; all it ever sent has been handed out before this.

    Attributes:
        slot: which.
        pid: the process that ended.
        exit_code: as `multiprocessing.Process.exitcode` has it, None if it could not be had.
        position: the mark it was at, as the board had it; `UNKNOWN_POSITION` where nothing tells.
        started: when it began that, seconds of `time.perf_counter`.
        fault: what ended `serve`, where that was an exception of its own: a full disk, say.
        dump: the stacks of its threads, where it crashed and could tell.
        is_out_of_memory: whether the kernel ended a process for lack of memory meanwhile.
        also: marks of what it was, or may have been, at besides, in other batches or behind ``position``.
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


class Told(NamedTuple):
    """Tasks of a slot printed, logged or warned of something, or told how far they are.

    Attributes:
        slot: which.
        said: what, in order.
        position: the mark that the slot was at when it was heard.
    """

    slot: int
    said: Sequence[Said]
    position: int


Notice: TypeAlias = Reply | Joined | Lost | Told


class Traits(NamedTuple):
    """In what a backend differs from workers on this machine, which have these values.

    Attributes:
        is_local: workers are processes of this machine, so that their memory can be looked at.
        remembers: a worker keeps callables and small values for later batches; else each batch brings all it needs.
        ends_tasks: to kill a slot ends what it is at; else that goes on, unheard.
        batch_seconds: of work that a batch aims at; a message is to cost little beside it.
        stall_seconds: a slot that says nothing for longer has a task that was misjudged.
        claim_seconds: until a limit that was written is surely seen.
        tells_at_end: the outcomes of a batch come together, when it has ended.
    """

    is_local: bool = True
    remembers: bool = True
    ends_tasks: bool = True
    batch_seconds: float = 0.005
    stall_seconds: float = 0.005
    claim_seconds: float = 0.001
    tells_at_end: bool = False


def traits_of(backend: Backend) -> Traits:
    """Return a backend's ``traits``, those of local workers where it names none."""
    traits: Traits = getattr(backend, "traits", Traits())
    return traits


class Backend(Protocol):
    """Slots that run batches. It knows no layers, no names and no other run than that of the batch at hand.

    Calls come from one thread. `wait` alone blocks. What a slot tells comes in the order in which it told it: replies,
    what it answers to a limit, and its loss.

    Two methods more are for those that are far away: ``may_be_at(slot)`` returns the farthest mark that the slot may
    have come to while it is limited, None until it has said so; ``withdraw(slot)`` has a slot answer early for batches
    that it has not begun.

    Attributes:
        name: what it is called.
        ends_workers: whether `terminate` and `kill` end what runs; where not, nothing is ended for the memory it takes.
        n_slots: how many batches run at once.
        arena: where large values are.
    """

    name: str
    ends_workers: bool
    n_slots: int
    arena: Arena

    def open(self, n_wanted: int) -> None:
        """Start what is not running of the first ``n_wanted`` slots; each reports as `Joined`, now or later.

        Tasks hear of no `call_off` from before. Where the system allows for fewer, those there are do.
        """

    def joined(self) -> Sequence[Joined]:
        """Tell the slots that have a worker at this moment."""

    def send(self, slot: int, batch: Batch) -> None:
        """Hand a batch to a slot that has joined. A slot lost meanwhile says so by `wait`, not here."""

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened, after at most ``timeout`` seconds if nothing does (None: however long it takes).

        Raises:
            WorkerStartFailed: workers end before they join, several times in a row; or the last one ended, and the
                system lets this process start no other.
        """

    def rest(self) -> Sequence[Told]:
        """Return the lines that were begun and not ended so far, as if they were."""

    def wake(self) -> None:
        """Have `wait` return soon, with nothing; from any thread or signal handler."""

    def position(self, slot: int) -> int:
        """Return the mark of the task that the slot is at."""

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark and whatever comes behind it."""

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Let tasks know, if they ask, how the run stands; see `contexts.RunProgress`."""

    def call_off(self, *, is_off: bool = True) -> None:
        """Let tasks know, if they ask, that the run was called off, and `wake`; from any thread or signal handler.

        Args:
            is_off: False lets them know that what runs from now on is wanted.
        """

    def started(self, slot: int) -> float:
        """Tell when the slot began the task that it is at, in seconds of `time.perf_counter`."""

    def where(self, slots: Sequence[int]) -> dict[int, str]:
        """Return the stacks of what workers are at, innermost call first, of those that tell within a moment."""

    def n_given(self, slot: int) -> int:
        """Count the tasks that the slot's worker was handed since it started."""

    def renew(self, slot: int) -> None:
        """Let the slot's worker, which has no work, go, and start another; the slot joins again."""

    def terminate(self, slot: int) -> None:
        """Ask the slot's worker and its child processes to end; `kill` if it does not."""

    def kill(self, slot: int) -> None:
        """End the slot's worker and its child processes at once; the slot is lost, and starts again."""

    def close(self) -> None:
        """End all workers and remove the arena. May be called twice."""
