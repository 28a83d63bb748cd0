"""ray on this machine: a remote function, references handed from task to task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.patterns import Kernel, Layers, Pattern
from benchmarks.systems.base import Runner, missing

NAME = "ray"
TYPICAL_US = 1300.0
PARALLEL = True


def available() -> str | None:
    return missing("ray")


class RayRunner:
    """Runs patterns as remote calls.

    Args:
        ray: the module, initialised.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def declare(self, pattern: Pattern, kernel: Kernel) -> tuple[Any, Layers]:
        """Wrap the kernel; a graph comes to be as calls are made, so the calls belong to the run."""
        remote = self._ray.remote(num_cpus=1)(lambda *inputs: kernel(*inputs))
        return remote, pattern.layers()

    def run(self, declared: tuple[Any, Layers]) -> list[int]:
        remote, layers = declared
        references: list[Any] = []
        for layer in layers:
            before = references
            references = [remote.remote(*[before[i] for i in inputs]) for inputs in layer]
        return list(self._ray.get(references))


@contextmanager
def open(workers: int) -> Iterator[Runner]:  # noqa: A001
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        yield RayRunner(ray)
    finally:
        ray.shutdown()
