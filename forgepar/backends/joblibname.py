"""Has `joblib` know this package's backend by its name in a worker, without loading either before a task does.

    a task imports joblib ──> its registry gets a factory ──> a call names the backend ──> forgepar.joblib is imported

Callers that have imported `forgepar.joblib` may use the name anywhere; their tasks run in workers that have not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

NAME = "forgepar"
_MODULE = "forgepar.joblib"


def know_the_name() -> None:
    """Register the backend with `joblib`, at once where that is loaded, else when it is."""
    if "joblib" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder that finds nothing itself, but takes note when `joblib` is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:  # noqa: ARG002
        """Return where `joblib` is, with a loader that registers the backend behind it."""
        if name != "joblib":
            return None
        with suppress(ValueError):  # another thread did so
            sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = _and_then(loader.exec_module, _register)
        return spec


def _and_then(load: Callable[[ModuleType], object], register: Callable[[], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        load(module)
        register()

    return exec_module


def _register() -> None:
    with suppress(Exception):  # a joblib that is not like any that we know is the task's to use all the same
        parallel = import_module("joblib.parallel")
        if NAME not in parallel.BACKENDS:
            parallel.register_parallel_backend(NAME, _backend)


def _backend(**arguments: Any) -> Any:
    return import_module(_MODULE).ForgeparBackend(**arguments)
