"""Compare a wheel and an sdist with what git has: python .ci/check_distributions.py FOLDER FILES.

FOLDER has the two archives; FILES is a file with the paths that `git ls-files -z` prints. The package must have the
same files, with the same contents, in all three; the sdist must also have all that its tests read.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = ["page.html", "page.css", "page.js", "py.typed", "__init__.pyi"]  # data files that the package reads
ADDED = {"PKG-INFO"}  # by the build


def wheel_contents(path: Path) -> dict[str, bytes]:
    """Return the files of a wheel, without its metadata."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}


def sdist_contents(path: Path) -> dict[str, bytes]:
    """Return the files of an sdist, by their paths below its only folder."""
    with tarfile.open(path) as sdist:
        return {
            member.name.partition("/")[2]: sdist.extractfile(member).read()  # type: ignore[union-attr]
            for member in sdist
            if member.isfile()
        }


def differences(what: str, found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return a line for each file that is missing, unexpected or has other contents."""
    return (
        [f"{what} lacks {name}" for name in sorted(expected.keys() - found.keys())]
        + [f"{what} has {name}, which git does not" for name in sorted(found.keys() - expected.keys())]
        + [f"{what} has another {name}" for name in sorted(found.keys() & expected) if found[name] != expected[name]]
    )


def main(folder: Path, listing: Path) -> None:
    """Print every fault, and exit with 1 if there is one."""
    tracked = {name: Path(name).read_bytes() for name in listing.read_text().split("\0") if name}
    package = {name: text for name, text in tracked.items() if name.startswith("forgepar/")}
    (wheel_path,), (sdist_path,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    sdist = {name: text for name, text in sdist_contents(sdist_path).items() if name not in ADDED}
    wheel = wheel_contents(wheel_path)
    names = {name.rpartition("/")[2] for name in wheel}
    faults = [f"the wheel lacks {name}" for name in NEEDED if name not in names]
    faults += differences("the wheel", wheel, package) + differences("the sdist", sdist, tracked)
    if faults:
        sys.exit("\n".join(dict.fromkeys(faults)))
    print(f"the wheel has the {len(package)} files of the package, the sdist all {len(tracked)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
