"""Submissions to a `ForgeExecutor`: pickles callables and arguments, replaces futures, and makes jobs."""

from __future__ import annotations

import itertools
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from forgepar._validate import check_callable
from forgepar.backends.surroundings import PackedSurroundings, SurroundingsTracker
from forgepar.errors import WorkflowError, add_note, is_system_error
from forgepar.pool.jobs import CallerState, Job, JobFuture, JobRunner, JobTemplate, SentCallable, Stored
from forgepar.system.forking import fork_safe
from forgepar.values.arena import Arena
from forgepar.values.codec import FIXED, Wire, encode, is_segment
from forgepar.values.culprit import culprit
from forgepar.values.module_state import ModuleState, roots_of
from forgepar.values.module_state import StatePart as ModulePart
from forgepar.values.pickling import Dependencies, dumps_by_value
from forgepar.values.segments import Segment, SegmentSlice
from forgepar.workflow.arguments import CONSTANT, NESTED, REFERENCE, ArgumentLayout, Hole, lift
from forgepar.workflow.tasks import Options, Task, base_name

_MOST_REMEMBERED = 512  # callables pickled by value that are remembered, to recognize equal ones
_MOST_BYTES = 16 << 20  # of their pickles; their closures take about as much again
_NO_OPTIONS = Options()


class Submissions:
    """Makes jobs from calls, in any thread, and remembers callables, so that each is sent to a worker once.

    A callable that can be found by name in its module is pickled once. Others are pickled at each submission, as their
    closures may have changed; equal pickles are one callable.

    Args:
        owner: frees the large values among arguments.
        arena: the shared memory for these values.

    Attributes:
        look: returns the current surroundings, for jobs submitted now.
    """

    def __init__(self, owner: JobRunner, arena: Arena) -> None:
        self._owner = owner
        self.arena = arena
        self._lock = fork_safe(threading.RLock())  # reentrant: a signal handler may submit
        self._numbers = itertools.count()
        self._by_name: dict[int, tuple[weakref.ref[Any], SentCallable]] = {}
        self.look = SurroundingsTracker().current
        self._by_pickle: OrderedDict[tuple[bytes, Options, tuple[int, ...]], SentCallable] = OrderedDict()
        self._n_bytes = 0  # of the pickles in `_by_pickle`
        self._modules = ModuleState(looks_into_large=False)  # large values would be compared at each submission

    def job(
        self,
        future: JobFuture,
        sent_callable: SentCallable,
        surroundings: PackedSurroundings,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        where: Callable[[memoryview], SegmentSlice | None] | None = None,
        found: Dependencies | None = None,
    ) -> Job:
        """Make a job.

        Args:
            future: the future that the job completes.
            sent_callable: the callable.
            surroundings: the environment, working directory and so on that the job gets.
            args: positional arguments.
            kwargs: keyword arguments.
            where: returns the segment part of a large buffer that was written before, else None.
            found: functions and classes that the arguments contain in pickled form.

        Raises:
            Exception: the error of pickling an argument, with a note that names the argument.
        """
        if not kwargs and FIXED.issuperset(map(type, args)):  # halves the cost of a submission
            job_template = self._job_template(sent_callable, surroundings, (CONSTANT,) * len(args), ())
            future.parts = job_template.parts
            return Job(future, job_template, args, (), ())
        loader = _ArgumentLoader(self, where, found)
        kinds = [loader.place(value, position) for position, value in enumerate(args)]
        kinds += [loader.place(value, name) for name, value in kwargs.items()]
        more = [part for source in loader.sources for part in source.parts]
        if loader.found.functions or loader.found.named:
            more += self.parts_of(loader.found)
        job_template = self._job_template(sent_callable, surroundings, tuple(kinds), tuple(kwargs), more)
        future.parts = job_template.parts
        return Job(future, job_template, loader.constants, loader.sources, loader.stored)

    def sent_callable(self, fn: Callable[..., Any]) -> SentCallable:
        """Return a pickled callable, from an earlier submission if it did not change.

        Raises:
            WorkflowError: the task has options that an executor does not support.
            Exception: the error of pickling the callable, with a note.
        """
        known = self._by_name.get(id(fn))
        if known is not None and known[0]() is fn and _is_current(known[1].state.reached):
            return known[1]
        options = fn.task_options if isinstance(fn, Task) else _NO_OPTIONS
        check_callable("fn", fn, WorkflowError)
        _check_options(fn, options)
        portable_fn = fn.portable() if isinstance(fn, Task) else fn
        found = Dependencies()
        try:
            pickled = dumps_by_value(portable_fn, found=found)
        except Exception as error:
            reason = "could not be read to be pickled"
            if not is_system_error(error):
                reason = f"cannot be pickled: {culprit(portable_fn, error)}"
            add_note(error, f"the callable itself {reason}")
            raise
        sent_callable = self._by_content(fn, pickled, options, self._state_of(found))
        if _is_by_name(portable_fn, pickled):
            self._remember(fn, sent_callable)
        return sent_callable

    def _state_of(self, found: Dependencies) -> CallerState:
        roots = roots_of(found)
        if not roots:
            return CallerState(keys=tuple(found.keys.items()))
        with self._lock:
            reached = tuple(self._modules.reached_from(roots, renew=True))
        parts = tuple([part for part in reached if part.pickled])
        return CallerState(reached, parts, tuple(found.keys.items()))

    def encode(
        self,
        value: Any,
        where: Callable[[memoryview], SegmentSlice | None] | None = None,
        found: Dependencies | None = None,
    ) -> Wire:
        """Encode an argument for a batch."""
        return encode(value, self.arena, where, found)

    def parts_of(self, found: Dependencies) -> Sequence[ModulePart]:
        """Return the current state of importable modules that arguments refer to."""
        roots = roots_of(found)
        if not roots:
            return ()
        with self._lock:
            return self._modules.parts_for(roots, renew=True)

    def store(self, wire: Segment, *, is_shared: bool) -> Stored:
        """Return a reference to the segment of an argument, without the segments of parts if those are shared."""
        return Stored(self._owner, wire[:1] if is_shared else wire, keep=True)

    def is_mine(self, future: JobFuture) -> bool:
        """Return whether a future belongs to the same executor."""
        return future.owner is self._owner

    def _job_template(
        self,
        sent_callable: SentCallable,
        surroundings: PackedSurroundings,
        kinds: tuple[int, ...],
        keywords: tuple[str, ...],
        more: Sequence[ModulePart] = (),
    ) -> JobTemplate:
        parts: Sequence[ModulePart] = sent_callable.state.parts
        if more:  # the callable's own parts take precedence
            parts = tuple({part.key: part for part in (*more, *parts)}.values())
        key = (surroundings.number, kinds, keywords, _numbers(parts) if more else ())
        job_template = sent_callable.job_templates.get(key)
        if job_template is None:
            with self._lock:
                if len(sent_callable.job_templates) > _MOST_REMEMBERED:  # most are for earlier surroundings
                    sent_callable.job_templates.clear()
                job_template = JobTemplate(
                    next(self._numbers), sent_callable, ArgumentLayout(kinds, keywords), surroundings, parts
                )
                job_template = sent_callable.job_templates.setdefault(key, job_template)
        return job_template

    def _by_content(self, fn: Callable[..., Any], pickled: bytes, options: Options, state: CallerState) -> SentCallable:
        with self._lock:
            key = (pickled, options, _numbers(state.parts))
            found = self._by_pickle.get(key)
            if found is None:
                found = self._by_pickle[key] = SentCallable(next(self._numbers), fn, pickled, options, state)
                self._n_bytes += len(pickled)
                while len(self._by_pickle) > 1 and (
                    len(self._by_pickle) > _MOST_REMEMBERED or self._n_bytes > _MOST_BYTES
                ):
                    (oldest, _, _), evicted = self._by_pickle.popitem(last=False)
                    self._n_bytes -= len(oldest)
                    # A cycle of references: without this, only the garbage collector would free the callable.
                    evicted.job_templates.clear()
            else:
                self._by_pickle.move_to_end(key)
        return found

    def _remember(self, fn: Callable[..., Any], sent_callable: SentCallable) -> None:
        key, known = id(fn), self._by_name
        with suppress(TypeError):  # some callables have no weak references
            known[key] = (weakref.ref(fn, lambda _: known.pop(key, None)), sent_callable)


