"""Large values on a Dask cluster: they stay on the workers, as futures, and messages to the caller only name them.

    Dask task of a batch ──> ValueParts: its large values         its future: held by ClusterArena
                               └──pick──> ValueParts: one value   a future of its own, so that a very large value moves
                                                                  and is released alone
    ClusterArena.write ──keep──> ValueParts: a constant           likewise

The name of a value is that of a segment (see `values.segments`) of kind "w". After the size come the number of the
batch that made it and its place there. So the dispatcher forwards, frees and weighs it like a segment, without its
bytes. Values in Dask's graph can be computed again: if the last worker that had one is lost, Dask reruns its batch.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forgepar.errors import RemoteError
from forgepar.values.arena import NO_BUDGET, Arena, ArenaLocation, ArenaUsage
from forgepar.values.codec import BLOB_LIMIT, SHORT
from forgepar.values.segments import Segment, name_of, names_of, segment_bytes, size_of

OWN_FUTURE = 256 << 10  # bytes; a larger value gets a future of its own, which costs one Dask task, 1 ms
IN_GRAPH = 64 << 20  # bytes; a larger constant is not part of the graph, as the scheduler would have to store it
_COPIES = 2  # of a constant outside the graph: it is lost with the last worker that has it
_READ_BYTES = 64 << 20  # of values read that are kept for the next call, as values of a batch are read together
_LARGE_CALLABLE = 16 * 1024  # bytes; a callable with a longer pickle is sent once to each worker, not in each batch
_KIND, _CALLABLE = "wn", "cn"
_CONSTANT = 0  # constants have this in place of the number of a batch


class ValueParts:
    """Pickles and buffers of values, by place; between workers the buffers travel without a copy.

    Args:
        values: by place, the pickle of a value and its buffers.
    """

    def __init__(self, values: Mapping[int, Sequence[Any]]) -> None:
        self.values = dict(values)

    def __getitem__(self, place: int) -> list[memoryview]:
        try:
            return [memoryview(part).toreadonly() for part in self.values[place]]
        except KeyError:
            raise RemoteError("A value was lost with its worker, and the rerun of its batch did not make it.") from None

    def __len__(self) -> int:
        return len(self.values)

    def __sizeof__(self) -> int:
        return 64 + sum(memoryview(part).nbytes for parts in self.values.values() for part in parts)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        apart: Any = pickle.PickleBuffer if int(protocol) >= 5 else bytes
        return ValueParts, ({place: list(map(apart, parts)) for place, parts in self.values.items()},)


def pick(parts: ValueParts, place: int) -> ValueParts:
    """Return one value of several; a Dask task."""
    return ValueParts({place: parts.values[place]} if place in parts.values else {})


def keep(parts: ValueParts) -> ValueParts:
    """Return a constant of the graph; a Dask task."""
    return parts


def source_of(name: str) -> tuple[int, int]:
    """Return the batch that made a value, and its place there, from its name."""
    _, _, batch, place = name.split("-")
    return int(batch), int(place)


class TaskArena(Arena):
    """The arena of a Dask worker: inputs and large results of the batch that runs.

    Args:
        folder: where tasks get scratch folders.
    """

    blob_limit = SHORT  # what travels through the caller is no larger

    def __init__(self, folder: str) -> None:
        self.place = ArenaLocation(folder, folder, NO_BUDGET, 1)
        self._batch = 0
        self._inputs: Mapping[str, ValueParts] = {}
        self._made: dict[int, list[bytes]] = {}

    def begin(self, batch: int, inputs: Mapping[str, ValueParts]) -> None:
        """Begin a batch.

        Args:
            batch: its number.
            inputs: its large inputs, by the number of their batch or by their own name.
        """
        self._batch, self._inputs, self._made = batch, inputs, {}

    def finish(self) -> ValueParts:
        """Return the large values that the batch made, and release all values."""
        made = ValueParts(self._made)
        self._inputs, self._made = {}, {}
        return made

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Store a copy of a value: its task may change later what it returned."""
        place = len(self._made)
        copies = [bytes(part) for part in parts if not isinstance(part, tuple)]
        self._made[place] = copies
        lengths = list(map(len, copies))
        return (name_of(_KIND, sum(lengths), self._batch, place), *lengths)

    def read(self, segment: Segment) -> list[memoryview]:
        """Return the parts of an input of the batch."""
        name = str(segment[0])
        batch, place = source_of(name)
        return self._inputs[name if name in self._inputs else str(batch)][place]

    def granted(self, buffer: memoryview) -> None:
        """Return None: the arena grants no buffers."""

    def give(self, segment: Segment) -> None:
        """Do nothing: the arena grants no buffers."""

    def take_back(self) -> None:
        """Do nothing: the arena grants no buffers."""

    def drop(self, names: Sequence[str]) -> None:
        """Do nothing: no segment is mapped."""


