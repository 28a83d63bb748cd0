"""A workflow inside of another, twice, with what it starts from replaced: `Workflow.include`.

``forgepar run forgepar.examples.composed`` prints::

    winter: mean 2.0, spread 4.0; summer: mean 21.0, spread 8.0
"""

from __future__ import annotations

import statistics

import forgepar as fp


def season() -> fp.Workflow:
    """Declare what is to be known of some temperatures, which are the value of ``read``."""
    wf = fp.Workflow("season")
    read = wf.add(fp.task(list).options(name="read"), [0.0])
    wf.add(fp.task(described).options(name="described"), wf.add(statistics.mean, read), wf.add(spread, read))
    return wf


def spread(values: list[float]) -> float:
    """Return how far the lowest and the highest are apart."""
    return max(values) - min(values)


def described(mean: float, width: float) -> str:
    """Put it in words."""
    return f"mean {mean:.1f}, spread {width:.1f}"


def joined(winter: str, summer: str) -> str:
    """Put both together."""
    return f"winter: {winter}; summer: {summer}"


def workflow() -> fp.Workflow:
    """Declare both seasons."""
    wf, inner = fp.Workflow("year"), season()
    winter = wf.include(inner, read=[0.0, 2.0, 4.0], prefix="winter")
    summer = wf.include(inner, read=[17.0, 21.0, 25.0], prefix="summer")
    wf.add(joined, winter["described"], summer["described"])
    return wf
