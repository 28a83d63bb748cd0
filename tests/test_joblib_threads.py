"""Calls of joblib that go on at once, and batches that cannot be submitted."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading

import pytest
from conftest import PATIENCE, own_arenas, wait_until

import forgepar as fp

joblib = pytest.importorskip("joblib", reason="joblib is not installed: pip install 'forgepar[joblib]'")
import forgepar.joblib  # noqa: E402
from forgepar.joblib import ForgeparBackend, _TeamOptions, _Teams  # noqa: E402


@pytest.fixture(autouse=True)
def no_workers():
    forgepar.joblib.close()
    yield
    forgepar.joblib.close()
    wait_until(lambda: not own_arenas(), "teams that were not waited for to end")


def square(x):
    return x * x


def parallel(n_jobs=2, **options):
    return joblib.Parallel(n_jobs=n_jobs, timeout=PATIENCE, **options)


def squares(n, **options):
    return parallel(**options)(joblib.delayed(square)(i) for i in range(n))


def at_once(*calls):
    """Call functions, each in a thread, and return what each returned or raised."""
    came_to = [None] * len(calls)
    begin = threading.Barrier(len(calls))

    def go(place, call):
        begin.wait()
        try:
            came_to[place] = call()
        except BaseException as error:
            came_to[place] = error

    threads = [threading.Thread(target=go, args=pair, daemon=True) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    return came_to


@pytest.mark.parametrize("wishes", [(2, 2), (2, 3, 2, 4)], ids=str)
def test_threads_may_call_at_once(wishes):
    def some(n_jobs):
        return [squares(20, backend="forgepar", n_jobs=n_jobs) for _ in range(3)]

    expected = [[i * i for i in range(20)]] * 3
    assert at_once(*[lambda n=n: some(n) for n in wishes]) == [expected] * len(wishes)
    wait_until(lambda: len(multiprocessing.active_children()) <= max(wishes), "workers of all teams but one to end")


def test_a_call_goes_on_when_others_want_other_workers():
    first = squares(50, backend="forgepar", return_as="generator")
    assert next(first) == 0
    assert squares(3, backend="forgepar", n_jobs=3) == [0, 1, 4]
    assert list(first) == [i * i for i in range(1, 50)]
    assert [team.n_calls for team in forgepar.joblib._workers._teams] == [0]


def test_few_teams_stay_without_a_call():
    workers = _Teams()
    going_on = workers.of(_TeamOptions(2, None, None, None, ()))
    for n_jobs in range(3, 50):
        workers.rest(workers.of(_TeamOptions(n_jobs, None, None, None, ())), None)
    assert [team.options.n_jobs for team in workers._idle] == [46, 47, 48, 49]
    workers.rest(going_on, None)
    assert list(workers._teams) == workers._idle == [going_on]


def test_a_call_goes_on_when_the_workers_are_closed_and_they_end_with_it():
    going_on = squares(50, backend="forgepar", return_as="generator")
    assert next(going_on) == 0
    forgepar.joblib.close()
    assert list(going_on) == [i * i for i in range(1, 50)]
    wait_until(lambda: not multiprocessing.active_children(), "workers to end")


def test_calls_that_share_a_backend_go_on_side_by_side():
    with joblib.parallel_config(backend="forgepar", inner_max_num_threads=3):
        first = squares(50, return_as="generator")
        assert next(first) == 0
        second = squares(50, n_jobs=3, return_as="generator")
        assert next(second) == 0
        assert squares(50) == [i * i for i in range(50)]
        assert list(first) == list(second) == [i * i for i in range(1, 50)]
        assert parallel()(joblib.delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(2)) == ["3", "3"]
    assert [team.n_calls for team in forgepar.joblib._workers._teams] == [0]


def test_threads_may_share_a_backend():
    backend = ForgeparBackend()

    def some():
        with joblib.parallel_config(backend=backend):
            return [squares(20) for _ in range(3)]

    assert at_once(*[some] * 3) == [[[i * i for i in range(20)]] * 3] * 3


def test_a_call_that_was_forgotten_keeps_no_workers():
    backend = ForgeparBackend()
    assert backend.configure(2) == 2
    assert backend.submit(square_of_3).result(PATIENCE) == 9
    forgepar.joblib.close()
    assert multiprocessing.active_children()
    del backend
    wait_until(lambda: not multiprocessing.active_children(), "workers to end")


def square_of_3():
    return 9


class Exits:
    def __reduce__(self):
        sys.exit(3)


@pytest.mark.parametrize(("made", "error"), [(threading.Lock, TypeError), (Exits, SystemExit)], ids=["lock", "exit"])
def test_a_batch_that_cannot_be_pickled_fails_the_call_whoever_submits_it(made, error):
    late = [*range(10), made(), *range(5)]  # joblib submits it when others are done
    with pytest.raises(error):
        parallel(backend="forgepar", batch_size=1, pre_dispatch=2)(joblib.delayed(id)(x) for x in late)
    assert squares(3, backend="forgepar") == [0, 1, 4]


def test_an_executor_that_is_shut_down_amid_a_call_fails_it():
    def calls():
        for i in range(20):
            if i == 15:  # which is long after the first were handed out
                executor.shutdown(wait=False)
            yield joblib.delayed(square)(i)

    with (
        fp.ForgeExecutor(2) as executor,
        joblib.parallel_config(backend=ForgeparBackend(executor=executor)),
        pytest.raises(RuntimeError, match="after shutdown"),
    ):
        parallel(batch_size=1, pre_dispatch=2)(calls())
