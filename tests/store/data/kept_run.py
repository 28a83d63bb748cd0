"""The workflow whose run is kept in kept_run.db, which was written before forgepar had packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import forgepar as fp


@dataclass(frozen=True)
class Point:
    """A class of the user's."""

    x: int
    y: int


def numbers(n: int) -> list[int]:
    return list(range(n))


def ones(n: int) -> np.ndarray:
    return np.ones(n)


def point(values: list[int]) -> Point:
    return Point(min(values), max(values))


def fail(values: list[int]) -> None:
    raise ValueError(f"{len(values)} values")


def options(n: int) -> object:
    return {"backoff": fp.Backoff(n), "file": fp.File("/tmp/a"), "options": fp.Options(retries=n)}


def adder(n: int) -> Callable[[int], int]:
    return lambda x: x + n


def declare() -> fp.Workflow:
    wf = fp.Workflow("kept")
    small = wf.add(fp.task(numbers).options(name="numbers"), 4)
    large = wf.add(fp.task(ones).options(name="ones"), 20_000)
    wf.add(fp.task(np.sum).options(name="sum"), large)
    wf.add(fp.task(point).options(name="point"), small)
    wf.add(fp.task(fp.shell("echo three")).options(name="echo"))
    wf.add(fp.task(options).options(name="options"), 2)
    wf.add(fp.task(adder).options(name="adder"), 5)
    wf.add(fp.task(fail).options(name="fail"), small)
    return wf
