"""Print the lowest version of each dependency that users may have, as requirements: python .ci/lowest_bounds.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ["cli", "report", "loky", "scipy", "joblib", "dask"]


def lowest(project: dict) -> list[str]:
    """Return `name==version` for each dependency of the core and of the extras that users install."""
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *(bound for name in EXTRAS for bound in extras[name])]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", bound) for bound in bounds]
    unbounded = [bound for bound, match in zip(bounds, found, strict=True) if match is None]
    if unbounded:
        raise SystemExit(f"Each dependency must have a lowest version, as in name>=1.0, got {unbounded}.")
    return [f"{match[1]}=={match[2]}" for match in found if match is not None]


if __name__ == "__main__":
    print("\n".join(lowest(tomllib.loads(Path("pyproject.toml").read_text())["project"])))
