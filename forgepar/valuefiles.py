"""Large values of a run store: files named by their content, which are there whole or not at all.

    parts ──> BLAKE2b ──> <folder>/ab/abcdef...    written under another name, synced, renamed

Two values of the same content are one file. What is read is held against its name.
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
_MOST_WAITING = 256 << 20  # bytes of values that wait to be written; beyond, the run waits for the disk
_MOST_THREADS = 4
_WAITING_A_THREAD = 4  # values
_TEMPORARY = ".writing-"


class Written(NamedTuple):
    """A value that is in a file, or why it is not.

    Attributes:
        key: what it was handed over with.
        name: digest of its content.
        lengths: of its parts, bytes.
        error: what went wrong.
    """

    key: int
    name: bytes
    lengths: tuple[int, ...]
    error: Exception | None = None


class ValueFiles:
    """The files of a store.

    Args:
        folder: where they are; it is made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: bytes) -> Path:
        """Return where a value of this digest is."""
        text = name.hex()
        return self.folder / text[:2] / text

    def write(self, parts: Sequence[memoryview]) -> bytes:
        """Write a value and return the digest of its content; when this returns it survives a power cut.

        Raises:
            OSError: it cannot be written.
        """
        digest = blake2b(digest_size=NAME_BYTES)
        for part in parts:
            digest.update(part)
        name = digest.digest()
        path = self.path(name)
        if self._is_whole(name, tuple(map(len, parts))):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # whoever cleans up sees that it is in use
                return name
        is_new = not path.parent.is_dir()
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # Not named by process: one in another container may have the same number, or had it when it was killed.
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
        """Tell whether a value is there already, and undamaged."""
        if not self.path(name).exists():
            return False
        try:
            self.read(name, lengths)
        except StoreError:
            return False
        return True

    def read(self, name: bytes, lengths: Sequence[int]) -> list[memoryview]:
        """Map a value and return its parts, held against its digest.

        Raises:
            StoreError: it is missing, cut short or altered.
        """
        path = self.path(name)
        whole = self._mapped(path)
        if len(whole) != sum(lengths):
            raise StoreError(f"the file {path} has {len(whole)} bytes in place of {sum(lengths)}", path=str(path))
        if blake2b(whole, digest_size=NAME_BYTES).digest() != name:
            raise StoreError(f"the file {path} was altered: its content is not what its name says", path=str(path))
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
        """Return the size in bytes and the time of the last use of each value that is there, by digest."""
        found = {}
        for path in self.folder.glob("??/*"):
            if not path.name.startswith(_TEMPORARY):
                with contextlib.suppress(FileNotFoundError, ValueError):
                    stat = path.stat()
                    found[bytes.fromhex(path.name)] = (stat.st_size, stat.st_mtime)
        return found

    def remove(self, name: bytes) -> None:
        """Remove a value."""
        self.path(name).unlink(missing_ok=True)

    def remove_torn(self, before: float) -> None:
        """Remove what writers that died before some time (seconds since the epoch) did not finish."""
        for path in self.folder.glob(f"??/{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()


class FileWriter:
    """Threads that write values to files: their time goes into system calls and hashing, without the interpreter.

    To sync a file takes a disk some milliseconds, and hardly more for several at once: the more wait, the more threads.

    Args:
        files: where to.
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
        """Whether something was put in that did not come out yet."""
        return self._n_waiting > 0

    def put(self, key: int, parts: Sequence[memoryview]) -> None:
        """Hand over a value; where too much waits already, wait for the disk first."""
        if len(self._threads) < min(_MOST_THREADS, 1 + self._tasks.qsize() // _WAITING_A_THREAD):
            thread = threading.Thread(target=self._run, name="forgepar-store", daemon=True)
            with contextlib.suppress(RuntimeError):  # there are no more threads
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
        """Return what was written since the last time, in the order in which it was put in."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        self._n_waiting -= len(found)
        return [written for _, written in sorted(found, key=lambda pair: pair[0])]

    def close(self) -> None:
        """Write all that waits, and end the threads."""
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
            except Exception as error:  # whatever it is: who waits for room would wait for ever
                written = Written(key, b"", lengths, error)
            self._done.append((number, written))
            del task, parts  # the memory that they are in may be used again
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