def _is_current(parts: Sequence[ModulePart]) -> bool:
    for part in parts:  # noqa: SIM110  (a generator takes twice as long)
        if not part.is_current():
            return False
    return True


def _numbers(parts: Sequence[ModulePart]) -> tuple[int, ...]:
    return tuple([part.number for part in parts])


class _ArgumentLoader:
    """Sorts the arguments of one job into constants and futures."""

    def __init__(
        self,
        submissions: Submissions,
        where: Callable[[memoryview], SegmentSlice | None] | None,
        found: Dependencies | None,
    ) -> None:
        self._submissions = submissions
        self._where = where
        self.constants: list[Wire] = []
        self.sources: list[JobFuture] = []
        self.stored: list[Stored] = []
        self.found = found or Dependencies()

    def place(self, value: Any, position: int | str) -> int:
        """Add an argument, and return its kind."""
        if type(value) in FIXED:
            self.constants.append(value)
            return CONSTANT
        if isinstance(value, JobFuture) and self._submissions.is_mine(value):
            self.sources.append(value)
            return REFERENCE
        n_before = len(self.sources)
        try:
            lifted = lift(value, self._take)
            wire = self._submissions.encode(lifted, self._where, self.found)
        except Exception as error:
            name = f"args[{position}]" if isinstance(position, int) else f"kwargs[{position!r}]"
            reason = "could not be read or written when it was" if is_system_error(error) else "cannot be"
            add_note(error, f"{name} is a {type(value).__name__} that {reason} pickled")
            raise
        if is_segment(wire):
            self.stored.append(self._submissions.store(wire, is_shared=self._where is not None))
        self.constants.append(wire)
        return CONSTANT if lifted is value else NESTED + len(self.sources) - n_before

    def _take(self, part: Any) -> Hole | None:
        if not isinstance(part, JobFuture) or not self._submissions.is_mine(part):
            return None
        self.sources.append(part)
        return Hole(len(self.sources) - 1)


def _check_options(fn: Callable[..., Any], options: Options) -> None:
    refused = [name for name in ("after", "compensate", "fallback") if getattr(options, name)]
    if refused:
        raise WorkflowError(
            f"{base_name(fn)!r} has {refused[0]}=, which is for workflows. Use only name, retries, backoff, retry_on, "
            "timeout, memory and writable. To wait for another job, pass its future as an argument."
        )


def _is_by_name(fn: Any, pickled: bytes) -> bool:
    """Return whether a pickle contains only the name of a callable, so that it never changes."""
    try:
        if isinstance(fn, (type, FunctionType)):
            return pickle.dumps(fn, protocol=5) == pickled
        if isinstance(fn, BuiltinFunctionType):
            return isinstance(fn.__self__, ModuleType)
        return isinstance(fn.__reduce_ex__(5), str)  # such as ufuncs of numpy, and tasks in modules
    except Exception:
        return False
