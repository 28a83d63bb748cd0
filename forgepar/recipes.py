"""How what is submitted to a `ForgeExecutor` becomes jobs: callables and arguments pickled, futures lifted out."""

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

from forgepar.arguments import CONSTANT, NESTED, REFERENCE, Hole, Layout, lift
from forgepar.backends.surroundings import Lookout, Moment
from forgepar.errors import WorkflowError, add_note, is_system_error
from forgepar.forking import fork_safe
from forgepar.jobs import Called, CallerState, Job, JobFuture, Owner, Recipe, Stored
from forgepar.pickling import Found, dumps_by_value
from forgepar.tasks import Options, Task, base_name
from forgepar.validation import check_callable
from forgepar.values.arena import Arena
from forgepar.values.codec import FIXED, Wire, encode, is_segment
from forgepar.values.culprit import culprit
from forgepar.values.modulestate import ModuleState, roots_of
from forgepar.values.modulestate import Part as ModulePart
from forgepar.values.segment import Part, Segment

_MOST_REMEMBERED = 512  # callables that are pickled by value, to find equal ones again
_MOST_BYTES = 16 << 20  # of these, as they were pickled; what they close over takes as much again
_NO_OPTIONS = Options()


class Recipes:
    """Makes jobs of what is submitted, in whatever thread; remembers callables, so that each travels once.

    One that is found by its name in its module is pickled once. Others are pickled at every look, as what they close
    over may have changed; those that come out the same are the same.

    Args:
        owner: frees the large values among arguments.
        arena: where these are put.

    Attributes:
        look: returns the surroundings of jobs that are submitted at this moment.
    """

    def __init__(self, owner: Owner, arena: Arena) -> None:
        self._owner = owner
        self.arena = arena
        self._lock = fork_safe(threading.RLock())  # reentrant: a signal handler may submit
        self._numbers = itertools.count()
        self._by_name: dict[int, tuple[weakref.ref[Any], Called]] = {}
        self.look = Lookout().look
        self._by_pickle: OrderedDict[tuple[bytes, Options, tuple[int, ...]], Called] = OrderedDict()
        self._n_bytes = 0  # of the pickles there
        self._modules = ModuleState(looks_into_large=False)  # it looks at each submission

    def job(
        self,
        future: JobFuture,
        called: Called,
        surroundings: Moment,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        where: Callable[[memoryview], Part | None] | None = None,
        found: Found | None = None,
    ) -> Job:
        """Make a job.

        Args:
            future: what it fulfils.
            called: what it calls.
            surroundings: what it is to find around it.
            args: positional arguments.
            kwargs: the others.
            where: tells of large buffers where they lie, if they were written before.
            found: functions and classes that arguments hold in a pickled form.

        Raises:
            Exception: whatever pickling an argument raises, with a note that names it.
        """
        if not kwargs and FIXED.issuperset(map(type, args)):  # half of all that a submission costs is saved
            recipe = self._recipe(called, surroundings, (CONSTANT,) * len(args), ())
            future.parts = recipe.parts
            return Job(future, recipe, args, (), ())
        loading = _Loading(self, where, found)
        kinds = [loading.place(value, position) for position, value in enumerate(args)]
        kinds += [loading.place(value, name) for name, value in kwargs.items()]
        more = [part for source in loading.sources for part in source.parts]
        if loading.found.functions or loading.found.named:
            more += self.parts_of(loading.found)
        recipe = self._recipe(called, surroundings, tuple(kinds), tuple(kwargs), more)
        future.parts = recipe.parts
        return Job(future, recipe, loading.constants, loading.sources, loading.held)

    def called(self, fn: Callable[..., Any]) -> Called:
        """Return a callable as it travels.

        Raises:
            WorkflowError: it has options that an executor does not know.
            Exception: whatever pickling it raises, with a note.
        """
        known = self._by_name.get(id(fn))
        if known is not None and known[0]() is fn and _is_current(known[1].state.reached):
            return known[1]
        options = fn.task_options if isinstance(fn, Task) else _NO_OPTIONS
        check_callable("fn", fn, WorkflowError)
        _check_options(fn, options)
        shipped = fn.portable() if isinstance(fn, Task) else fn
        found = Found()
        try:
            pickled = dumps_by_value(shipped, found=found)
        except Exception as error:
            is_of_system = is_system_error(error)
            told = (
                "could not be read to be pickled" if is_of_system else f"cannot be pickled: {culprit(shipped, error)}"
            )
            add_note(error, f"the callable itself {told}")
            raise
        called = self._by_content(fn, pickled, options, self._state_of(found))
        if _is_by_name(shipped, pickled):
            self._remember(fn, called)
        return called

    def _state_of(self, found: Found) -> CallerState:
        roots = roots_of(found)
        if not roots:
            return CallerState(keys=tuple(found.keys.items()))
        with self._lock:
            reached = tuple(self._modules.reached_from(roots, anew=True))
        parts = tuple([part for part in reached if part.pickled])
        return CallerState(reached, parts, tuple(found.keys.items()))

    def encode(
        self, value: Any, where: Callable[[memoryview], Part | None] | None = None, found: Found | None = None
    ) -> Wire:
        """Turn an argument into what travels."""
        return encode(value, self.arena, where, found)

    def parts_of(self, found: Found) -> Sequence[ModulePart]:
        """Return what arguments refer to in modules of the caller that workers can import, as it is now."""
        roots = roots_of(found)
        if not roots:
            return ()
        with self._lock:
            return self._modules.parts_for(roots, anew=True)

    def store(self, wire: Segment, *, is_shared: bool) -> Stored:
        """Hold the segment of an argument; only its own where others have parts in it, too."""
        return Stored(self._owner, wire[:1] if is_shared else wire, keep=True)

    def is_mine(self, future: JobFuture) -> bool:
        """Tell whether a future is of the same executor."""
        return future.owner is self._owner

    def _recipe(
        self,
        called: Called,
        surroundings: Moment,
        kinds: tuple[int, ...],
        keywords: tuple[str, ...],
        more: Sequence[ModulePart] = (),
    ) -> Recipe:
        parts: Sequence[ModulePart] = called.state.parts
        if more:  # the callable's own are the latest of their names
            parts = tuple({part.key: part for part in (*more, *parts)}.values())
        key = (surroundings.number, kinds, keywords, _numbers(parts) if more else ())
        recipe = called.recipes.get(key)
        if recipe is None:
            with self._lock:
                if len(called.recipes) > _MOST_REMEMBERED:  # of surroundings that will not come again, mostly
                    called.recipes.clear()
                recipe = Recipe(next(self._numbers), called, Layout(kinds, keywords), surroundings, parts)
                recipe = called.recipes.setdefault(key, recipe)
        return recipe

    def _by_content(self, fn: Callable[..., Any], pickled: bytes, options: Options, state: CallerState) -> Called:
        with self._lock:
            key = (pickled, options, _numbers(state.parts))
            found = self._by_pickle.get(key)
            if found is None:
                found = self._by_pickle[key] = Called(next(self._numbers), fn, pickled, options, state)
                self._n_bytes += len(pickled)
                while len(self._by_pickle) > 1 and (
                    len(self._by_pickle) > _MOST_REMEMBERED or self._n_bytes > _MOST_BYTES
                ):
                    (oldest, _, _), _ = self._by_pickle.popitem(last=False)
                    self._n_bytes -= len(oldest)
            else:
                self._by_pickle.move_to_end(key)
        return found

    def _remember(self, fn: Callable[..., Any], called: Called) -> None:
        key, known = id(fn), self._by_name
        with suppress(TypeError):  # not all can be referred to weakly
            known[key] = (weakref.ref(fn, lambda _: known.pop(key, None)), called)


