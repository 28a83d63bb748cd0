"""Has every `RunState` of this process checked after each call that may change the status of several tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from forgepar.scheduling.run_state import RunState

CALLS = (
    "restore",
    "pass_on",
    "failed",
    "decide",
    "grow",
    "left_out",
    "replaced",
    "halt",
    "put_back",
    "cancelled",
    "end",
)


def check_states(replace: Callable[[type, str, Any], None] = setattr) -> None:
    """Replace those methods, by ``monkeypatch.setattr`` or for good."""
    for name in CALLS:
        replace(RunState, name, _checked(getattr(RunState, name)))


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: RunState, *args: Any, **kwargs: Any) -> Any:
        returned = method(self, *args, **kwargs)
        self.validate()
        return returned

    return call
