"""A lock that a run holds on its workflow in a store, so that two runs do not compute the same at once.

The file that is locked holds who has it. Whoever lets go removes it while it is still locked, so whoever gets a lock
looks whether the file is still the one of that name. The kernel lets go for whoever is killed; children that a killed
program had forked may hold on a little longer, which is waited for. So is, that long, whoever does not say who it is.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from io import FileIO
from pathlib import Path

from forgepar.errors import StoreBusy, StoreError
from forgepar.machine import start_time

_NAME_BYTES = 16
_UNKNOWN_SECONDS = (
    10.0  # for whoever has the lock and does not run here: children of a killed program, or another machine
)
_STEP_SECONDS = 0.02


class RunLock:
    """A lock on one workflow: what it is called, and which tasks it has.

    Args:
        folder: of the store's files.
        workflow: its name.
        fingerprints: of its tasks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = RunLock(Path(folder), "nightly", [b"load", b"join"])
        ...     lock.try_acquire(), RunLock(Path(folder), "nightly", [b"load", b"join"]).try_acquire()
        ...     lock.release()
        (True, False)
    """

    def __init__(self, folder: Path, workflow: str, fingerprints: Iterable[bytes | None]) -> None:
        told = blake2b(workflow.encode("utf-8", "surrogatepass"), digest_size=_NAME_BYTES)
        for fingerprint in fingerprints:
            told.update(fingerprint or b"-")
        self._workflow = workflow
        self._path = folder / f"{told.hexdigest()}.lock"
        self._file: FileIO | None = None

    def acquire(self, *, wait: bool) -> None:
        """Get the lock.

        Args:
            wait: whether to wait for another run to end that has it.

        Raises:
            StoreBusy: another run has it, and is not waited for.
        """
        give_up_at = time.monotonic() + _UNKNOWN_SECONDS
        while not self.try_acquire():
            if wait:
                self._wait()
                continue
            owner = self._owner()
            if owner is not None or time.monotonic() >= give_up_at:
                who = "a process of another machine or container" if owner is None else f"process {owner}"
                raise StoreBusy(
                    f"workflow {self._workflow!r} is being run with this store by {who}. Wait for it to end "
                    "(Resume(wait=True), --wait), or run it with another store.",
                    path=str(self._path),
                )
            time.sleep(_STEP_SECONDS)

    def try_acquire(self) -> bool:
        """Get the lock if nobody has it; tell whether that was so."""
        return self._try(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Let go, if it is held."""
        if (file := self._file) is None or file.closed:
            return
        with file:
            if self._is_there(file):
                with suppress(OSError):  # of a folder that may not be written any more
                    self._path.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)  # forked workers have the descriptor, too

    def _wait(self) -> None:
        """Wait until nobody has the lock, without taking it."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self._path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            finally:
                os.close(descriptor)

    def _try(self, how: int) -> bool:
        while True:
            file = self._opened()
            try:
                fcntl.flock(file, how)
                if self._is_there(file):  # else who had it has just removed it
                    file.truncate(0)
                    os.pwrite(file.fileno(), f"{os.getpid()} {start_time(os.getpid())}".encode(), 0)
                    self._file = file
                    return True
            except BlockingIOError:
                return False
            finally:
                if self._file is not file:
                    file.close()

    def _opened(self) -> FileIO:
        try:
            return FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        except OSError as error:
            raise StoreError(
                f"the lock {str(self._path)!r} cannot be made ({error.strerror}). Give a store that you may write.",
                path=str(self._path),
            ) from error

    def _is_there(self, file: FileIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except OSError:
            return False

    def _owner(self) -> int | None:
        """Return the process that has the lock; None if it does not run any more, or has just let go."""
        try:
            pid, _, started = self._path.read_text().partition(" ")
        except FileNotFoundError:
            return None
        return int(pid) if pid.isdecimal() and started == start_time(int(pid)) else None


def remove_stale(folder: Path) -> None:
    """Remove the locks in a folder that killed runs left, and that nobody holds."""
    for path in folder.glob("*.lock"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    path.unlink()
            finally:
                os.close(descriptor)
