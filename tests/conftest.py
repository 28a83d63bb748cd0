from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

import psutil
import pytest

BACKENDS = ["inline", "forkserver", "spawn", "fork"]
# Of slow tests that repeat one thing by seed or over a grid, one in so many is run. All are where it is not set.
SLOW_SHARE = int(os.environ.get("FORGEPAR_SLOW_SHARE", "1"))
_MANY = 10  # slow cases of one test that are taken for such
PATIENCE = 30.0  # seconds after which waiting for something that should happen at once is given up


MOST_SECONDS, MOST_SECONDS_SLOW = 300, 1200  # that a test may take before it is ended; far more than any takes
# Programs without which tests are skipped, and their Debian packages. FORGEPAR_REQUIRE_ALL=1 asks for all of them.
PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver", "node": "nodejs", "dot": "graphviz"}


def pytest_configure() -> None:
    """Have hypothesis allow for busy machines; it is loaded here alone, as workers import this file with tests.

    Raises:
        pytest.UsageError: a program is missing that must be there.
    """
    from hypothesis import settings

    if os.environ.get("FORGEPAR_REQUIRE_ALL") == "1":
        missing = {program: package for program, package in PROGRAMS.items() if shutil.which(program) is None}
        if missing:
            raise pytest.UsageError(
                f"FORGEPAR_REQUIRE_ALL is set, and these programs are missing: {', '.join(missing)}. "
                f"Install them: apt-get install {' '.join(missing.values())}"
            )

    settings.register_profile("forgepar", deadline=None)
    settings.load_profile("forgepar")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Limit the time of each test, and leave out most of many slow cases of one test if a share of them is wanted."""
    if config.pluginmanager.hasplugin("timeout"):  # of the extra test; without it, only faulthandler tells
        for item in items:
            if item.get_closest_marker("timeout") is None:
                slow = item.get_closest_marker("slow") is not None
                item.add_marker(pytest.mark.timeout(MOST_SECONDS_SLOW if slow else MOST_SECONDS))
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = {
        item for group in groups.values() if len(group) >= _MANY for i, item in enumerate(group) if i % SLOW_SHARE
    }
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def executor_arguments(kind: str, workers: int = 2) -> dict[str, object]:
    """The arguments of an executor by the name that parametrised tests use for it."""
    if kind == "inline":
        return {"backend": "inline"}
    return {"backend": "process", "workers": workers, "start_method": kind}


def own_arenas() -> set[Path]:
    """The arena folders of this process."""
    mark = f"forgepar-{os.getuid()}-{os.getpid()}-"
    roots = [Path("/dev/shm"), Path(gettempdir())]
    return {entry for root in roots if root.is_dir() for entry in root.iterdir() if entry.name.startswith(mark)}


def wait_until(happened, what: str) -> None:
    """Ask until something has happened that another process does; fail after a while."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for: {what}"
        threading.Event().wait(0.005)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, though its parent may not have taken note."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test ends the processes it started and removes its arenas; those of a wider fixture were there before."""
    n_children, arenas = len(multiprocessing.active_children()), own_arenas()
    yield
    wait_until(lambda: len(multiprocessing.active_children()) <= n_children, "children to end")
    assert own_arenas() <= arenas


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> dict[str, object]:
    """Arguments of `WorkflowExecutor` for each backend and start method."""
    return executor_arguments(request.param)


@pytest.fixture(params=["inline", "forkserver"])
def either_backend(request: pytest.FixtureRequest) -> dict[str, object]:
    """The same for this process and for workers, where how these are started makes no difference."""
    return executor_arguments(request.param)
