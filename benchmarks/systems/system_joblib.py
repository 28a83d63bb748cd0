"""joblib's loky workers with its automatic batching, one ``Parallel`` call a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.patterns import Kernel
from benchmarks.systems.base import LayerRunner, Runner, missing

NAME = "joblib"
TYPICAL_US = 60.0
PARALLEL = True


def available() -> str | None:
    return missing("joblib")


@contextmanager
def open(workers: int) -> Iterator[Runner]:  # noqa: A001
    import joblib
    from joblib.externals.loky import get_reusable_executor

    try:
        with joblib.Parallel(n_jobs=workers, backend="loky") as parallel:

            def run_layer(kernel: Kernel, inputs: Sequence[tuple[int, ...]]) -> list[int]:
                return list(parallel(joblib.delayed(kernel)(*values) for values in inputs))

            yield LayerRunner(run_layer)
    finally:
        get_reusable_executor().shutdown(kill_workers=True)  # else they linger for five minutes
