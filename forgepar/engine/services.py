"""What a run reports to and listens to; where one is absent, an object that does nothing stands in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forgepar.engine.cancellation import CancellationToken
from forgepar.engine.console import Console
from forgepar.records.display import Display
from forgepar.records.events import Sink
from forgepar.records.keeper import Keeper


@dataclass(frozen=True, slots=True)
class RunServices:
    """What a run reports to and listens to.

    Attributes:
        sinks: get the events; they raise nothing.
        console: shows what tasks print and log.
        cancel: cancels the run.
        keeper: keeps the run, and has what earlier runs did; `NullKeeper` if there is no store.
        display: shows the progress of the run, and raises nothing; `NullDisplay` if there is none.
    """

    sinks: Sequence[Sink]
    console: Console
    cancel: CancellationToken
    keeper: Keeper
    display: Display
