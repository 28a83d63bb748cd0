"""A program whose workers are in C code that looks at no signal; it prints that they are, and is then to be ended.

python -m benchmarks.faults.busy WORKERS
"""

from __future__ import annotations

import hashlib
import signal
import sys
import tempfile
import threading
from pathlib import Path

import forgepar as fp


def busy(folder: Path, number: int) -> None:
    """Say that this runs, then compute for an hour."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / str(number)).touch()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)


def announce(folder: Path, workers: int) -> None:
    """Print a line when all of them run."""
    while len(list(folder.iterdir())) < workers:
        threading.Event().wait(0.01)
    print("busy", flush=True)


def main(workers: int) -> None:
    """Run a task on each of some workers."""
    with tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=announce, args=(Path(folder), workers), daemon=True).start()
        workflow = fp.Workflow()
        workflow.map(busy, [Path(folder)] * workers, range(workers))
        workflow.run(workers=workers)


if __name__ == "__main__":
    main(int(sys.argv[1]))
