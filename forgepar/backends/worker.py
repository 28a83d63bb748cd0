"""The only code that runs in workers.

    connection --Batch--> Worker.run --Reply, Reply, ...--> connection

A child that a task forks has no part in this: it has no connection, and ends when it comes back from the function.

`serve` is the one job that a slot's `ProcessPoolExecutor` ever gets; it ends when the parent closes the connection or
dies. `Worker.run` knows no connection, so the inline backend runs the same code in the caller's process.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import repeat
from multiprocessing import connection, current_process, parent_process
from typing import Any, NamedTuple, NoReturn

from forgepar import contexts
from forgepar.arguments import NESTED, REFERENCE, Layout, fill
from forgepar.backends.board import CALLED_OFF, LIMIT, POSITION, STARTED, Board, mark, unmark
from forgepar.backends.joblibname import know_the_name
from forgepar.backends.output import PROGRESS, UNKNOWN_TASK, Capture, Voice, open_pipes
from forgepar.backends.surroundings import Follower, Rule, Surroundings, begin_as
from forgepar.backends.wire import (
    Batch,
    Channel,
    Failure,
    Hello,
    Reply,
    Template,
    connect,
    pack,
    pack_whole,
    shortened,
    unpack,
)
from forgepar.contexts import RunFacts, RunProgress, TaskContext
from forgepar.errors import TaskExited, UnpicklableResult, add_note, is_system_error, text_of
from forgepar.forking import SENTINEL, hold_alone, in_child
from forgepar.pickling import loads_own
from forgepar.startstate import StartState
from forgepar.values import namespaces, worker_modules
from forgepar.values.arena import Arena, Place
from forgepar.values.codec import ATOMIC, FIXED, Wire, decode, decode_own, encode, parts_of
from forgepar.values.fresh import is_frozen, renewing
from forgepar.values.inplace import use

REPLY_SECONDS = 0.010  # of work between replies: what ended since the last one is run again after a death
PREPARE_SECONDS = 60.0  # beyond its timeout, for what unpickling a task's function imports
_SAMPLE_SECONDS = 0.001  # between two looks at what this process used: each takes a microsecond
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_READ_ONLY = (
    "Large inputs of a task are views of memory that others read as well, so they cannot be written. "
    "Change a copy, array = array.copy(), or have the task get copies: task(writable=True). What the task makes itself "
    "can be written as ever."
)
STACK_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR2)  # where there is one that no program uses by itself
_OWN_FILES = (__file__, renewing.__code__.co_filename)
END_OF_STACK = " in serve\n"
_inside = False
_parent: Channel | None = None
_refused: tuple[str, ...] = ()  # what `begin` could not take over


def inside_worker() -> bool:
    """Tell whether this process is a worker: a run in it must not start workers of its own."""
    return _inside


def be_inside(*, is_inside: bool = True) -> None:
    """Say whether this process is a worker: one that others operate is only while it runs our batches."""
    global _inside  # one word for the whole process is what it says
    _inside = is_inside


def serve(address: str, slot: int, place: Place, threads: int, gives_way: bool = True) -> None:
    """Run batches from the parent until it closes the connection.

    Args:
        address: the parent's socket.
        slot: which slot this process fills.
        place: the arena, whose folder holds the board as well.
        threads: how many threads numerical libraries may use here.
        gives_way: whether whoever wakes this process is to keep its core for the moment.
    """
    _settle(threads, gives_way=gives_way)
    # Not made here: a worker that comes late must put nothing into a folder that is being removed.
    with (
        open(os.path.join(place.folder, f"crash-{slot}"), "r+b") as crash_file,  # noqa: PTH118, PTH123
        open(os.path.join(place.folder, f"stack-{slot}"), "ab") as stack_file,  # noqa: PTH118, PTH123
    ):
        # It has copies of the numbers only, so the files stay open with `serve`.
        faulthandler.enable(crash_file)
        faulthandler.register(STACK_SIGNAL, stack_file, all_threads=False)
        _serve(address, slot, place)


def own_part(stack: str) -> str:
    """Return what `STACK_SIGNAL` has a worker write without the part of it that is this module's and below."""
    lines = stack.splitlines()[1:]
    own = next((n for n, line in enumerate(lines) if f'"{__file__}"' in line), len(lines))
    return "\n".join(lines[:own])


