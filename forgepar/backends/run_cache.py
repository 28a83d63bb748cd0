"""What a worker keeps of a run from batch to batch, and how it turns the tasks of a batch into calls.

Batch ──> RunCache.prepare ──> a callable, and a row of arguments per task
"""

from __future__ import annotations

import pickle
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from forgepar.backends.messages import Batch, Template
from forgepar.backends.output_capture import Capture
from forgepar.backends.surroundings import SurroundingsApplier
from forgepar.values import worker_modules
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, decode, decode_own, parts_of
from forgepar.values.pickling import loads_own
from forgepar.workflow.arguments import NESTED, REFERENCE, ArgumentLayout, fill
from forgepar.workflow.context import RunContext
from forgepar.workflow.fresh_values import is_frozen, renewing


class Call(NamedTuple):
    """A template that is ready to run.

    Attributes:
        function: the function to call.
        layout: the kind of each argument.
        shared: constants that all tasks receive.
        renewed: the pickle and buffers of those constants that are unpickled again for each task.
        is_direct: whether the function takes the decoded arguments as they come.
        base: the start of the tasks' names.
        timeout: seconds that an attempt may take.
        owns: whether arguments are private copies.
        parts: numbers of the parts of the caller's modules that it needs; None: all that were sent.
        has_effects: whether each task is reported as it ends.
    """

    function: Callable[..., Any]
    layout: ArgumentLayout
    shared: dict[str, Any]
    renewed: dict[str, tuple[Any, Sequence[Any]]]
    is_direct: bool
    base: str
    timeout: float | None
    owns: bool
    parts: tuple[int, ...] | None
    has_effects: bool


