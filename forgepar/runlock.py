"""A lock that a run holds on its workflow in a store, so that two runs do not compute the same at once.

The file that is locked holds who has it. Whoever lets go removes it while it is still locked, so whoever gets a lock
looks whether the file is still the one of that name. The kernel lets go for whoever is killed. Forked children close
their copy of the lock; one that C code forked may hold on a little longer, which is waited for. So is, that long,
whoever cannot be seen from here.

Beside it lies a file for each run that goes, `life_file`, locked while its process lives: pids say nothing to others.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from forgepar.errors import StoreBusy, StoreError
from forgepar.forking import close_alone, hold_alone, no_forks
from forgepar.lifelocks import is_same, taking
from forgepar.machine import kernel_id, start_time

_NAME_BYTES = 16
_UNKNOWN_SECONDS = 10.0  # for whoever has the lock and is not seen here
_STEP_SECONDS = 0.02
_PID_NAMESPACE = "/proc/self/ns/pid"
_MOST_BYTES = 1024  # of a note


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
        self._descriptor: int | None = None
        self._owner = 0

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
            pid, who = self._holder()
            if pid is not None or time.monotonic() >= give_up_at:
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
        """Let go, if it is held by this very process: a forked child has no part in what its parent holds."""
        if (descriptor := self._descriptor) is None or self._owner != os.getpid():
            return
        self._descriptor = None
        if is_same(descriptor, str(self._path)):
            with suppress(OSError):  # of a folder that may not be written any more
                self._path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # children that C code forked have the descriptor, too
        close_alone(descriptor)

    def _wait(self) -> None:
        """Wait until nobody has the lock, without taking it."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self._path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            finally:
                os.close(descriptor)

    def _try(self, how: int) -> bool:
        with no_forks:  # a child would have a lock that nobody closes in it
            while True:
                descriptor = self._opened()
                try:
                    fcntl.flock(descriptor, how)
                    if is_same(descriptor, str(self._path)):  # else who had it has just removed it
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, _note().encode(), 0)
                        self._descriptor, self._owner = hold_alone(descriptor), os.getpid()
                        return True
                except BlockingIOError:
                    return False
                finally:
                    if self._descriptor != descriptor:
                        os.close(descriptor)

    def _opened(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"the lock {str(self._path)!r} cannot be made ({error.strerror}). Give a store that you may write.",
                path=str(self._path),
            ) from error

    def _holder(self) -> tuple[int | None, str]:
        """Tell who has the lock: its pid if it is seen to run here, and what to call it."""
        unknown = "a process that does not say who it is"
        try:
            with self._path.open(errors="replace") as file:
                fields = file.read(_MOST_BYTES).split(" ")
        except FileNotFoundError:
            return None, unknown  # it has just let go
        if len(fields) != len(_note().split(" ")) or not fields[0].isdecimal():
            return None, unknown
        pid, started, namespace, kernel, host = fields
        if kernel != kernel_id():
            return None, f"process {pid} of another machine, {host}"
        if namespace != _pid_namespace():
            return None, f"process {pid} of another container, {host}"
        if start_time(int(pid)) == started:
            return int(pid), f"process {pid}"
        return None, f"a process that process {pid}, which has ended, had started"


def _note() -> str:
    """Return what tells others who this process is."""
    pid = os.getpid()
    return f"{pid} {start_time(pid)} {_pid_namespace()} {kernel_id()} {socket.gethostname()}"


def _pid_namespace() -> str:
    try:
        return str(os.stat(_PID_NAMESPACE).st_ino)  # noqa: PTH116
    except OSError:
        return "-"


def life_file(folder: Path, run_id: str) -> str:
    """Return the file that a run holds with `lifelocks.hold` from before it is written down until it has ended."""
    return str(folder / f"{run_id}.run")


def remove_stale(folder: Path, going: Collection[str]) -> None:
    """Remove the locks in a folder that killed runs left, and that nobody holds.

    Args:
        folder: of a store's files.
        going: the ids of runs that were not written down as ended: what tells that these are dead stays.
    """
    for path in folder.glob("*.run"):
        if path.stem not in going:
            with taking(str(path)) as is_left, suppress(OSError):
                if is_left:
                    path.unlink()
    for path in folder.glob("*.lock"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    path.unlink()
            finally:
                os.close(descriptor)