def _serve(address: str, slot: int, place: Place) -> None:
    arena = Arena(place, slot + 1, keeps_mapped=True)
    board = Board(os.path.join(place.folder, "board"))  # noqa: PTH118  (pathlib takes longer to load than all else here)
    worker = Worker(slot, arena, board)
    worker.voice = _speak(worker, place.folder, slot)
    worker.capture = Capture(worker.voice)
    worker.capture.begin()
    use(arena)
    contexts.use(worker.context)
    global _parent  # closed in forked children
    parent = _parent = connect(address)
    try:
        parent.send(pack(Hello(slot, os.getpid(), _refused), arena))
        while message := parent.receive_awake():
            for reply in worker.run(unpack(message, Batch, arena)):
                try:
                    message = pack(reply, arena)
                except (OSError, MemoryError):  # the tasks are done: that must not be lost for want of room
                    for part in shortened(reply):
                        parent.send(pack_whole(part))
                else:
                    parent.send(message)
    except ConnectionError:
        return  # the parent hung up
    finally:
        parent.close()
        with suppress(OSError):
            worker.capture.flush()


def _speak(worker: Worker, folder: str, slot: int) -> Voice:
    """Connect the pipes by which the parent hears this process."""
    told, *streams = open_pipes(folder, slot)
    for number, descriptor in enumerate(streams, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return Voice(told, worker.task_number)


class _Call(NamedTuple):
    """A template made ready to run.

    Attributes:
        function: what to call.
        layout: what stands where in the arguments.
        shared: the constants that all tasks get.
        renewed: of these constants, the pickle and buffers of those that are unpickled again for each task.
        is_direct: whether the arguments, once decoded, go to the function as they come.
        base: what the tasks' names begin with.
        timeout: seconds that an attempt may take.
        owns: whether arguments are private copies.
        parts: numbers of the parts of the caller's modules that it needs; None: all that were sent.
        has_effects: whether each task is reported as it ends.
    """

    function: Callable[..., Any]
    layout: Layout
    shared: dict[str, Any]
    renewed: dict[str, tuple[Any, Sequence[Any]]]
    is_direct: bool
    base: str
    timeout: float | None
    owns: bool
    parts: tuple[int, ...] | None
    has_effects: bool


class Worker:
    """Runs batches and keeps what later ones need: callables, templates, small values.

    Args:
        slot: its number, told in each reply.
        arena: where large values are.
        board: where it says what it runs.
        interruptible: let `KeyboardInterrupt` out instead of taking it as the task's failure.
        reply_seconds: of work between replies; None: `REPLY_SECONDS`.

    Attributes:
        slot: its number; another one between batches, where threads take turns.
        voice: tells the parent what tasks say, where there is somebody to hear it.
        capture: what sends their output by it.
    """

    voice: Voice | None = None
    capture: Capture | None = None
    is_forked = False  # whether this is a copy in a child that a task has forked

    def __init__(
        self,
        slot: int,
        arena: Arena,
        board: Board,
        *,
        interruptible: bool = False,
        reply_seconds: float | None = None,
    ) -> None:
        self._reply_seconds = reply_seconds
        self._arena = arena
        self.sit(slot, board)
        self._interruptible = interruptible
        self._cpu, _ = _usage()
        self._sampled_at = time.perf_counter()
        self._run = -1
        self._batch: Batch | None = None
        self._subflows: list[tuple[int, Wire]] = []
        self._unread: BaseException | None = None
        self._misfits: dict[int, BaseException] = {}
        self._facts = RunFacts("", "", 0, float("inf"))
        self._follower = Follower()
        self._context: TaskContext | None = None
        self._context_at = 0
        _workers.add(self)
        self._forget()

    def sit(self, slot: int, board: Board) -> None:
        """Fill a slot, from the next batch on; whoever runs batches of several slots changes between them."""
        self.slot = slot
        self._words = board.integers(slot)
        self._times = board.floats(slot)
        self._run_words = board.run

    def let_go(self) -> None:
        """Keep no values for later batches: those may go elsewhere."""
        self._kept.clear()

    def knows(self, run: int) -> tuple[frozenset[int], frozenset[int]]:
        """Return the numbers of the callables and of the templates that this has of a run."""
        if run != self._run:
            return frozenset(), frozenset()
        return frozenset(self._callables), frozenset(self._calls)

    def context(self) -> TaskContext | None:
        """Return the context of the task that runs, made when first asked for."""
        at = self._words[POSITION]
        if self._context is None or self._context_at != at:
            self._end_context()
            if self._batch is not None:
                self._context, self._context_at = self._make_context(self._batch, unmark(at)[1]), at
        return self._context

    def task_number(self) -> int:
        """Return the number of the task that runs, or was the last to."""
        if self._batch is None or not self._batch.n_tasks:
            return UNKNOWN_TASK
        return _task_number(self._batch, unmark(self._words[POSITION])[1])

    def lacking(self, batch: Batch) -> Batch:
        """Return a batch that brings all it needs without what this worker has of it already."""
        self._begin(batch.run)
        self._kept.clear()
        return batch._replace(
            callables=[pair for pair in batch.callables if pair[0] not in self._callables],
            templates=[template for template in batch.templates if template.number not in self._calls],
        )

    def run(self, batch: Batch) -> Iterator[Reply]:
        """Run a batch and yield its replies as they fall due.

        Ends early at a failure and at the board's limit; the last reply then has fewer outcomes than the batch tasks.
        """
        if not batch.n_tasks:
            self._drop(batch.drop)
            self._begin(batch.run)
            return
        self._batch = batch
        clock = time.perf_counter
        words, times = self._words, self._times
        here = mark(batch.id, 0)
        times[STARTED] = clock() + PREPARE_SECONDS
        words[POSITION] = here  # before anything is unpickled: if that ends the process, the first task is to blame
        try:
            call, rows = self._prepare(batch)
        except BaseException as error:
            if self.is_forked:
                _end_forked(error)
            at_once = self._failure(0, error)
            self._end_batch()
            yield self._reply(batch, 0, [None], array("d", [clock()] * 2), at_once, ended=True)
            return
        if self.is_forked:
            _end_forked(None)
        now = clock()  # what was imported for the tasks is not their time
        marks, values, first = array("d", (now,)), list[Wire](), 0
        step = REPLY_SECONDS if self._reply_seconds is None else self._reply_seconds
        if self._calls[batch.template].has_effects and self._reply_seconds is None:
            step = 0.0  # a reply a task: what ended is never to be run again
        due, last = now + step, here + batch.n_tasks - 1
        failure: Failure | None = None
        for here, row in enumerate(rows, here):  # noqa: B020  (it goes on counting)
            times[STARTED] = now  # before the position: who reads both may see the task too young, never too old
            words[POSITION] = here
            if here >= words[LIMIT]:
                break
            try:
                value = call(*row)
                if self.is_forked:
                    _end_forked(None)
                if type(value) not in FIXED:
                    value = self._result(value, batch, first + len(values))
                    if self.is_forked:
                        _end_forked(None)
            except BaseException as error:
                if self.is_forked:
                    _end_forked(error)
                failure, value = self._failure(first + len(values), error), None
            values.append(value)
            now = clock()
            marks.append(now)
            if failure is not None:
                break
            if now >= due and here < last:
                yield self._reply(batch, first, values, marks, None, ended=False)
                first += len(values)
                now = clock()  # the reply's own time is nobody's work
                marks, values, due = array("d", (now,)), [], now + step
        times[STARTED] = clock() + PREPARE_SECONDS  # the reply may be under way for longer than a timeout
        self._arena.take_back()
        self._end_batch()
        yield self._reply(batch, first, values, marks, failure, ended=True)

    def _end_batch(self) -> None:
        """Send what was printed, before the reply: whoever has that has all of it."""
        if self.capture is not None:
            self.capture.flush()
        if self._context is not None:
            self._end_context()

    def _end_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def _make_context(self, batch: Batch, position: int) -> TaskContext:
        call, words = self._calls.get(batch.template), self._words
        base, timeout = (call.base, call.timeout) if call is not None else ("", None)
        ordinal = _nth(batch.ordinals, position)
        if isinstance(batch.ordinals, int):
            ordinal += position
        return TaskContext(
            self._facts,
            base if ordinal < 0 else f"{base}-{ordinal}",
            _nth(batch.layers, position),
            dict(batch.attempts).get(position, 1),
            self.slot,
            ends_at=self._times[STARTED] + timeout if timeout is not None else float("inf"),
            is_cancelled=lambda: bool(words[CALLED_OFF]),
            say=self._tell_progress,
            look=lambda: RunProgress(*self._run_words[:4]),
            folder=self._arena.place.spill_folder,
        )

    def _tell_progress(self, fraction: float, text: str) -> None:
        if self.voice is not None:
            self.voice.say(PROGRESS, pickle.dumps((fraction, text)))

    def _prepare(self, batch: Batch) -> tuple[Callable[..., Any], Iterable[tuple[Any, ...]]]:
        """Take in what the batch brings; return what to call, and its arguments task by task."""
        self._begin(batch.run)
        if batch.facts is not None:
            self._facts, packed = batch.facts
            self._follower.hear(self._facts.run_id, packed)
        values, coded = batch.values, tuple in set(map(type, batch.values))
        if coded:
            values = self._take_in(values)
        if batch.drop:
            self._drop(batch.drop)  # only now: the values just taken in may have been the reason
        if batch.callables or batch.templates:
            self._new_callables += batch.callables
            self._new_templates += batch.templates
        if self._follower.is_behind:
            self._follower.follow(self._rule)  # where that fails, the next batch finds noted what this one brought
        if self._new_callables or self._new_templates:
            self._take_in_news()
        call = self._calls[batch.template]
        if self._misfits:
            self._refuse_misfits(call)
        if batch.references:
            values = [values[i] for i in array("i", batch.references)]
        if batch.constants:
            coded = coded or tuple in set(map(type, batch.constants))
        elif batch.n_tasks == 1 and call.is_direct and not coded:
            return call.function, (tuple(values),)
        return self._callee(call, coded=coded), _rows(call.layout, batch.n_tasks, values, batch.constants)

    @property
    def _rule(self) -> Rule | None:
        return None if self.capture is None else self.capture.follow

    def _take_in_news(self) -> None:
        if self._new_callables:
            self._load_news()
        while self._new_templates:
            template = self._new_templates.popleft()
            self._calls[template.number] = self._make_call(template)

    def _load_news(self) -> None:
        before = self._follower.before_imports()
        worker_modules.collect(self._misfits)
        try:
            while self._new_callables:
                number, pickled = self._new_callables.popleft()
                self._callables[number] = self._take_part(number, pickled) if number < 0 else _load_callable(pickled)
        finally:
            worker_modules.collect(None)
        self._follower.after_imports(before, self._rule)

    def _take_part(self, number: int, pickled: bytes) -> Callable[..., Any]:
        """Take in a part of the caller's modules; where that fails, callables fail in its place."""
        try:
            if number == worker_modules.NEW_RUN:
                worker_modules.begin_run()
            else:
                worker_modules.take_part(pickled, number)
            self._misfits.pop(number, None)
        except BaseException as error:
            self._misfits[number] = error
        return _nothing

    def _refuse_misfits(self, call: _Call) -> None:
        """Refuse tasks that need a part of the caller's modules that could not be taken in."""
        for number, error in self._misfits.items():
            if call.parts is None or number in call.parts:
                raise error

    def _make_call(self, template: Template) -> _Call:
        layout = Layout(*template.layout)
        function, shared, renewed = self._callables[template.callable], dict[str, Any](), {}
        try:
            for name, wire in template.shared.items():
                shared[name] = value = decode(wire, self._arena)
                if type(wire) is tuple and (template.owns or not is_frozen(value)):
                    renewed[name] = parts_of(wire, self._arena)
            function = renewing(function, owns=template.owns)
        except BaseException as error:
            function = _raiser(error)
        is_direct = not shared and not layout.keywords and max(layout.kinds, default=0) < NESTED
        return _Call(
            function,
            layout,
            shared,
            renewed,
            is_direct,
            template.base,
            template.timeout,
            template.owns,
            template.parts,
            template.has_effects,
        )

    def _take_in(self, values: Sequence[Wire]) -> list[Wire]:
        """Keep the coded values that came to be kept, and look up those that were kept before."""
        taken = []
        for wire in values:
            if type(wire) is tuple:
                if type(wire[0]) is int:
                    wire = self._kept[wire[0]]
                elif type(wire[0]) is bytes:
                    self._kept[wire[1]] = wire
            taken.append(wire)
        return taken

    def _callee(self, call: _Call, *, coded: bool) -> Callable[..., Any]:
        """Return what takes a row of `_rows`: the user's function itself where nothing stands between."""
        function, layout, shared, renewed, is_direct, *_ = call
        if is_direct and not coded:
            return function
        read, load = (decode_own, loads_own) if call.owns else (decode, _loads)
        arena, kinds, keywords, n_positional = self._arena, layout.kinds, layout.keywords, layout.n_positional
        nested = max(kinds, default=0) >= NESTED

        def decoded(*row: Any) -> Any:
            try:
                arguments = [read(wire, arena) for wire in row[: len(kinds)]]
                inner = [read(wire, arena) for wire in row[-1]] if nested else []
                own = {name: load(*parts) for name, parts in renewed.items()} if renewed else renewed
            except BaseException as error:
                self._unread = error
                raise
            if nested:
                arguments = [
                    fill(part, inner) if kind >= NESTED else part for kind, part in zip(kinds, arguments, strict=True)
                ]
            by_name = dict(zip(keywords, arguments[n_positional:], strict=True))
            return function(*arguments[:n_positional], **by_name, **({**shared, **own} if own else shared))

        return decoded

    def _result(self, value: Any, batch: Batch, position: int) -> Wire:
        kind = type(value)
        if kind.__name__ == "Subflow" and kind.__module__ == "forgepar.subflow":
            self._subflows.append((position, self._encoded(value.workflow)))
            return None
        wire = self._encoded(value)
        if type(wire) is tuple and type(wire[0]) is bytes:
            self._kept[_task_number(batch, position)] = wire
        return wire

    def _encoded(self, value: Any) -> Wire:
        try:
            return encode(value, self._arena)
        except Exception as error:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            if is_system_error(error):
                add_note(error, f"raised while what the task returned, a {kind}, was being sent back")
                raise
            message = (
                f"the task returned a {kind} that cannot be pickled ({type(error).__name__}: {error}). "
                "Return plain data, and open files, connections and locks inside the task that uses them."
            )
            raise UnpicklableResult(message) from error

    def _failure(self, position: int, error: BaseException) -> Failure:
        is_unread, self._unread = error is self._unread, None
        if isinstance(error, KeyboardInterrupt) and self._interruptible:
            raise error
        _cut_own_frames(error)
        original: tuple[bytes, str] | None = None
        if not isinstance(error, Exception):
            original = _pickled(error) or b"N.", _traceback_of(error)
            error = _ordinary(error)
        if isinstance(error, (ValueError, TypeError)) and "read-only" in text_of(error):
            add_note(error, _READ_ONLY)
        kind = type(error)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return Failure(position, _pickled(error), name, text_of(error), _traceback_of(error), is_unread, original)

    def _reply(
        self,
        batch: Batch,
        first: int,
        values: list[Wire],
        marks: array[float],
        failure: Failure | None,
        *,
        ended: bool,
    ) -> Reply:
        spent, rss = 0.0, 0
        if marks[-1] - self._sampled_at >= _SAMPLE_SECONDS:
            self._sampled_at = marks[-1]
            cpu, rss = _usage()
            spent, self._cpu = cpu - self._cpu, cpu
        subflows: Sequence[tuple[int, Wire]] = ()
        if self._subflows:
            subflows = [(position - first, wire) for position, wire in self._subflows]
            self._subflows = []
        return Reply(self.slot, batch.id, first, values, marks.tobytes(), failure, ended, spent, rss, subflows)

    def _begin(self, run: int) -> None:
        """Forget the last run where this is another one."""
        if run != self._run:
            self._forget()
            self._run, self._sampled_at = run, 0.0

    def _drop(self, names: Sequence[int | str]) -> None:
        for task in names:
            self._kept.pop(task, None)
        self._arena.drop([name for name in names if isinstance(name, str)])

    def _forget(self) -> None:
        self._callables: dict[int, Callable[..., Any]] = {}
        self._calls: dict[int, _Call] = {}
        self._new_callables = deque[tuple[int, bytes]]()
        self._new_templates = deque[Template]()
        self._kept: dict[int | str, Wire] = {}
        self._misfits.clear()  # why modules here cannot be made what the caller has, by the part


def _rows(layout: Layout, count: int, values: Sequence[Wire], constants: Sequence[Wire]) -> Iterable[tuple[Any, ...]]:
    """Yield each task's arguments, still encoded; a template with holes gets the task's values as one column more.

    Columns are slices and `zip` makes the rows, so that nothing runs in Python per argument.
    """
    if not layout.kinds:
        return repeat((), count)
    n_values, n_constants = layout.n_references, layout.n_constants
    columns: list[Sequence[Any]] = []
    at_value = at_constant = 0
    for kind in layout.kinds:
        if kind == REFERENCE:
            columns.append(values[at_value::n_values])
            at_value += 1
        else:
            columns.append(constants[at_constant::n_constants])
            at_constant += 1
            at_value += max(kind - NESTED, 0)
    if max(layout.kinds) >= NESTED:
        columns.append([values[i * n_values : (i + 1) * n_values] for i in range(count)])
    return zip(*columns, strict=True)


def _task_number(batch: Batch, position: int) -> int:
    return batch.tasks + position if isinstance(batch.tasks, int) else array("i", batch.tasks)[position]


def _nth(numbers: int | bytes, position: int) -> int:
    """Read a number that all tasks of a batch share, or each has as int32."""
    return numbers if isinstance(numbers, int) else array("i", numbers)[position]


def _loads(pickled: Any, buffers: Sequence[Any]) -> Any:
    return pickle.loads(pickled, buffers=buffers)


def _load_callable(pickled: bytes) -> Callable[..., Any]:
    """Unpickle a callable. It is sent once, so where that fails every task of it is to fail for the same reason."""
    try:
        loaded: Callable[..., Any] = pickle.loads(pickled)
    except BaseException as error:  # SystemExit, too: it may import a module that exits
        return _raiser(error)
    tasks = sys.modules.get("forgepar.tasks")  # loaded by now if it is a task
    return loaded.fn if tasks is not None and isinstance(loaded, tasks.Task) else loaded


def _nothing() -> None:
    """Stand in the place of a callable that there is none of."""


def _raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def _ordinary(error: BaseException) -> TaskExited:
    """Stand in for an exception that is no `Exception` and so belongs in no `ExceptionGroup`."""
    if isinstance(error, SystemExit):
        message = f"the task called sys.exit({error.code!r}). Return from it, or raise an exception, instead."
        code: object = error.code
    else:
        text = text_of(error)
        message, code = f"the task raised {type(error).__name__}({text}). Raise an Exception instead.", text
    stand_in = TaskExited(message, code=code if type(code) in ATOMIC else repr(code))
    stand_in.__cause__, stand_in.__context__ = error.__cause__, error.__context__
    stand_in.__suppress_context__ = error.__suppress_context__
    if "__notes__" in vars(error):
        stand_in.__notes__ = error.__notes__
    return stand_in.with_traceback(error.__traceback__)


def _pickled(error: BaseException) -> bytes | None:
    """Pickle an exception, or what stands for it; None where even that fails."""
    from forgepar.backends.exceptions import dumps as dumps_exception  # most workers need it never

    try:
        return dumps_exception(error)
    except BaseException:  # whatever its class does
        return None


def _traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException as fault:
        return f"{type(error).__name__}: {text_of(error)} (printing its traceback raises {type(fault).__name__})\n"


def _cut_own_frames(error: BaseException) -> None:
    """Take frames of this module, and of what calls a task for it, off the front of the tracebacks of an error."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        trace = chain.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
            trace = trace.tb_next
        BaseException.with_traceback(chain, trace)  # an attribute that its class may not let be set
        chain = chain.__cause__ if chain.__cause__ is not None else chain.__context__


def _end_forked(error: BaseException | None) -> NoReturn:
    """End a child that a task forked, as it came back from the task's function.

    Args:
        error: what it raised; None: it returned.
    """
    code = 0
    with suppress(BaseException):
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            code = (error.code or 0) & 0xFF
        elif error is not None:
            code = 1
            told = f"{error.code}\n" if isinstance(error, SystemExit) else _traceback_of(error)
            sys.stderr.write(told)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    os._exit(code)


def _leave_to_parent() -> None:
    """In a forked child, have no more to do with those who hand out batches, and with what they send for."""
    global _parent
    for worker in list(_workers):
        worker.is_forked = True
    if _parent is not None:
        _parent.close()  # else the parent would not see its worker die while this process lives
        _parent = None
    use(None)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
in_child(_leave_to_parent)


def _limit_threads(threads: int) -> None:
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, str(threads))


def _settle(threads: int, *, gives_way: bool) -> None:
    """Make this process a worker."""
    _limit_threads(threads)
    be_inside()
    know_the_name()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # under fork it may be the parent's own handler
    if gives_way and hasattr(os, "SCHED_BATCH"):
        # Else a worker that the parent wakes may take its core at once, and the next worker's batch waits for a task.
        with suppress(OSError):  # some containers forbid it; it is only quicker
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def begin(start: StartState, threads: int, surroundings: Surroundings, prepare: Callable[[], object] | None) -> None:
    """Be the executor's initializer: take over the caller's state, then do what the workers' owner wants done first.

    Args:
        start: the state of the process that starts this one.
        threads: how many threads numerical libraries may use here; told before any of them is loaded.
        surroundings: what is around the caller.
        prepare: what to do.
    """
    global _refused  # `serve` tells it to the parent
    _hold_sentinel()
    _refused = start.take_over()  # before there is a thread, which would keep its own affinity and niceness
    namespaces.become_worker()
    watch_parent()
    begin_as(surroundings, dict.fromkeys(_THREAD_VARIABLES, str(threads)), with_rules=prepare is not None)
    _limit_threads(threads)
    if prepare is not None:
        prepare()


def _hold_sentinel() -> None:
    """Have children of this process not keep open what others see its end by; see `starting._ForkProcess`, too."""
    kind = type(current_process()).__name__
    if kind == "SpawnProcess":  # in others the command line is that of another process
        for argument in sys.orig_argv:
            if argument.startswith(SENTINEL):
                hold_alone(int(argument.removeprefix(SENTINEL)))
    elif kind == "ForkServerProcess" and "multiprocessing.forkserver" in sys.modules:
        # The server lives as long as somebody has this.
        server: Any = sys.modules["multiprocessing.forkserver"]._forkserver
        if server._forkserver_alive_fd is not None:
            hold_alone(server._forkserver_alive_fd)


def watch_parent() -> None:
    """Have this process end when the one that started it is gone, even amid a task.

    To be called first of all, as the executor's initializer: a worker that is still waiting for `serve` holds both ends
    of the queue that it waits at, and would do so forever.
    """
    with suppress(RuntimeError):  # it may have no more threads: the program of `orphans` ends it then
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="forgepar-watch", daemon=True).start()


def _end_with_parent(parent_pid: int) -> None:
    parent = parent_process()
    if parent is None:
        return
    # Under fork a sibling may hold a copy of the pipe behind the sentinel, so the pid is watched as well.
    while not connection.wait([parent.sentinel], timeout=1.0):
        if os.getppid() != parent_pid:
            break
    _end_children()
    os._exit(1)


def _end_children() -> None:
    """End what tasks of this process have started, as it goes without them."""
    if not _has_children():
        return
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _has_children() -> bool:
    """Tell whether this process may have children: to load psutil takes a busy machine's workers half a second."""
    try:
        threads = os.listdir("/proc/self/task")  # noqa: PTH208
        lists = [f"/proc/self/task/{thread}/children" for thread in threads]
        return any(open(path).read() for path in lists)  # noqa: PTH123
    except OSError:
        return True


def _usage() -> tuple[float, int]:
    """Return this process's CPU seconds and largest resident memory so far, bytes (0 where unknown)."""
    return time.process_time(), 0


try:
    import resource
except ImportError:
    pass
else:
    _RSS_UNIT = 1 if sys.platform == "darwin" else 1024

    def _usage() -> tuple[float, int]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime, used.ru_maxrss * _RSS_UNIT
