"""What becomes of the tasks of a worker that died."""

# ruff: noqa: ARG002  (the source writes down only what the tests ask for)

from forgepar.backends.base import UNKNOWN_POSITION, Lost
from forgepar.backends.worker_board import mark
from forgepar.engine.in_flight import Flight
from forgepar.engine.worker_failures import Suspects, WorkerLoss


class Source:
    """Writes down what it is asked for."""

    is_over = False

    def __init__(self, *, has_effects=False):
        self.calls = []
        self._has_effects = has_effects

    def has_effects(self, flight):
        return self._has_effects

    def repeated(self, task, lost, *, was_at):
        self.calls.append(("repeated", int(task), was_at))

    def put_back(self, template, tasks):
        self.calls.append(("put back", *map(int, tasks)))

    def interrupted(self, task, lost):
        self.calls.append(("interrupted", int(task)))

    def died(self, lost, task, *, was_killed):
        self.calls.append(("died", task, was_killed))


def lost_at(position, also=()):
    return Lost(0, 1, -9, position, 0.0, None, also=also)


def flight_of(number, tasks, n_done=0, n_own=None):
    flight = Flight(number, 0, 0, tasks, True)
    flight.n_done = n_done
    flight.n_own = len(tasks) if n_own is None else n_own
    return flight


def settle(source, lost, flights, suspects=None):
    loss = WorkerLoss(lost, source, None, ends_tasks=True)
    return [int(task) for _, task in loss.settle(flights, suspects or Suspects())]


def test_the_task_that_the_worker_ran_fails_and_the_others_run_again():
    source = Source()
    flights = [flight_of(7, range(10, 15), n_done=1), flight_of(8, range(20, 22))]
    assert settle(source, lost_at(mark(7, 3)), flights) == [13]
    assert source.calls == [
        ("repeated", 11, False),
        ("repeated", 12, False),
        ("put back", 11, 12),
        ("put back", 14),
        ("put back", 20, 21),
        ("died", 13, False),
        ("interrupted", 13),
    ]


def test_a_batch_that_was_reclaimed_as_a_whole_blames_nothing():
    source, suspects = Source(), Suspects()
    flights = [flight_of(7, range(10, 15), n_own=0)]
    assert settle(source, lost_at(UNKNOWN_POSITION), flights, suspects) == []
    assert source.calls == [("died", None, False)]
    assert suspects.losses == {}


def test_the_third_loss_under_a_task_that_runs_alone_is_its_fault():
    suspects = Suspects()
    for expected in ([], [], [10]):
        assert settle(Source(), lost_at(UNKNOWN_POSITION), [flight_of(7, range(10, 11))], suspects) == expected
    assert suspects.losses == {}


def test_a_suspect_shares_no_batch():
    suspects = Suspects()
    settle(Source(), lost_at(UNKNOWN_POSITION), [flight_of(7, range(10, 13))], suspects)
    assert [suspects.n_apart(tasks) for tasks in (range(5, 10), range(8, 12), range(10, 13))] == [5, 2, 1]


def test_tasks_with_effects_that_may_have_begun_are_not_repeated():
    source = Source(has_effects=True)
    flights = [flight_of(7, range(10, 12)), flight_of(8, range(20, 22))]
    assert settle(source, lost_at(mark(8, 1)), flights) == [10, 11, 21]
