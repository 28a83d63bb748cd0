"""Filters of warnings, levels of loggers and of handlers that change between jobs reach warm workers."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import forgepar as fp

LOGGER = logging.getLogger("tests.warm")
WAYS = ["inline", "joblib", "run", "forkserver", "spawn", "fork"]

Ask = Callable[..., Any]


class OwnWarning(UserWarning):
    pass


def warn(text: str = "careful") -> str:
    warnings.warn(text, OwnWarning, stacklevel=1)
    return "went on"


def log(level: int = logging.INFO) -> bool:
    LOGGER.log(level, "said")
    return LOGGER.isEnabledFor(level)


@pytest.fixture(params=WAYS)
def ask(request) -> Iterator[Ask]:
    """Have a function called by a worker that stays from call to call."""
    if request.param == "joblib":
        joblib = pytest.importorskip("joblib", reason="joblib is not installed")
        import forgepar.joblib

        def ask(fn: Callable[..., Any], *args: Any) -> Any:
            parallel = joblib.Parallel(n_jobs=2, backend="forgepar", batch_size=10)
            return parallel([joblib.delayed(fn)(*args), joblib.delayed(abs)(1)])[0]

        yield ask
        forgepar.joblib.close()
    elif request.param in ("inline", "run"):
        arguments: dict[str, Any] = {"backend": "inline"} if request.param == "inline" else {"workers": 1}
        with fp.WorkflowExecutor(**arguments) as executor:

            def ask(fn: Callable[..., Any], *args: Any) -> Any:
                wf = fp.Workflow()
                handle = wf.add(fn, *args)
                try:
                    return executor.run(wf)[handle]
                except fp.WorkflowFailed as failure:
                    raise failure.exceptions[0] from None

            yield ask
    else:
        with fp.ForgeExecutor(1, start_method=request.param) as pool:
            yield lambda fn, *args: pool.submit(fn, *args).result()


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """Put back filters and levels."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        yield
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.disabled = False
    logging.disable(disabled)


@contextlib.contextmanager
def shown(handler_level: int = logging.NOTSET) -> Iterator[list[str]]:
    """What a handler of the caller shows meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(handler_level)
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)


def test_filters_of_warnings_follow_at_each_call(ask):
    for _ in range(2):
        warnings.simplefilter("error", OwnWarning)
        with pytest.raises(OwnWarning, match="careful"):
            ask(warn)
        warnings.simplefilter("ignore", OwnWarning)
        assert ask(warn) == "went on"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert ask(warn) == "went on"
        assert [(str(warning.message), warning.category) for warning in caught] == [("careful", OwnWarning)]
    warnings.filterwarnings("error", message="this")
    assert ask(warn, "that") == "went on"
    with pytest.raises(OwnWarning, match="this"):
        ask(warn, "this")


def test_levels_of_loggers_follow_at_each_call(ask):
    with shown() as lines:
        for level, n_shown in ((logging.INFO, 1), (logging.WARNING, 1), (logging.DEBUG, 2), (logging.NOTSET, 2)):
            LOGGER.setLevel(level)
            assert ask(log) == LOGGER.isEnabledFor(logging.INFO)
            assert len(lines) == n_shown
        LOGGER.setLevel(logging.INFO)
        logging.disable(logging.INFO)
        assert ask(log) is False
        logging.disable(logging.NOTSET)
        assert ask(log) is True
        LOGGER.disabled = True
        LOGGER.setLevel(logging.DEBUG)
        assert ask(log) is False
        LOGGER.disabled = False
        LOGGER.setLevel(logging.INFO)
        assert ask(log) is True
    assert lines == ["INFO said"] * 4


def test_levels_of_handlers_decide_what_is_shown_when_it_is_shown(ask):
    LOGGER.setLevel(logging.DEBUG)
    with shown(logging.ERROR) as lines:
        (handler,) = LOGGER.handlers
        ask(log, logging.WARNING)
        assert not lines
        handler.setLevel(logging.WARNING)
        ask(log, logging.WARNING)
        assert lines == ["WARNING said"]
        handler.setLevel(logging.ERROR)
        ask(log, logging.WARNING)
        assert lines == ["WARNING said"]
    with shown() as others:  # a handler that was not there before
        ask(log, logging.DEBUG)
        assert others == ["DEBUG said"]


def test_a_level_set_for_a_block_reaches_the_jobs_of_that_block_only():
    LOGGER.setLevel(logging.INFO)
    with fp.ForgeExecutor(1) as pool:
        jobs = [pool.submit(LOGGER.getEffectiveLevel)]
        LOGGER.setLevel(logging.ERROR)
        jobs.append(pool.submit(LOGGER.getEffectiveLevel))
        LOGGER.setLevel(logging.INFO)
        jobs.append(pool.submit(LOGGER.getEffectiveLevel))
        assert [job.result() for job in jobs] == [logging.INFO, logging.ERROR, logging.INFO]


def test_names_that_the_caller_gave_to_levels_are_shown(ask):
    logging.addLevelName(33, "NOTICE")
    with shown() as lines:
        ask(log, 33)
    assert lines == ["NOTICE said"]


def test_what_an_initializer_sets_stays_when_other_rules_change():
    def begin() -> None:
        logging.getLogger("tests.warm.own").setLevel(7)
        warnings.simplefilter("error", OwnWarning)

    with fp.ForgeExecutor(1, initializer=begin) as pool:
        for level in (logging.INFO, logging.ERROR):
            LOGGER.setLevel(level)
            assert pool.submit(logging.getLogger("tests.warm.own").getEffectiveLevel).result() == 7
            assert pool.submit(LOGGER.getEffectiveLevel).result() == level
            with pytest.raises(OwnWarning):
                pool.submit(warn).result()
