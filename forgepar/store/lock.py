"""A lock that a run holds on its workflow in a store, so that two runs do not compute the same values at once.

The lock is a ``flock`` on a file that describes its holder. The holder removes the file while it is still locked, so
a process that gets a lock checks that the file still has its name. The kernel releases the lock of a killed process.
Forked children close their copy of the descriptor. A child that C code forked may keep it for a short time: `acquire`
waits for that, and as long for a holder that cannot be identified from here.

Each run also has a file, `life_file`, that is locked while its process lives: pids mean nothing in other containers.
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
from forgepar.machine import kernel_id, start_time
from forgepar.system.forking import close_alone, hold_alone, no_forks
from forgepar.system.life_locks import is_same, locking_abandoned

_NAME_BYTES = 16
_UNKNOWN_SECONDS = 10.0  # how long to wait for a holder that is not a live process here
_STEP_SECONDS = 0.02
_PID_NAMESPACE = "/proc/self/ns/pid"
_MOST_BYTES = 1024  # of the description of a holder


class RunLock:
    """A lock on one workflow, identified by its name and the fingerprints of its tasks.

    Args:
        folder: of the store's files.
        workflow: the workflow's name.
        fingerprints: of its tasks; None for those that have none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = RunLock(Path(folder), "nightly", [b"load", b"join"])
        ...     lock.try_acquire(), RunLock(Path(folder), "nightly", [b"load", b"join"]).try_acquire()
        ...     lock.release()
        (True, False)
    """

    def __init__(self, folder: Path, workflow: str, fingerprints: Iterable[bytes | None]) -> None:
        digest = blake2b(workflow.encode("utf-8", "surrogatepass"), digest_size=_NAME_BYTES)
        for fingerprint in fingerprints:
            digest.update(fingerprint or b"-")
        self._workflow = workflow
        self._path = folder / f"{digest.hexdigest()}.lock"
        self._descriptor: int | None = None
        self._owner = 0

    def acquire(self, *, wait: bool) -> None:
        """Acquire the lock.

        Args:
            wait: wait until a run that holds the lock has ended.

        Raises:
            StoreBusy: another run holds the lock, and ``wait`` is False.
        """
        give_up_at = time.monotonic() + _UNKNOWN_SECONDS
        while not self.try_acquire():
            if wait:
                self._wait()
                continue
            pid, holder = self._holder()
            if pid is not None or time.monotonic() >= give_up_at:
                raise StoreBusy(
                    f"workflow {self._workflow!r} is being run with this store by {holder}. Wait until it "
                    "ends (Resume(wait=True), --wait), or use another store.",
                    path=str(self._path),
                )
            time.sleep(_STEP_SECONDS)

    def try_acquire(self) -> bool:
        """Acquire the lock if it is free; return whether it was."""
        return self._try(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Release the lock if this process holds it; in a forked child of the holder, do nothing."""
        if (descriptor := self._descriptor) is None or self._owner != os.getpid():
            return
        self._descriptor = None
        if is_same(descriptor, str(self._path)):
            with suppress(OSError):  # the folder may be read-only by now
                self._path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # children that C code forked have the descriptor too
        close_alone(descriptor)

    def _wait(self) -> None:
        """Wait until the lock is free, without acquiring it."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self._path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            finally:
                os.close(descriptor)

    def _try(self, how: int) -> bool:
        with no_forks:  # a child forked here would keep the lock
            while True:
                descriptor = self._opened()
                try:
                    fcntl.flock(descriptor, how)
                    if is_same(descriptor, str(self._path)):  # else its holder has just removed the file
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, _description().encode(), 0)
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
                f"the lock {str(self._path)!r} cannot be created ({error.strerror}). "
                "Give a store that you may write to.",
                path=str(self._path),
            ) from error

    def _holder(self) -> tuple[int | None, str]:
        """Return the pid of the holder if it is a live process of this machine and container, and a description."""
        unknown = "an unknown process"
        try:
            with self._path.open(errors="replace") as file:
                fields = file.read(_MOST_BYTES).split(" ")
        except FileNotFoundError:
            return None, unknown  # it has just been released
        if len(fields) != len(_description().split(" ")) or not fields[0].isdecimal():
            return None, unknown
        pid, started, namespace, kernel, host = fields
        if kernel != kernel_id():
            return None, f"process {pid} of another machine, {host}"
        if namespace != _pid_namespace():
            return None, f"process {pid} of another container, {host}"
        if start_time(int(pid)) == started:
            return int(pid), f"process {pid}"
        return None, f"a process that was started by process {pid}, which has ended"


def _description() -> str:
    """Return the description of this process: pid, start time, PID namespace, boot of the kernel, and host."""
    pid = os.getpid()
    return f"{pid} {start_time(pid)} {_pid_namespace()} {kernel_id()} {socket.gethostname()}"


def _pid_namespace() -> str:
    try:
        return str(os.stat(_PID_NAMESPACE).st_ino)  # noqa: PTH116
    except OSError:
        return "-"


def life_file(folder: Path, run_id: str) -> str:
    """Return the file that a run locks, with `life_locks.hold`, from before its row is inserted until it has ended."""
    return str(folder / f"{run_id}.run")


def remove_stale(folder: Path, not_ended: Collection[str]) -> None:
    """Remove lock files that killed runs left behind.

    Args:
        folder: of a store's files.
        not_ended: ids of runs with status "running" in their rows: their files stay, as they show that the run is dead.
    """
    for path in folder.glob("*.run"):
        if path.stem not in not_ended:
            with locking_abandoned(str(path)) as is_left, suppress(OSError):
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
