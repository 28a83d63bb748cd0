"""The systems that run patterns: one file each, ``system_KEY.py``, shared by all workloads over patterns."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from benchmarks.systems.base import System

# In the order of the tables: the floor, ours, the peers.
_FIRST = ("serial", "forgepar", "forgepar_eager")
_FOUND = sorted(path.stem.removeprefix("system_") for path in Path(__file__).parent.glob("system_*.py"))
KEYS = (*_FIRST, *(key for key in _FOUND if key not in _FIRST))


def load(chosen: Sequence[str] | None = None) -> dict[str, System]:
    """Import the chosen systems, or all, by their keys.

    Importing one imports none of what it measures: `System.available` tells whether that is there.
    """
    keys = [key for key in KEYS if chosen is None or key in chosen]
    return {key: cast("System", importlib.import_module(f"benchmarks.systems.system_{key}")) for key in keys}
