"""How a worker takes over values of the caller's global names.

A value of the caller replaces that of a worker only if the caller changed it since it last sent the name: each value
comes with a key that changes when the caller changes it. So a value that a pool's initializer assigned stays, and one
that the caller assigned later arrives. An object that cannot be pickled is sent as a `KeptAsIs`: the worker keeps its
own, which must have the same code.
"""

from __future__ import annotations

import marshal
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from forgepar.errors import CodeMismatch
from forgepar.values.comparison import MISSING, is_plain_instance, same
from forgepar.values.origins import Namespace
from forgepar.values.unchanged import functions_in


class Key(NamedTuple):
    """Version of data under a name of the caller. Stores have pickles of it, so its fields stay as they are.

    Attributes:
        identity: id of the object in the caller. A new one means that the name was assigned; other names of the former
            object keep that.
        digest: digest of its content.
    """

    identity: int
    digest: bytes


class KeptAsIs(NamedTuple):
    """Placeholder for an object that cannot be pickled: the receiver keeps its own. Stores have pickles of it.

    Attributes:
        type_name: qualified name of the object's class.
        codes: marshalled code of its functions; those of the receiver's object must be equal.
    """

    type_name: str
    codes: tuple[bytes, ...]


_caches: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_as_is(value: Any) -> KeptAsIs:
    """Return the placeholder for an object that cannot be pickled."""
    return KeptAsIs(type_name(value), tuple([marshal.dumps(fn.__code__) for fn in functions_in(value)]))


def check_kept(mine: Any, sent: KeptAsIs, module: str, name: str) -> None:
    """Check an object of this process against the caller's placeholder; warn if it has another type.

    Raises:
        CodeMismatch: the code differs.
    """
    if type_name(mine) != sent.type_name:
        here = "not defined" if mine is MISSING else f"a {type_name(mine)}"
        warnings.warn(
            f"{name!r} of module {module!r} is a {sent.type_name} in the caller, which cannot be pickled, and {here} "
            "in this worker. Create it inside the task, or when the module is imported.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif [fn.__code__ for fn in functions_in(mine)] != [*map(marshal.loads, sent.codes)]:
        raise CodeMismatch(
            f"{name!r} of module {module!r} has different code in the caller and in this worker, and the caller's "
            "cannot be sent because part of it cannot be pickled. Reload the module in the caller, and start new "
            "workers.",
            module=module,
            name=name,
        )


def type_name(value: Any) -> str:
    """Return the qualified name of a value's class."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def merge(namespace: Namespace, values: Mapping[str, Any], keys: Mapping[str, Any], *, is_callers: bool) -> None:
    """Take over values of global names.

    Args:
        namespace: the namespace to change.
        values: the values by name.
        keys: for each name, the key that changes when the caller changes the value; None for code, which is compared.
        is_callers: whether the values are the caller's; those of another worker only fill in missing names.
    """
    names, received = namespace.names, namespace.received
    for name, value in values.items():
        key = keys.get(name)
        if name not in names:
            names[name] = value
        elif not is_callers:
            continue
        elif key is None:
            if not same(names[name], value):
                names[name] = value
                clear_caches()
        elif received.get(name, MISSING) != key:
            take_over(namespace, name, value, key.identity if isinstance(key, Key) else None)
        if is_callers:
            received[name] = key
            namespace.sent.add(name)
            if isinstance(key, Key):
                namespace.identities[name] = key.identity


def take_over(namespace: Namespace, name: str, value: Any, identity: int | None) -> None:
    """Give a name the caller's value, if it differs.

    An object that the caller changed in place is changed in place here, so that other names of it see the change. An
    object that the caller assigned is assigned, so that other names of the former object keep that.
    """
    names, before = namespace.names, namespace.identities.get(name)
    is_assigned = before is not None and before != identity
    if is_assigned or not same(names[name], value):
        if identity is not None and before == identity:
            _replace_content(names, name, value)
        else:
            names[name] = value
        clear_caches()


def _replace_content(names: dict[str, Any], name: str, value: Any) -> None:
    """Give a name another value; a container keeps its identity and gets the new content."""
    mine = names.get(name, MISSING)
    if type(mine) is type(value) and mine is not value:
        if type(mine) in (dict, set):
            mine.clear()
            mine.update(value)
            return
        if type(mine) is list:
            mine[:] = value
            return
        if _is_alike_array(mine, value):
            mine[...] = value
            return
        if is_plain_instance(mine):
            vars(mine).clear()
            vars(mine).update(vars(value))
            return
    names[name] = value


def _is_alike_array(mine: Any, value: Any) -> bool:
    kind = type(mine)
    if (kind.__module__, kind.__name__) != ("numpy", "ndarray"):
        return False
    return bool(mine.flags.writeable and mine.shape == value.shape and mine.dtype == value.dtype)


def clear_caches() -> None:
    """Clear the caches of functions, as cached results may depend on a value that has changed."""
    for cached in list(_caches):
        cached.cache_clear()


def register_cache(cached: Any) -> None:
    """Have `clear_caches` clear the cache of a function."""
    _caches.add(cached)
