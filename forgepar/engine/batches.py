"""The messages of batches: callables go to each worker once per run, small values once per worker.

`BatchWriter` knows what each worker holds (`engine.worker_cache`), and sends only what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from forgepar.backends.messages import Batch, Template
from forgepar.engine.worker_cache import WorkerCache
from forgepar.errors import (
    RemoteError,
    UnpicklableArgument,
    UnpicklableCallable,
    add_note,
    error_text,
    is_system_error,
    text_of,
)
from forgepar.values.arena import Arena
from forgepar.values.codec import ATOMIC, Wire, dumps, encode, is_plain, is_segment
from forgepar.values.culprit import culprit
from forgepar.values.exceptions import PicklableException
from forgepar.values.module_state import ModuleState, roots_of
from forgepar.values.pickling import Dependencies, dumps_by_value
from forgepar.values.segments import Segment
from forgepar.values.worker_modules import NEW_RUN
from forgepar.workflow.context import RunContext
from forgepar.workflow.plan import IntArray, Plan, Tasks, as_index
from forgepar.workflow.tasks import Task
from forgepar.workflow.taskset import distinct_places

_FEW = 16  # references: up to here, a loop costs less than numpy's fixed few us per call


class PickledPlan:
    """The callables and constants of a plan, checked and pickled before any worker starts.

    Args:
        plan: the workflow.
        state: makes the parts of the user's modules that these refer to; None if workers have their own modules.
        found: functions and classes that constants hold in pickled form.
        forgets: whether workers first forget the parts of the caller's modules that earlier runs sent.

    Attributes:
        callables: the pickled callables, by number.
        parts: the pickled parts of modules that workers compare their own with, by number.

    Raises:
        UnpicklableCallable: it names the first task that has it.
        UnpicklableArgument: it names the task and the position.
    """

    def __init__(
        self, plan: Plan, state: ModuleState | None = None, found: Dependencies | None = None, *, forgets: bool = False
    ) -> None:
        self.plan = plan
        self._state = state
        self._found = found or Dependencies()
        # A declaration that was refused may have left templates without tasks.
        self._used = set(np.flatnonzero(np.bincount(plan.template_of)).tolist())
        self.callables: dict[int, bytes] = {}
        self._pickle_callables(plan, self._used)
        self.has_plain_constants = ATOMIC.issuperset(map(type, plan.constants))
        self._check_constants()
        self.parts: list[tuple[int, bytes]] = [(NEW_RUN, b"")] if forgets else []
        self._add_parts(anew=True)

    def _add_parts(self, *, anew: bool) -> None:
        """Make the parts of what was found since the last call."""
        if self._state is not None:
            parts = self._state.parts_for(roots_of(self._found), renew=anew)
            self._found = Dependencies()
            known = {number for number, _ in self.parts}
            self.parts += [(part.number, part.pickled) for part in parts if part.number not in known]

    def grow(self, plan: Plan) -> None:
        """Continue with a plan that has more tasks; they came from a worker, so their constants can be pickled."""
        n_tasks, n_constants = self.plan.n_tasks, len(self.plan.constants)
        self._pickle_callables(plan, set(plan.template_of[n_tasks:].tolist()))
        self._add_parts(anew=False)
        self.plan = plan
        self.has_plain_constants = self.has_plain_constants and ATOMIC.issuperset(
            map(type, plan.constants[n_constants:])
        )

    def _pickle_callables(self, plan: Plan, templates: set[int]) -> None:
        for number in sorted({number for template in templates for number in plan.callables_for(template)}):
            self.callables[number] = _pickle_callable(plan, number, self._found)

    def _check_constants(self) -> None:
        for number in self._used:
            for name, value in self.plan.templates[number].shared.items():
                _check(value, self.plan, number, f"kwargs[{name!r}]", self._found)
            for step in self.plan.specs[self.plan.templates[number].spec].options.fallback:
                if step.kind == "value":
                    _check(step.what, self.plan, number, "fallback=", self._found)
        if self.has_plain_constants:
            return
        starts = self.plan.constant_start
        for place in range(int(starts[-1])):
            value = self.plan.constants[place]
            if type(value) not in ATOMIC and not is_plain(value):
                task = int(np.searchsorted(starts, place, side="right")) - 1
                template = self.plan.templates[self.plan.template_of[task]]
                position = template.layout.position(place - int(starts[task]))
                _check(value, self.plan, None, position, self._found, task)


class BatchWriter:
    """Writes the batches of one run.

    Args:
        pickled_plan: the callables and constants.
        arena: where large constants go.
        run: the run's number.
        n_slots: number of workers.
        facts: what tasks can ask about the run.
        surroundings: the state of the caller's process for tasks, packed.
        one_layer: whether all tasks of a batch are always of one layer.
    """

    def __init__(
        self,
        pickled_plan: PickledPlan,
        arena: Arena,
        run: int,
        n_slots: int,
        facts: RunContext,
        surroundings: bytes,
        *,
        one_layer: bool = True,
    ) -> None:
        self._pickled_plan = pickled_plan
        self._arena = arena
        self._run = run
        self._facts = (facts, surroundings)
        self._one_layer = one_layer
        self._read(pickled_plan.plan)
        self._shared: dict[int, Mapping[str, Wire]] = {}
        self._caught: dict[int, Wire] = {}
        self._segments: list[Wire] = []
        self._shipped: dict[int, Wire] = {}
        self._held = [WorkerCache() for _ in range(n_slots)]

    def _read(self, plan: Plan) -> None:
        self._plan = plan
        self._n_references = [template.layout.n_references for template in plan.templates]
        self._n_constants = [template.layout.n_constants for template in plan.templates]
        self._undo = frozenset(plan.stand_ins.undo.values())
        # Single elements are read through these: to index a numpy array takes three times as long, more when cold.
        self._references_at = plan.references.data
        self._reference_start_at = plan.reference_start.data
        self._constant_start_at = plan.constant_start.data
        self._ordinal_at, self._layer_at = plan.ordinals.data, plan.layers.data

    def grow(self, plan: Plan) -> None:
        """Continue with a plan that has more tasks.

        Raises:
            UnpicklableCallable: one of them has a callable that came from a worker, but cannot be sent back.
        """
        self._pickled_plan.grow(plan)
        self._read(plan)

    def forget(self, slot: int) -> None:
        """Note that a slot has a new worker, which holds nothing."""
        self._held[slot] = WorkerCache()

    def close(self) -> None:
        """Free the segments of constants; the next `drops` names all that workers have mapped."""
        for segment in self._segments:
            self._arena.free(segment)
        for held in self._held:
            held.unmap_all()  # also outputs, and values of tasks that never ran: the next run uses none of them
        self._run = -1

    def freed(self, segment: Segment) -> None:
        """Note that a value's segment was freed; workers that have it mapped must unmap it."""
        for held in self._held:
            held.freed(segment)

    def drops(self, slot: int) -> Batch | None:
        """Return a batch that names what a slot must unmap, None if there is nothing; see `Batch.drop`.

        After `close` it belongs to another run, so that the worker forgets all of this one.
        """
        dropped = self._held[slot].drops()
        return Batch(0, self._run, 0, 0, 0, (), (), b"", (), (), dropped) if dropped else None

    def caught(self, task: int, error: Exception) -> None:
        """Encode the error of a task for its fallback function."""
        try:
            self._caught[task] = encode(PicklableException(error), self._arena)
        except Exception as fault:
            why = f"sent: {type(fault).__name__}: {text_of(fault)}" if is_system_error(fault) else "pickled"
            stand_in = RemoteError(
                f"{error_text(error)} (the exception itself cannot be {why})",
                type_name=f"{type(error).__module__}.{type(error).__qualname__}",
                text=text_of(error),
            )
            self._caught[task] = encode(stand_in, self._arena)

    def keep(self, slot: int, task: int, wire: Wire) -> None:
        """Note that a worker holds a small value that it made."""
        self._held[slot].add(task, wire)

    def batch(
        self,
        slot: int,
        number: int,
        template: int,
        tasks: Tasks,
        values: Sequence[Wire],
        attempts: Mapping[int, int] = MappingProxyType({}),
    ) -> Batch:
        """Return the message of a batch.

        Args:
            slot: gets it.
            number: the batch's id.
            template: the template of all tasks.
            tasks: their numbers, ascending.
            values: by task, its value so far.
            attempts: by task, the number of its attempt, if that is not the first.
        """
        held = self._held[slot]
        facts = None if held.templates else self._facts
        callables, templates = self._news(held, template)
        inputs: list[Wire] = []
        references = b""
        n_references = self._n_references[template]
        if template in self._undo:
            inputs, references = self._inputs(held, np.asarray(tasks, np.int32), values)
        elif n_references and n_references * len(tasks) <= _FEW and isinstance(tasks, range):
            first = self._reference_start_at[tasks.start]
            wanted = self._references_at[first : first + n_references * len(tasks)].tolist()
            inputs = held.thin(wanted, [values[task] for task in wanted])
        elif n_references:
            inputs, references = self._inputs(held, self.references(tasks), values)
        constants = self._constants(held, tasks) if self._n_constants[template] else []
        if template in self._plan.stand_ins.base_of and template not in self._undo:
            constants = [self._caught[int(tasks[0])], *constants]
        numbers = tasks.start if isinstance(tasks, range) else tasks.tobytes()
        return Batch(
            number,
            self._run,
            template,
            len(tasks),
            numbers,
            constants,
            inputs,
            references,
            callables,
            templates,
            held.drops(),
            *self._names(tasks),
            [(place, attempts[task]) for place, task in enumerate(tasks) if task in attempts] if attempts else (),
            facts,
        )

    def _names(self, tasks: Tasks) -> tuple[int | bytes, int | bytes]:
        """Return the tasks' ordinals and layers; mostly one number each."""
        plan, at = self._plan, as_index(tasks)
        first = int(tasks[0])
        layers = self._layer_at[first] if self._one_layer or len(tasks) == 1 else plan.layers[at].tobytes()
        ordinal = self._ordinal_at[first]
        # Ordinals of one base grow: they are consecutive if the last minus the first is the number of tasks less 1.
        if len(tasks) == 1 or self._ordinal_at[int(tasks[-1])] - ordinal == len(tasks) - 1:
            return ordinal, layers
        return plan.ordinals[at].tobytes(), layers

    def _news(self, held: WorkerCache, template: int) -> tuple[Sequence[tuple[int, bytes]], Sequence[Template]]:
        """Return the callable and the template, if the worker does not have them."""
        if template in held.templates:
            return (), ()
        held.templates.add(template)
        row = self._plan.templates[template]
        number = self._plan.callable_of[template]
        callables: list[tuple[int, bytes]] = []
        if held.n_parts < len(self._pickled_plan.parts):
            callables = self._pickled_plan.parts[held.n_parts :]
            held.n_parts = len(self._pickled_plan.parts)
        if number not in held.callables:
            held.callables.add(number)
            callables.append((number, self._pickled_plan.callables[number]))
        layout = (row.layout.kinds, row.layout.keywords)
        shared = dict(self._shared_of(template))
        for wire in filter(is_segment, shared.values()):
            held.maps(wire)
        spec = self._plan.specs[row.spec]
        made = Template(
            template,
            number,
            layout,
            shared,
            spec.base,
            spec.options.timeout,
            spec.options.writable,
            has_effects=spec.options.effects or template in self._undo,
        )
        return callables, [made]

    def _shared_of(self, template: int) -> Mapping[str, Wire]:
        if template not in self._shared:
            shared = self._plan.templates[template].shared
            self._shared[template] = {name: self._encode(value) for name, value in shared.items()}
        return self._shared[template]

    def _encode(self, value: Any) -> Wire:
        """Encode a constant; a large one that many tasks get is one object, and is written once."""
        if id(value) in self._shipped:
            return self._shipped[id(value)]
        wire = encode(value, self._arena)
        if is_segment(wire):
            self._segments.append(wire)
            self._shipped[id(value)] = wire  # the plan keeps the object, so no other gets its id
        return wire

    def _constants(self, held: WorkerCache, tasks: Tasks) -> list[Wire]:
        constants, starts = self._plan.constants, self._constant_start_at
        if isinstance(tasks, range):
            found = constants[starts[tasks.start] : starts[tasks.stop]]
        else:
            found = [value for task in tasks.tolist() for value in constants[starts[task] : starts[task + 1]]]
        if self._pickled_plan.has_plain_constants:
            return found
        wires = [self._encode(value) for value in found]
        for wire in filter(is_segment, wires):
            held.maps(wire)
        return wires

    def references(self, tasks: Tasks) -> IntArray:
        """Return the tasks with the values that some tasks of one template take, task by task."""
        references, starts = self._plan.references, self._plan.reference_start
        if isinstance(tasks, range):
            return references[int(starts[tasks.start]) : int(starts[tasks.stop])]
        first = int(tasks[0])
        steps = np.arange(int(starts[first + 1]) - int(starts[first]))
        found: IntArray = references[(starts[tasks][:, None] + steps).ravel()]
        return found

    def _inputs(self, held: WorkerCache, wanted: IntArray, values: Sequence[Wire]) -> tuple[list[Wire], bytes]:
        """Return the values that some tasks take, each once, and by reference the place of its value."""
        if len(wanted) <= _FEW:
            return held.thin(wanted.tolist(), [values[task] for task in wanted.tolist()]), b""
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= len(wanted):  # dense, as in a stencil: a slice costs nothing per value
            span = values[low:high]
            if tuple not in set(map(type, span)):
                return list(span), (wanted - np.int32(low)).tobytes()
        distinct, places = distinct_places(wanted)
        tasks = distinct.tolist()
        return held.thin(tasks, [values[task] for task in tasks]), places.tobytes()


