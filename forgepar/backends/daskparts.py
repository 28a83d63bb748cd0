"""Large values on a Dask cluster: they stay with the workers, as futures; what travels through the caller names them.

    batch task ──> Parts: the large values of a batch, each a list of buffers    its future: held by ClusterArena
                     └──pick──> Parts: one very large value                      a future of its own, so that it alone
                                                                                 moves and is let go of
    ClusterArena.write ──keep──> Parts: a constant of the caller's               the same

A value's name is that of a segment (see segment.py), of the kind "w": behind the size come the batch that made it and
its place there. So the dispatcher forwards, frees and weighs it like one, and never has its bytes. What stands in
Dask's graph can be computed again: where the last worker that had a value is lost, Dask runs its batch anew.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forgepar.errors import RemoteError
from forgepar.values.arena import NO_BUDGET, Arena, Place, Usage
from forgepar.values.codec import BLOB_LIMIT, SHORT, Wire, is_segment
from forgepar.values.segment import Segment, name_of, names_of, segment_bytes, size_of

OWN_FUTURE = 256 << 10  # bytes; a larger value becomes a future of its own, at the price of one task of Dask's, 1 ms
IN_GRAPH = 64 << 20  # bytes; a larger constant is no part of the graph, as the scheduler would have to hold it
_COPIES = 2  # of such a constant: what is not in the graph is gone with the last worker that has it
_READ_BYTES = 64 << 20  # of values read that are kept for the next look, as those of a batch come together
_KIND, _CALLABLE = "wn", "cn"
_CONSTANT = 0  # constants have the number of no batch


class Parts:
    """Values taken apart into buffers, by place; between workers the buffers travel without a copy.

    Args:
        values: by place, the pickle and the buffers of each.
    """

    def __init__(self, values: Mapping[int, Sequence[Any]]) -> None:
        self.values = dict(values)

    def __getitem__(self, place: int) -> list[memoryview]:
        try:
            return [memoryview(part).toreadonly() for part in self.values[place]]
        except KeyError:
            raise RemoteError("a value was lost with its worker, and its batch, run again, did not make it") from None

    def __len__(self) -> int:
        return len(self.values)

    def __sizeof__(self) -> int:
        return 64 + sum(memoryview(part).nbytes for parts in self.values.values() for part in parts)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        apart: Any = pickle.PickleBuffer if int(protocol) >= 5 else bytes
        return Parts, ({place: list(map(apart, parts)) for place, parts in self.values.items()},)


def pick(parts: Parts, place: int) -> Parts:
    """Return one value of several; a task of Dask's."""
    return Parts({place: parts.values[place]} if place in parts.values else {})


def keep(parts: Parts) -> Parts:
    """Return what the graph holds; a task of Dask's."""
    return parts


def source_of(name: str) -> tuple[int, int]:
    """Tell by its name which batch made a value, and at what place there it is."""
    _, _, batch, place = name.split("-")
    return int(batch), int(place)


class SiteArena(Arena):
    """What stands for an arena on a Dask worker: the values that the running batch takes, and those it makes.

    Args:
        folder: where tasks get scratch folders.
    """

    blob_limit = SHORT  # what travels through the caller is no larger

    def __init__(self, folder: str) -> None:
        self.place = Place(folder, folder, NO_BUDGET, 1)
        self._batch = 0
        self._inputs: Mapping[str, Parts] = {}
        self._made: dict[int, list[bytes]] = {}

    def begin(self, batch: int, inputs: Mapping[str, Parts]) -> None:
        """Begin a batch.

        Args:
            batch: its number.
            inputs: the values it takes, by their batch's number or by their own name.
        """
        self._batch, self._inputs, self._made = batch, inputs, {}

    def finish(self) -> Parts:
        """Return what the batch made, and let go of all."""
        made = Parts(self._made)
        self._inputs, self._made = {}, {}
        return made

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Keep a value; a copy, as its task may go on to change what it returned."""
        place = len(self._made)
        copies = [bytes(part) for part in parts if not isinstance(part, tuple)]
        self._made[place] = copies
        lengths = list(map(len, copies))
        return (name_of(_KIND, sum(lengths), self._batch, place), *lengths)

    def read(self, segment: Segment) -> list[memoryview]:
        """Return the buffers of a value that the batch takes."""
        name = str(segment[0])
        batch, place = source_of(name)
        return self._inputs[name if name in self._inputs else str(batch)][place]

    def granted(self, buffer: memoryview) -> None:
        """Tell that a buffer lies nowhere but in the process's own memory."""

    def give(self, segment: Segment) -> None:
        """Do nothing: nothing was granted."""

    def take_back(self) -> None:
        """Do nothing, for the same reason."""

    def drop(self, names: Sequence[str]) -> None:
        """Do nothing: nothing stays mapped."""


