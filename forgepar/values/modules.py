"""Which modules are the user's own, where their source is, and which release of a library is installed.

Nothing is imported to find out, so the answers do not depend on what has been imported.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_INSTALLED = frozenset(("site-packages", "dist-packages"))


@functools.lru_cache(maxsize=4096)
def is_users(module: str | None) -> bool:
    """Return whether a module is the user's own: not part of Python, an installed library, or forgepar."""
    if module is None:
        return True
    top = module.partition(".")[0]
    if top == "__main__":
        return True
    if top == "forgepar":
        return module.startswith("forgepar.examples")
    if top in sys.builtin_module_names:
        return False
    path = source_of(module)
    if path is not None:
        return not _is_in_library(path.resolve())
    # A module without source is part of a compiled module, frozen into Python, made by a program, or received by value.
    parent = module.rpartition(".")[0]
    return is_users(parent) if parent else top not in sys.stdlib_module_names


def _is_in_library(path: Path) -> bool:
    return not _INSTALLED.isdisjoint(path.parts) or any(map(path.is_relative_to, _library_folders()))


@functools.cache
def _library_folders() -> tuple[Path, ...]:
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({Path(sysconfig.get_path(key)).resolve() for key in keys})


def source_of(name: str) -> Path | None:
    """Return the file of a module, imported or not; None if it has none, or there is no such module."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
    else:
        spec = _find(name)
        file = spec.origin if spec is not None and spec.has_location else None
    return Path(file) if isinstance(file, str) else None


def _find(name: str) -> ModuleSpec | None:
    """Find a module as an import does, but without importing its parent packages."""
    spec: ModuleSpec | None = None
    folders: list[str] | None = None
    for at in [i for i, sign in enumerate(name) if sign == "."] + [len(name)]:
        spec = _find_in(name[:at], folders)
        if spec is not None:
            folders = list(spec.submodule_search_locations or ())
        else:  # it may be a namespace package: its finder would ask its parent, which is not imported
            last = name[:at].rpartition(".")[2]
            folders = [str(Path(folder, last)) for folder in folders or () if Path(folder, last).is_dir()]
        if not folders and at < len(name):
            return None
    return spec


def _find_in(name: str, folders: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        with suppress(Exception):  # a finder of another library; an import would raise its error
            spec = finder.find_spec(name, folders)
            if spec is not None:
                return spec
    return None


def absolute_name(name: str, level: int, package: str) -> str | None:
    """Return the full name of a module that an import statement names; None if it is above the top-level package.

    Args:
        name: the name in the statement.
        level: number of leading dots.
        package: package of the importing module.
    """
    try:
        return importlib.util.resolve_name("." * level + name, package) if level else name
    except ImportError:
        return None


def package_of(scope: Mapping[str, Any]) -> str:
    """Return the package that relative imports in a module's namespace start from."""
    package = scope.get("__package__")
    if package is not None:
        return str(package)
    name = str(scope.get("__name__", ""))
    return name if "__path__" in scope else name.rpartition(".")[0]


def release_of(module: str | None) -> str:
    """Return a text that identifies the installed release of a module's library; empty if there is none.

    It is the version. For a package that was installed from a folder, it is a digest of the hashes of its files, as
    its code may change without its version. For Python's own modules it is Python's version, for forgepar empty.
    """
    return _release_of((module or "").partition(".")[0])


@functools.cache
def _release_of(top: str) -> str:
    if top in ("", "forgepar"):
        return ""
    if top in sys.stdlib_module_names:
        return "{}.{}".format(*sys.version_info)
    from importlib import metadata

    found = None
    with suppress(Exception):  # the metadata files may be damaged
        found = metadata.distribution(top)
    with suppress(Exception):
        found = found or metadata.distribution(metadata.packages_distributions()[top][0])
        if found.read_text("direct_url.json") is None:
            return found.version
        lines = sorted(line for line in (found.read_text("RECORD") or "").splitlines() if ".py,sha256=" in line)
        return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest() if lines else found.version
    return ""
