"""Include a workflow in another, twice, with other inputs: `Workflow.include`.

``forgepar run forgepar.examples.composed`` prints::

    winter: mean 2.0, spread 4.0; summer: mean 21.0, spread 8.0
"""

from __future__ import annotations

import statistics

import forgepar as fp


def season() -> fp.Workflow:
    """Declare the statistics of temperatures, which are the value of task ``read``."""
    wf = fp.Workflow("season")
    read: fp.TaskHandle[list[float]] = wf.add(fp.task(list).options(name="read"), [0.0])
    wf.add(fp.task(describe).options(name="described"), wf.add(statistics.mean, read), wf.add(spread, read))
    return wf


def spread(values: list[float]) -> float:
    """Return the difference of the highest and the lowest value."""
    return max(values) - min(values)


def describe(mean: float, width: float) -> str:
    """Return the statistics as text."""
    return f"mean {mean:.1f}, spread {width:.1f}"


def join(winter: str, summer: str) -> str:
    """Return both texts as one."""
    return f"winter: {winter}; summer: {summer}"


def workflow() -> fp.Workflow:
    """Declare both seasons."""
    wf, inner = fp.Workflow("year"), season()
    winter = wf.include(inner, read=[0.0, 2.0, 4.0], prefix="winter")
    summer = wf.include(inner, read=[17.0, 21.0, 25.0], prefix="summer")
    wf.add(join, winter["described"], summer["described"])
    return wf
