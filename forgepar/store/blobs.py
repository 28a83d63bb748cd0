"""Large values of a run store: files that are named by the digest of their content.

    parts ──> BLAKE2b ──> <folder>/ab/abcdef...    written under a temporary name, synced, renamed

Equal values share one file, and a file is complete or does not exist. Reading checks the content against the name.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from forgepar.errors import StoreError

NAME_BYTES = 32  # of the digest that names a file
_MOST_WAITING = 256 << 20  # bytes of values that wait to be written; above this, the run waits for the disk
_MOST_THREADS = 4
_WAITING_PER_THREAD = 4  # values
_TEMPORARY = ".writing-"


class Written(NamedTuple):
    """The result of writing a value to a file.

    Attributes:
        key: that `FileWriter.put` got.
        name: digest of the content.
        lengths: of its parts, bytes.
        error: why it was not written; None: it was.
    """

    key: int
    name: bytes
    lengths: tuple[int, ...]
    error: Exception | None = None


class ValueFiles:
    """The files of a store's large values.

    Args:
        folder: that has them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: bytes) -> Path:
        """Return the path of the value with this digest."""
        text = name.hex()
        return self.folder / text[:2] / text

    def write(self, parts: Sequence[memoryview]) -> bytes:
        """Write a value and sync it; return the digest of its content.

        Raises:
            OSError: the file cannot be written.
        """
        digest = blake2b(digest_size=NAME_BYTES)
        for part in parts:
            digest.update(part)
        name = digest.digest()
        path = self.path(name)
        if self._is_whole(name, tuple(map(len, parts))):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # shows garbage collection that it is in use
                return name
        is_new = not path.parent.is_dir()
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # Not named by pid: a process in another container, or a killed one, may have the same.
        temporary = path.parent / f"{_TEMPORARY}{os.urandom(8).hex()}"
        try:
            _write(temporary, parts)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        if is_new:
            _sync_folder(self.folder)
        return name

    def _is_whole(self, name: bytes, lengths: Sequence[int]) -> bool:
        """Return whether the file of a value exists and is undamaged."""
        if not self.path(name).exists():
            return False
        try:
            self.read(name, lengths)
        except StoreError:
            return False
        return True

    def read(self, name: bytes, lengths: Sequence[int]) -> list[memoryview]:
        """Map the file of a value, check its digest, and return its parts.

        Raises:
            StoreError: the file is missing, truncated or altered.
        """
        path = self.path(name)
        whole = self._mapped(path)
        if len(whole) != sum(lengths):
            raise StoreError(f"the file {path} has {len(whole)} bytes instead of {sum(lengths)}", path=str(path))
        if blake2b(whole, digest_size=NAME_BYTES).digest() != name:
            raise StoreError(f"the file {path} was altered: its content does not match its name", path=str(path))
        ends = list(itertools.accumulate(lengths, initial=0))
        return [whole[begin:end] for begin, end in itertools.pairwise(ends)]

    def _mapped(self, path: Path) -> memoryview:
        try:
            with path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise StoreError(f"the file {path} cannot be read ({error.strerror})", path=str(path)) from None

    def sizes(self) -> dict[bytes, tuple[int, float]]:
        """Return the size in bytes and the time of the last use of each value, by digest."""
        found = {}
        for path in self.folder.glob("??/*"):
            if not path.name.startswith(_TEMPORARY):
                with contextlib.suppress(FileNotFoundError, ValueError):
                    stat = path.stat()
                    found[bytes.fromhex(path.name)] = (stat.st_size, stat.st_mtime)
        return found

    def remove(self, name: bytes) -> None:
        """Remove the file of a value."""
        self.path(name).unlink(missing_ok=True)

    def remove_partial(self, before: float) -> None:
        """Remove temporary files that were last written before a time, seconds since the epoch."""
        for path in self.folder.glob(f"??/{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()


class FileWriter:
    """Threads that write values to files; most of their time is spent in hashing and system calls, without the GIL.

    A disk takes some milliseconds to sync one file, and little more to sync several at once. So the number of threads
    grows with the number of values that wait.

    Args:
        files: to write to.
    """

    def __init__(self, files: ValueFiles) -> None:
        self._files = files
        self._tasks: queue.SimpleQueue[tuple[int, int, Sequence[memoryview]] | None] = queue.SimpleQueue()
        self._done: deque[tuple[int, Written]] = deque()
        self._room = threading.Condition()
        self._n_bytes = self._n_put = self._n_waiting = 0
        self._threads: list[threading.Thread] = []

    @property
    def is_busy(self) -> bool:
        """Whether `done` has not yet returned all values that were put."""
        return self._n_waiting > 0

    def put(self, key: int, parts: Sequence[memoryview]) -> None:
        """Queue a value for writing; if too many bytes are queued, wait for the disk first.

        Args:
            key: to find the value by in the result.
            parts: of the value.
        """
        if len(self._threads) < min(_MOST_THREADS, 1 + self._tasks.qsize() // _WAITING_PER_THREAD):
            thread = threading.Thread(target=self._run, name="forgepar-store", daemon=True)
            with contextlib.suppress(RuntimeError):  # the system cannot start another thread
                thread.start()
                self._threads.append(thread)
        n_bytes = sum(map(len, parts))
        with self._room:
            self._room.wait_for(lambda: self._n_bytes == 0 or self._n_bytes + n_bytes <= _MOST_WAITING)
            self._n_bytes += n_bytes
        self._n_waiting += 1
        self._n_put += 1
        self._tasks.put((self._n_put, key, parts))
        if not self._threads:
            self._tasks.put(None)
            self._run()

    def done(self) -> list[Written]:
        """Return the values written since the last call, in the order in which they were put."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        self._n_waiting -= len(found)
        return [written for _, written in sorted(found, key=lambda pair: pair[0])]

    def close(self) -> None:
        """Write all queued values, then end the threads."""
        for _ in self._threads:
            self._tasks.put(None)
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            number, key, parts = task
            lengths = tuple(map(len, parts))
            try:
                written = Written(key, self._files.write(parts), lengths)
            except Exception as error:  # of any kind: otherwise `put` would wait without end
                written = Written(key, b"", lengths, error)
            self._done.append((number, written))
            del task, parts  # so that their memory can be reused
            with self._room:
                self._n_bytes -= sum(lengths)
                self._room.notify()


def _write(path: Path, parts: Sequence[memoryview]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for part in parts:
            left = memoryview(part)
            while len(left):
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