def _is_current(parts: Sequence[ModulePart]) -> bool:
    for part in parts:  # noqa: SIM110  (a generator would take twice as long)
        if not part.is_current():
            return False
    return True


def _numbers(parts: Sequence[ModulePart]) -> tuple[int, ...]:
    return tuple([part.number for part in parts])


class _Loading:
    """Sorts the arguments of one job."""

    def __init__(
        self, recipes: Recipes, where: Callable[[memoryview], Part | None] | None, found: Found | None
    ) -> None:
        self._recipes = recipes
        self._where = where
        self.constants: list[Wire] = []
        self.sources: list[JobFuture] = []
        self.held: list[Stored] = []
        self.found = found or Found()

    def place(self, value: Any, position: int | str) -> int:
        """Take in an argument and return its kind."""
        if type(value) in FIXED:
            self.constants.append(value)
            return CONSTANT
        if isinstance(value, JobFuture) and self._recipes.is_mine(value):
            self.sources.append(value)
            return REFERENCE
        n_before = len(self.sources)
        try:
            lifted = lift(value, self._take)
            wire = self._recipes.encode(lifted, self._where, self.found)
        except Exception as error:
            name = f"args[{position}]" if isinstance(position, int) else f"kwargs[{position!r}]"
            told = "could not be read or written when it was" if is_system_error(error) else "cannot be"
            add_note(error, f"{name} is a {type(value).__name__} that {told} pickled")
            raise
        if is_segment(wire):
            self.held.append(self._recipes.store(wire, is_shared=self._where is not None))
        self.constants.append(wire)
        return CONSTANT if lifted is value else NESTED + len(self.sources) - n_before

    def _take(self, part: Any) -> Hole | None:
        if not isinstance(part, JobFuture) or not self._recipes.is_mine(part):
            return None
        self.sources.append(part)
        return Hole(len(self.sources) - 1)


def _check_options(fn: Callable[..., Any], options: Options) -> None:
    refused = [name for name in ("after", "compensate", "fallback") if getattr(options, name)]
    if refused:
        raise WorkflowError(
            f"{base_name(fn)!r} has {refused[0]}=, which is for workflows. An executor knows name, retries, backoff, "
            "retry_on, timeout, memory and writable; a future among the arguments is waited for."
        )


def _is_by_name(fn: Any, pickled: bytes) -> bool:
    """Tell whether a pickle of a callable only names it, so that it will be the same another time."""
    try:
        if isinstance(fn, (type, FunctionType)):
            return pickle.dumps(fn, protocol=5) == pickled
        if isinstance(fn, BuiltinFunctionType):
            return isinstance(fn.__self__, ModuleType)
        return isinstance(fn.__reduce_ex__(5), str)  # numpy's functions, and tasks of a module
    except Exception:
        return False
