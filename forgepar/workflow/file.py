"""`File`: an argument that stands for the contents of a file."""

from __future__ import annotations

import os

from forgepar._validate import check_instance, checked_by
from forgepar.version import public


@public
class File(os.PathLike[str]):
    """A path that is compared by the file's contents: a resumed run repeats a task if its input file has changed.

    The contents and the file's name are compared, not its folder. A plain path is compared as a string. The file must
    exist when the run begins. A task that creates a file should return its plain path instead.

    Args:
        path: the path of a file.

    Attributes:
        path: the path as a string.

    Example:
        >>> os.fspath(File("data/in.csv"))
        'data/in.csv'
    """

    __slots__ = ("path",)

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> None:
        check_instance("path", path, (str, bytes, os.PathLike), "the path of a file")
        self.path: str = checked_by("path", lambda: os.fsdecode(path), "a path", path)

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