class _BatchValues:
    """The large values of one batch, as long as any of them is needed.

    Attributes:
        future: future of the whole batch; None once each value that is left has its own.
        own: futures of single values, by place.
        left: places of the values that are still needed.
    """

    __slots__ = ("future", "left", "own")

    def __init__(self, future: Any, left: set[int]) -> None:
        self.future = future
        self.own: dict[int, Any] = {}
        self.left = left


class ClusterArena(Arena):
    """The arena of the caller: futures, by the names of values.

    `read` fetches the parts of a value: its pickle, then its buffers, as for a segment.

    Args:
        client: a `distributed.Client`.
        token: part of the keys of this arena in Dask.
    """

    blob_limit = BLOB_LIMIT  # smaller constants are in the message: a Dask task for each would cost more

    def __init__(self, client: Any, token: str) -> None:
        super().__init__(ArenaLocation("(on the cluster)", "(on the cluster)", NO_BUDGET, 1))
        self._client = client
        self._token = token
        self._made: dict[int, _BatchValues] = {}
        self._n_constants = 0
        self._constants: dict[str, Any] = {}
        self._callables: dict[tuple[int, int], Segment] = {}  # by run and number
        self._read: OrderedDict[str, ValueParts] = OrderedDict()
        self._held = self._peak = 0

    # Results and inputs of batches

    def made(self, batch: int, future: Any, segments: Sequence[Segment]) -> bool:
        """Note the large values in the results of a batch; return whether there are any."""
        if not segments:
            return False
        places = [source_of(str(segment[0]))[1] for segment in segments]
        made = self._made[batch] = _BatchValues(future, set(places))
        if len(places) > 1:
            for segment, place in zip(segments, places, strict=True):
                if segment_bytes(segment) >= OWN_FUTURE:
                    key = f"forgepar-value-{self._token}-{batch}-{place}"
                    made.own[place] = self._client.submit(pick, future, place, key=key, pure=False)
            self._forget_whole(made)
        self._hold(sum(size_of(str(segment[0])) for segment in segments))
        return True

    def sources(self, segments: Iterable[Segment]) -> dict[str, Any]:
        """Return the futures of the inputs of a batch, under the names that `TaskArena.begin` takes."""
        found = {}
        for segment in segments:
            name = str(segment[0])
            batch, place = source_of(name)
            if name in self._constants:
                found[name] = self._constants[name]
            elif place in self._made[batch].own:
                found[name] = self._made[batch].own[place]
            else:
                found[str(batch)] = self._made[batch].future
        return found

    # The methods of an arena

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Store a constant on the cluster."""
        return self._put(parts, _KIND)

    def place_callable(self, run: int, number: int, pickled: bytes) -> bytes | Segment:
        """Store a large callable on the cluster, once per run; return a small one unchanged."""
        if len(pickled) <= _LARGE_CALLABLE:
            return pickled
        for old in [key for key in self._callables if key[0] != run]:
            self.free(self._callables.pop(old))
        if (run, number) not in self._callables:
            self._callables[run, number] = self._put([pickled], _CALLABLE)
        return self._callables[run, number]

    def _put(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]], kind: str) -> Segment:
        own = [part for part in parts if not isinstance(part, tuple)]
        lengths = [memoryview(part).nbytes for part in own]
        place = self._n_constants
        self._n_constants += 1
        name = name_of(kind, sum(lengths), _CONSTANT, place)
        key, constant = f"forgepar-constant-{self._token}-{place}", ValueParts({place: own})
        if sum(lengths) <= IN_GRAPH:
            import dask

            with dask.config.set({"distributed.admin.large-graph-warning-threshold": 2 * IN_GRAPH}):
                self._constants[name] = self._client.submit(keep, constant, key=key, pure=False)
        else:
            self._constants[name] = self._client.scatter({key: constant}, broadcast=_COPIES)[key]
        self._hold(sum(lengths))
        return (name, *lengths)

    def expect(self, segments: Sequence[Segment]) -> None:
        """Fetch the first of the values that are read next, up to 64 MiB, in one request."""
        total, first = 0, []
        for segment in segments:
            total += segment_bytes(segment)
            if total > _READ_BYTES:
                break
            first.append(segment)
        sources = self.sources(first)
        if len(sources) > 1:
            self._read.update(zip(sources, self._client.gather(list(sources.values())), strict=True))

    def read(self, segment: Segment) -> list[memoryview]:
        """Fetch the parts of a value.

        Raises:
            Exception: the value is lost; it is what Dask raises.
        """
        ((source, future),) = self.sources([segment]).items()
        if source not in self._read:
            self._read[source] = self._client.gather(future)
            while len(self._read) > 1 and sum(map(ValueParts.__sizeof__, self._read.values())) > _READ_BYTES:
                self._read.popitem(last=False)
        return self._read[source][source_of(str(segment[0]))[1]]

    def free(self, segment: Segment, *, keep: bool = True) -> None:  # noqa: ARG002
        """Release a value; Dask frees it when no task needs it."""
        for name in names_of(segment):
            self._free(name)

    def _free(self, name: str, *, keep: bool = True) -> None:  # noqa: ARG002
        batch, place = source_of(name)
        self._read.pop(name, None)
        if self._constants.pop(name, None) is not None:
            self._hold(-size_of(name))
        elif batch in self._made and place in self._made[batch].left:
            made = self._made[batch]
            made.left.discard(place)
            made.own.pop(place, None)
            self._hold(-size_of(name))
            self._forget_whole(made)
            if not made.left:
                del self._made[batch]
                self._read.pop(str(batch), None)

    def _forget_whole(self, made: _BatchValues) -> None:
        if made.left <= made.own.keys():
            made.future = None

    def _hold(self, n_bytes: int) -> None:
        self._held += n_bytes
        self._peak = max(self._peak, self._held)

    def free_strays(self, pid: int, keep: frozenset[str]) -> None:
        """Do nothing: the values of a lost worker were in its own memory."""

    def close(self) -> None:
        """Release all values."""
        self._made.clear()
        self._constants.clear()
        self._callables.clear()
        self._read.clear()
        self._held = 0

    def names(self) -> list[str]:
        """Return the batches and constants that have values, by name."""
        return sorted([*map(str, self._made), *(name for name in self._constants if name.startswith(_KIND))])

    def reset_peak(self) -> None:
        self._peak = self._held

    @property
    def bytes_held(self) -> int:
        """Bytes of all values, without copies on several workers."""
        return self._held

    def usage(self) -> ArenaUsage:
        n_constants = sum(name.startswith(_KIND) for name in self._constants)
        n_values = sum(len(made.left) for made in self._made.values()) + n_constants
        return ArenaUsage(n_values, self._held, 0, self._peak, 0, 0)
