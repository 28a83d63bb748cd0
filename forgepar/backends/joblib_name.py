"""Registration of this package's `joblib` backend in workers, without importing either module before a task does.

    a task imports joblib ──> its registry gets a factory ──> a call names the backend ──> forgepar.joblib is imported

A caller that has imported `forgepar.joblib` may use the name anywhere, also in tasks, whose workers have not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

NAME = "forgepar"
_MODULE = "forgepar.joblib"


def register_joblib_backend() -> None:
    """Register the backend with `joblib`: now if `joblib` is loaded, else when it is imported."""
    if "joblib" in sys.modules:
        _register()
    elif not any(isinstance(finder, _JoblibFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _JoblibFinder())


class _JoblibFinder:
    """An import finder that registers the backend when `joblib` is imported, and finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:  # noqa: ARG002
        """Return the spec of `joblib`, with a loader that registers the backend after loading it."""
        if name != "joblib":
            return None
        with suppress(ValueError):  # another thread removed it
            sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            load = loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            loader.exec_module = load_and_register
        return spec


def _register() -> None:
    with suppress(Exception):  # the task may use an unknown version of joblib that works otherwise
        parallel = import_module("joblib.parallel")
        if NAME not in parallel.BACKENDS:
            parallel.register_parallel_backend(NAME, _backend)


def _backend(**arguments: Any) -> Any:
    return import_module(_MODULE).ForgeparBackend(**arguments)
