"""Writing a file in pieces: it is there as a whole or, if something goes wrong on the way, as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_pieces(path: Path | str, pieces: Iterable[str]) -> None:
    """Write text to a file as it is made, first under another name beside it.

    What is there and is no file, such as a pipe or ``/dev/stdout``, is written to as it is.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        with target.open("w", encoding="utf-8") as stream:
            stream.writelines(pieces)
        return
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.writelines(pieces)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
