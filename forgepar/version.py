"""What the package is called where its modules do not matter: its version, and the module of its public names."""

from typing import Any, TypeVar

__version__ = "0.1.0"

Named = TypeVar("Named", bound=Any)


def public(named: Named) -> Named:
    """Set the module of a public class or function to `forgepar` (a decorator).

    Pickles, reprs and documentation refer to a class by its module. So it may move within the package, and pickles in
    older stores remain readable.
    """
    named.__module__ = "forgepar"
    return named
