"""Files that are written, and removed again when a later task fails: ``compensate=``.

``forgepar run forgepar.examples.undone`` fails, as it is meant to; ``python -m forgepar.examples.undone`` prints::

    publish failed: the server is away
    undone: write-0, write-1, write-2
    files left: 0
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import forgepar as fp


@fp.task(effects=True, compensate=Path.unlink)
def write(folder: str, number: int) -> Path:
    """Write a file; its compensation removes it."""
    path = Path(folder) / f"part-{number}"
    path.write_text(f"part {number}\n")
    return path


def publish(paths: list[Path]) -> None:
    """Fail, as servers do."""
    raise ConnectionError(f"the server is away; {len(paths)} files are not published")


def workflow(folder: str | None = None) -> fp.Workflow:
    """Declare the writing of three files into a folder, and what then fails."""
    wf = fp.Workflow("undone")
    wf.add(publish, wf.map(write, [folder or tempfile.gettempdir()] * 3, range(3)))
    return wf


def main() -> None:
    """Run it, and tell what is left."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            workflow(folder).run(workers=2)
        except fp.WorkflowFailed as failure:
            ((name, error),) = failure.result.errors.items()
            print(f"{name} failed: {str(error).split(';')[0]}")
            print(f"undone: {', '.join(sorted(failure.result.rollback.compensated))}")
        print(f"files left: {len(list(Path(folder).iterdir()))}")


if __name__ == "__main__":
    main()