def _pickle_callable(plan: Plan, number: int, found: Dependencies) -> bytes:
    """Pickle a callable; a `Task` that its module has goes as itself, as that name is not its function's."""
    fn = plan.callables[number]
    shipped = fn.portable() if isinstance(fn, Task) else fn
    try:
        return dumps_by_value(shipped, found=found)
    except Exception as error:
        of_template = np.array([number in plan.callables_for(template) for template in range(len(plan.templates))])
        name = plan.name(int(np.argmax(of_template[plan.template_of])))
        if is_system_error(error):
            add_note(error, f"raised while the callable of task {name!r} was being pickled")
            raise
        raise UnpicklableCallable(
            f"task {name!r} has a callable that cannot be pickled: {culprit(shipped, error)}. "
            "Open files and connections, and make locks, inside the task.",
            task=name,
        ) from error


def _check(value: Any, plan: Plan, template: int | None, position: str, found: Dependencies, task: int = 0) -> None:
    """Raise if a value cannot be pickled; the output is discarded piece by piece."""
    try:
        dumps(value, [], found)
    except Exception as error:
        if template is not None:
            task = int(np.argmax(plan.template_of == template))
        name = plan.name(task)
        kind = type(value).__name__
        if is_system_error(error):
            add_note(error, f"raised while {position} of task {name!r}, a {kind}, was being pickled")
            raise
        raise UnpicklableArgument(
            f"task {name!r} got an argument that cannot be pickled: {position} is a {kind} "
            f"({culprit(value, error)}). Give what it is made from, and make it inside the task.",
            task=name,
            position=position,
        ) from error