class _Made:
    """The large values of one batch, while any of them is needed.

    Attributes:
        future: of the whole batch; None once every value that is left has one of its own.
        own: futures of single values, by place.
        left: the places of the values that are still needed.
    """

    __slots__ = ("future", "left", "own")

    def __init__(self, future: Any, left: set[int]) -> None:
        self.future = future
        self.own: dict[int, Any] = {}
        self.left = left


class ClusterArena(Arena):
    """What stands for an arena at the caller: futures, by the names of values.

    `read` fetches a value's parts: its pickle, then the buffers beside it, as those of a segment.

    Args:
        client: a `distributed.Client`.
        token: names this arena's keys in Dask.
    """

    blob_limit = BLOB_LIMIT  # constants of less are in the message: one task of Dask's for each would cost more

    def __init__(self, client: Any, token: str) -> None:
        super().__init__(Place("(on the cluster)", "(on the cluster)", NO_BUDGET, 1))
        self._client = client
        self._token = token
        self._made: dict[int, _Made] = {}
        self._n_constants = 0
        self._constants: dict[str, Any] = {}
        self._read: OrderedDict[str, Parts] = OrderedDict()
        self._held = self._peak = 0

    # What batches make and take

    def made(self, batch: int, future: Any, values: Iterable[Wire]) -> bool:
        """Take in which large values a batch made; tell whether there are any."""
        segments = [value for value in values if is_segment(value)]
        if not segments:
            return False
        places = [source_of(str(segment[0]))[1] for segment in segments]
        made = self._made[batch] = _Made(future, set(places))
        if len(places) > 1:
            for segment, place in zip(segments, places, strict=True):
                if segment_bytes(segment) >= OWN_FUTURE:
                    key = f"forgepar-value-{self._token}-{batch}-{place}"
                    made.own[place] = self._client.submit(pick, future, place, key=key, pure=False)
            self._forget_whole(made)
        self._hold(sum(size_of(str(segment[0])) for segment in segments))
        return True

    def sources(self, segments: Iterable[Segment]) -> dict[str, Any]:
        """Return the futures that a batch must wait for which takes these values, by what `SiteArena.begin` takes."""
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

    # What an arena does

    def write(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]]) -> Segment:
        """Put a constant on the cluster."""
        return self._put(parts, _KIND)

    def write_callable(self, pickled: bytes) -> Segment:
        """Put a large callable on the cluster; it counts as no value."""
        return self._put([pickled], _CALLABLE)

    def _put(self, parts: Sequence[bytes | memoryview | tuple[str, int, int]], kind: str) -> Segment:
        own = [part for part in parts if not isinstance(part, tuple)]
        lengths = [memoryview(part).nbytes for part in own]
        place = self._n_constants
        self._n_constants += 1
        name = name_of(kind, sum(lengths), _CONSTANT, place)
        key, constant = f"forgepar-constant-{self._token}-{place}", Parts({place: own})
        if sum(lengths) <= IN_GRAPH:
            import dask

            with dask.config.set({"distributed.admin.large-graph-warning-threshold": 2 * IN_GRAPH}):
                self._constants[name] = self._client.submit(keep, constant, key=key, pure=False)
        else:
            self._constants[name] = self._client.scatter({key: constant}, broadcast=_COPIES)[key]
        self._hold(sum(lengths))
        return (name, *lengths)

    def expect(self, segments: Sequence[Segment]) -> None:
        """Fetch what comes first of values that are about to be read, in one go."""
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
        """Fetch a value's parts.

        Raises:
            Exception: what Dask raises where the value cannot be had any more.
        """
        ((source, future),) = self.sources([segment]).items()
        if source not in self._read:
            self._read[source] = self._client.gather(future)
            while len(self._read) > 1 and sum(map(Parts.__sizeof__, self._read.values())) > _READ_BYTES:
                self._read.popitem(last=False)
        return self._read[source][source_of(str(segment[0]))[1]]

    def free(self, segment: Segment, *, keep: bool = True) -> None:  # noqa: ARG002
        """Let go of a value; Dask frees what nobody else is to take."""
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

    def _forget_whole(self, made: _Made) -> None:
        if made.left <= made.own.keys():
            made.future = None

    def _hold(self, n_bytes: int) -> None:
        self._held += n_bytes
        self._peak = max(self._peak, self._held)

    def free_strays(self, pid: int, keep: frozenset[str]) -> None:
        """Do nothing: what a lost worker had begun is gone with it."""

    def close(self) -> None:
        """Let go of everything."""
        self._made.clear()
        self._constants.clear()
        self._read.clear()
        self._held = 0

    def names(self) -> list[str]:
        """List what holds values: batches and constants."""
        return sorted([*map(str, self._made), *(name for name in self._constants if name.startswith(_KIND))])

    def reset_peak(self) -> None:
        self._peak = self._held

    @property
    def bytes_held(self) -> int:
        """What values take on the workers, copies left out."""
        return self._held

    def usage(self) -> Usage:
        n_constants = sum(name.startswith(_KIND) for name in self._constants)
        n_values = sum(len(made.left) for made in self._made.values()) + n_constants
        return Usage(n_values, self._held, 0, self._peak, 0, 0)