class RunCache:
    """Callables, templates and small values of the current run.

    Args:
        arena: the arena with the large values.

    Attributes:
        context: facts about the run that tasks may ask for.
        callables: unpickled callables by number.
        calls: templates that are ready to run, by number.
        values: encoded small values, by task number or name.
        unreadable: the error of the last argument that could not be unpickled.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.context = RunContext("", "", 0, float("inf"))
        self.unreadable: BaseException | None = None
        self._applier = SurroundingsApplier()
        self.clear()

    def clear(self) -> None:
        """Forget the run."""
        self.callables: dict[int, Callable[..., Any]] = {}
        self.calls: dict[int, Call] = {}
        self.values: dict[int | str, Wire] = {}
        self._new_callables = deque[tuple[int, bytes]]()
        self._new_templates = deque[Template]()
        self._part_errors: dict[int, BaseException] = {}  # parts of the caller's modules that cannot be loaded here

    def drop(self, names: Sequence[int | str]) -> None:
        """Forget values: those of tasks by number, segments by name."""
        for task in names:
            self.values.pop(task, None)
        self._arena.drop([name for name in names if isinstance(name, str)])

    def prepare(self, batch: Batch, capture: Capture | None) -> tuple[Callable[..., Any], Iterable[tuple[Any, ...]]]:
        """Add what a batch brings to the cache; return the callable and the arguments of each task."""
        if batch.facts is not None:
            self.context, packed = batch.facts
            self._applier.receive(self.context.run_id, packed)
        values, coded = batch.values, tuple in set(map(type, batch.values))
        if coded:
            values = self._keep(values)
        if batch.drop:
            self.drop(batch.drop)  # only now: the batch may use values that it drops
        if batch.callables or batch.templates:
            self._new_callables += batch.callables
            self._new_templates += batch.templates
        if self._applier.is_pending:
            # If this fails, the new callables stay queued for the next batch.
            self._applier.apply(None if capture is None else capture.apply_rules)
        if self._new_callables:
            self._load_callables(capture)
        while self._new_templates:
            template = self._new_templates.popleft()
            self.calls[template.number] = self._make_call(template)
        call = self.calls[batch.template]
        if self._part_errors:
            self._check_parts(call)
        if batch.references:
            values = [values[i] for i in array("i", batch.references)]
        if batch.constants:
            coded = coded or tuple in set(map(type, batch.constants))
        elif batch.n_tasks == 1 and call.is_direct and not coded:
            return call.function, (tuple(values),)
        return self._callable_for(call, coded=coded), _rows(call.layout, batch.n_tasks, values, batch.constants)

    def _keep(self, values: Sequence[Wire]) -> list[Wire]:
        """Keep the encoded values that come with a number, and look up those that were kept before."""
        found = []
        for wire in values:
            if type(wire) is tuple:
                if type(wire[0]) is int:
                    wire = self.values[wire[0]]
                elif type(wire[0]) is bytes:
                    self.values[wire[1]] = wire
            found.append(wire)
        return found

    def _load_callables(self, capture: Capture | None) -> None:
        before = self._applier.before_imports()
        worker_modules.collect(self._part_errors)
        try:
            while self._new_callables:
                number, pickled = self._new_callables.popleft()
                self.callables[number] = self._load_part(number, pickled) if number < 0 else _load_callable(pickled)
        finally:
            worker_modules.collect(None)
        self._applier.after_imports(before, None if capture is None else capture.apply_rules)

    def _load_part(self, number: int, pickled: bytes) -> Callable[..., Any]:
        """Load a part of the caller's modules; if that fails, the tasks that need it fail later."""
        try:
            if number == worker_modules.NEW_RUN:
                worker_modules.begin_run()
            else:
                worker_modules.take_part(pickled, number)
            self._part_errors.pop(number, None)
        except BaseException as error:
            self._part_errors[number] = error
        return _no_callable

    def _check_parts(self, call: Call) -> None:
        """Raise the error of a part of the caller's modules that the tasks need and that could not be loaded."""
        for number, error in self._part_errors.items():
            if call.parts is None or number in call.parts:
                raise error

    def _make_call(self, template: Template) -> Call:
        layout = ArgumentLayout(*template.layout)
        function, shared, renewed = self.callables[template.callable], dict[str, Any](), {}
        try:
            for name, wire in template.shared.items():
                shared[name] = value = decode(wire, self._arena)
                if type(wire) is tuple and (template.owns or not is_frozen(value)):
                    renewed[name] = parts_of(wire, self._arena)
            function = renewing(function, owns=template.owns)
        except BaseException as error:
            function = _raiser(error)
        is_direct = not shared and not layout.keywords and max(layout.kinds, default=0) < NESTED
        _, _, _, _, base, timeout, owns, parts, has_effects = template
        return Call(function, layout, shared, renewed, is_direct, base, timeout, owns, parts, has_effects)

    def _callable_for(self, call: Call, *, coded: bool) -> Callable[..., Any]:
        """Return what takes a row of `_rows`: the user's function itself if its arguments need no decoding."""
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
                self.unreadable = error
                raise
            if nested:
                arguments = [
                    fill(part, inner) if kind >= NESTED else part for kind, part in zip(kinds, arguments, strict=True)
                ]
            by_name = dict(zip(keywords, arguments[n_positional:], strict=True))
            return function(*arguments[:n_positional], **by_name, **({**shared, **own} if own else shared))

        return decoded


def _rows(
    layout: ArgumentLayout, count: int, values: Sequence[Wire], constants: Sequence[Wire]
) -> Iterable[tuple[Any, ...]]:
    """Yield the encoded arguments of each task; if some are nested, the task's values follow as one more column.

    Columns are slices and `zip` makes the rows, so that no Python code runs per argument.
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


def _loads(pickled: Any, buffers: Sequence[Any]) -> Any:
    return pickle.loads(pickled, buffers=buffers)


def _load_callable(pickled: bytes) -> Callable[..., Any]:
    """Unpickle a callable. If that fails, return one that raises the error, since the callable is sent only once."""
    try:
        loaded: Any = pickle.loads(pickled)
    except BaseException as error:  # also SystemExit: unpickling may import a module that exits
        return _raiser(error)
    function: Callable[..., Any] = loaded.fn if _is_task(loaded) else loaded
    return function


def _is_task(loaded: Any) -> bool:
    """Return whether a callable is a `Task`, without loading that class."""
    return any(kind.__name__ == "Task" and kind.__module__ == "forgepar" for kind in type(loaded).__mro__)


def _no_callable() -> None:
    """Stand in for a callable under the number of a part of the caller's modules."""


def _raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail
