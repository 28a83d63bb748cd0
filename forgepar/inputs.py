"""Arguments that stand for files: a task that gets one depends on what is in it."""

from __future__ import annotations

import os


class File(os.PathLike[str]):
    """A path that counts by what is in the file: a resumed run runs a task again when its input file has changed.

    The file's content and name count, not the folder it is in. A plain path counts by its text alone. The file must be
    there when the run begins; one that a task makes is better returned by that task, as a plain path.

    Args:
        path: of a file.

    Attributes:
        path: the same, as text.

    Example:
        >>> os.fspath(File("data/in.csv"))
        'data/in.csv'
    """

    __slots__ = ("path",)

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise ValueError(f"path={path!r} is no path. Give that of a file.")
        self.path = os.fsdecode(path)

    def __fspath__(self) -> str:
        return self.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, File) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __str__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"File({self.path!r})"
