"""The values that the result of a run keeps, unpickled on first access."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, dumps, is_segment
from forgepar.values.pickling import loads_own


class Outputs:
    """The values that a result keeps, serialized; each is decoded on first access.

    Args:
        values: the serialized value of every task.
        kept: bool, which of them to keep.
        arena: the shared memory with the large ones; they are mapped here, so that they outlive it.
    """

    def __init__(self, values: list[Wire], kept: NDArray[np.bool_], arena: Arena) -> None:
        self._kept = kept
        self._decoded: dict[int, Any] = {}
        large = [task for task in np.flatnonzero(kept).tolist() if is_segment(values[task])]
        arena.expect([values[task] for task in large])
        self._mapped = {task: arena.read(values[task]) for task in large}
        all_kept = bool(kept.all())
        self._values = values if all_kept else [v if k else None for v, k in zip(values, kept.tolist(), strict=True)]

    def __contains__(self, task: int) -> bool:
        return bool(self._kept[task])

    def __getitem__(self, task: int) -> Any:
        value = self._values[task]
        if type(value) is not tuple:
            return value
        if task not in self._decoded:
            stream, *buffers = self._mapped.get(task) or value
            self._decoded[task] = pickle.loads(stream, buffers=buffers)
        return self._decoded[task]

    def __getstate__(self) -> dict[str, Any]:
        """Return the values as pickles that need no arena; one that was accessed is pickled in its current state."""
        held = {task: [bytes(part) for part in parts] for task, parts in self._mapped.items()}
        for task, value in self._decoded.items():
            try:
                held[task] = _pickled(value)
            except Exception:
                if task not in held and is_segment(self._values[task]):
                    raise  # it was detached, so there is no other copy
        return {"_kept": self._kept, "_values": self._values, "_mapped": held, "_decoded": {}}

    def detach(self) -> None:
        """Decode all large values again, into their own memory, which is writable."""
        for task, (stream, *buffers) in self._mapped.items():
            self._decoded[task] = loads_own(stream, buffers)
        self._mapped.clear()


def _pickled(value: Any) -> list[Any]:
    """Return the pickle of a value, followed by its out-of-band buffers; writable ones stay writable."""
    buffers: list[pickle.PickleBuffer] = []
    stream = dumps(value, buffers)
    return [stream, *((bytes if raw.readonly else bytearray)(raw) for raw in (buffer.raw() for buffer in buffers))]
