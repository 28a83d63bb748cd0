"""joblib on forgepar's workers."""

from __future__ import annotations

import multiprocessing
import os
import threading

import numpy as np
import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.machine import available_cpus

joblib = pytest.importorskip("joblib", reason="joblib is not installed: pip install 'forgepar[joblib]'")
import forgepar.joblib  # noqa: E402
from forgepar.backends.worker import inside_worker  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def workers():
    """Have both workers warm before the first test, and none after the last."""
    parallel = joblib.Parallel(n_jobs=2, backend="forgepar")
    before = len(multiprocessing.active_children())
    parallel(joblib.delayed(double)(i) for i in range(10))
    wait_until(lambda: len(multiprocessing.active_children()) == before + 2, "both workers")
    yield before + 2
    forgepar.joblib.close()


@pytest.fixture(autouse=True)
def nothing_left_behind(workers):
    """In place of what other tests have: the two workers stay, one that was ended may yet be missing."""
    yield
    wait_until(lambda: len(multiprocessing.active_children()) <= workers, "children to end")


def double(x):
    return 2 * x


def run(function, *columns, **options):
    with joblib.parallel_config(backend="forgepar"):
        parallel = joblib.Parallel(**{"n_jobs": 2, **options})
        return parallel(joblib.delayed(function)(*row) for row in zip(*columns, strict=True))


def hold(started):
    started.touch()
    threading.Event().wait(60)


def fail_after(path):
    wait_until(path.exists, f"{path} to be there")
    raise ValueError("no")


def test_it_gives_what_other_backends_give():
    assert run(pow, range(200), [2] * 200) == [i * i for i in range(200)]
    assert run(lambda x: x + 1, range(50)) == list(range(1, 51))
    assert run(double, []) == []
    pids = set(run(lambda _: inside_worker() and os.getpid(), range(50)))
    assert os.getpid() not in pids
    assert False not in pids


@pytest.mark.parametrize("batch_size", ["auto", 1, 7])
def test_batches_of_all_sizes(batch_size):
    assert run(double, range(100), batch_size=batch_size) == [2 * i for i in range(100)]


def test_workers_stay_from_call_to_call():
    pids = [set(run(lambda _: os.getpid(), range(20))) for _ in range(3)]
    assert len(set.union(*pids)) <= 2


def test_generators():
    ordered = run(double, range(20), return_as="generator")
    assert next(ordered) == 0
    assert list(ordered) == [2 * i for i in range(1, 20)]
    assert sorted(run(double, range(20), return_as="generator_unordered")) == [2 * i for i in range(20)]


def test_a_failure_is_the_tasks_own_and_ends_what_runs(tmp_path):
    def work(i):
        return hold(tmp_path / "started") if i == 0 else fail_after(tmp_path / "started")

    with pytest.raises(ValueError, match="no"):
        run(work, range(20), batch_size=1)
    assert run(double, range(10)) == [2 * i for i in range(10)]  # nobody is still at the other


def test_a_worker_that_dies():
    with pytest.raises(fp.WorkerDied, match="exited with code 5"):
        run(os._exit, [5])
    assert run(double, range(10)) == [2 * i for i in range(10)]


def test_a_timeout(tmp_path):
    with pytest.raises(multiprocessing.TimeoutError):
        run(hold, [tmp_path / "a", tmp_path / "b"], timeout=0.3)
    assert run(double, range(4)) == [0, 2, 4, 6]


def test_verbose(capsys):
    run(double, range(10), verbose=10)
    told = "".join(capsys.readouterr())
    assert "ForgeparBackend with 2 concurrent workers" in told
    assert "Done" in told


@pytest.mark.parametrize(
    ("asked", "got"),
    [(1, 1), (3, 3), (None, 1), (-1, available_cpus()), (-available_cpus(), 1), (-available_cpus() - 5, 1)],
)
def test_how_many_workers_a_call_gets(asked, got):
    with joblib.parallel_config(backend="forgepar"):
        assert joblib.effective_n_jobs(asked) == got


def test_no_workers_is_an_error():
    with joblib.parallel_config(backend="forgepar"), pytest.raises(ValueError, match="n_jobs"):
        joblib.effective_n_jobs(0)


def test_one_worker_is_this_process():
    assert run(lambda _: os.getpid(), range(3), n_jobs=1) == [os.getpid()] * 3


def test_calls_inside_of_tasks_do_not_start_processes():
    def nested(i):
        here = os.getpid()
        pids = joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(4))
        again = joblib.Parallel(n_jobs=2, backend="forgepar")(joblib.delayed(os.getpid)() for _ in range(4))
        return set(pids + again) == {here}

    assert run(nested, range(4)) == [True] * 4


def test_large_arrays_are_written_once_and_results_can_be_written():
    table = np.arange(400_000.0)
    found = run(lambda values, i: (values[i], values.flags.writeable, os.getpid()), [table] * 20, range(20))
    assert [value for value, *_ in found] == list(range(20))
    assert {writeable for _, writeable, _ in found[4:]} == {False}
    (made,) = run(np.full, [400_000], [3.0])
    made += 1
    assert made.sum() == 1_600_000
    assert table.flags.writeable


def test_what_changed_between_calls_is_written_anew():
    table = np.zeros(400_000)
    for step in range(3):
        table[:] = step
        assert run(lambda values: float(values[-1]), [table] * 6) == [step] * 6


def test_an_executor_of_ones_own():
    with fp.ForgeExecutor(2) as executor:
        with joblib.parallel_config(backend="forgepar", executor=executor):
            assert joblib.effective_n_jobs(-1) == 2
            assert joblib.effective_n_jobs(8) == 2
            found = joblib.Parallel(n_jobs=-1)(joblib.delayed(double)(i) for i in range(20))
        assert found == [2 * i for i in range(20)]
        assert executor.submit(double, 1).result() == 2


def test_threads_of_numerical_libraries():
    def threads(_):
        return os.environ["OMP_NUM_THREADS"]

    with joblib.parallel_config(backend="forgepar", inner_max_num_threads=3):
        assert set(joblib.Parallel(n_jobs=2)(joblib.delayed(threads)(i) for i in range(4))) == {"3"}
    forgepar.joblib.close()


def test_grid_search_gives_the_same_scores():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: it is in the extra 'peers'")
    from sklearn.datasets import make_classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    rows, classes = make_classification(300, 10, random_state=0)

    def search():
        grid = GridSearchCV(LogisticRegression(), {"C": [0.01, 0.1, 1.0]}, cv=3, n_jobs=2).fit(rows, classes)
        return grid.cv_results_["mean_test_score"].tolist(), grid.best_params_

    with joblib.parallel_config(backend="forgepar"):
        ours = search()
    with joblib.parallel_config(backend="threading"):
        assert search() == ours
    forgepar.joblib.close()
