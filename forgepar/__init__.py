"""forgepar: runs graphs of plain Python functions on many processes, layer by layer.

`__init__.pyi` lists the public names. A name is loaded when it is first used: `import forgepar` stays fast, and worker
processes do not load numpy.
"""

import importlib
from typing import Any

from forgepar.system.loading import loading
from forgepar.version import __version__ as __version__

_modules: dict[str, str] = {}  # by public name, once a name was asked for


def _read_stub() -> dict[str, str]:
    """Return the module of each public name, from the lines ``from module import name as name`` of the stub."""
    if not _modules:
        stub: bytes = __spec__.loader.get_data(f"{__path__[0]}/__init__.pyi")
        lines = (line.split() for line in stub.decode().splitlines() if line.startswith("from "))
        _modules.update({name: module for _, module, _, name, *_ in lines})
    return _modules


def __getattr__(name: str) -> Any:
    if name == "__all__":
        value: Any = sorted(_read_stub())
    elif name.startswith("_") or name not in _read_stub():
        raise AttributeError(f"module 'forgepar' has no attribute {name!r}")
    else:
        with loading:
            value = getattr(importlib.import_module(_read_stub()[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_read_stub(), "__version__"]
