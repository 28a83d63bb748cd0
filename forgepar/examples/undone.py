"""Remove the files that tasks wrote when a later task fails: ``compensate=``.

``forgepar run forgepar.examples.undone`` fails on purpose; ``python -m forgepar.examples.undone`` prints::

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
    """Write a file; the compensation removes it."""
    path = Path(folder) / f"part-{number}"
    path.write_text(f"part {number}\n")
    return path


def publish(paths: list[Path]) -> None:
    """Fail, as if a server were down."""
    raise ConnectionError(f"the server is away; {len(paths)} files are not published")


def workflow(folder: str | None = None) -> fp.Workflow:
    """Declare three tasks that write files, and one that fails after them."""
    wf = fp.Workflow("undone")
    wf.add(publish, wf.map(write, [folder or tempfile.gettempdir()] * 3, range(3)))
    return wf


def main() -> None:
    """Run the workflow, and print what was undone."""
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
