"""A `ForgeExecutor`: callables that change at each submission, large ones among them, failures, cancellations."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

import forgepar as fp

WORKERS = 2

Piece = Callable[[int, bool], int]


@contextmanager
def opened() -> Iterator[Sequence[Piece]]:
    """Start the workers; give the pieces of work, each of which returns how many jobs it submitted."""
    with fp.ForgeExecutor(workers=WORKERS) as executor:
        counter = Counter()
        yield [
            partial(closures, executor),
            partial(large_closures, executor),
            partial(methods, executor, counter),
            partial(failures, executor),
            partial(cancellations, executor),
            partial(mapped, executor),
            partial(large_values, executor),
            partial(chains, executor),
            partial(timeouts, executor),
            partial(killed, executor),
            partial(dropped, executor),
        ]


class Counter:
    """An object that changes with every job that is submitted for it."""

    def __init__(self) -> None:
        self.count = 0
        self.payload = bytes(20_000)

    def step(self, item: int) -> int:
        """Return the count there was at submission, and an item."""
        return self.count + item


def closures(executor: fp.ForgeExecutor, number: int, _: bool) -> int:
    """Closures of which no two are the same."""
    futures = [executor.submit(lambda i=i: i + number) for i in range(100)]
    assert [future.result() for future in futures] == list(range(number, number + 100))
    return 100


def large_closures(executor: fp.ForgeExecutor, number: int, _: bool) -> int:
    """Closures over 1.5 MiB."""
    held = bytes([number % 256]) * (3 << 19)
    assert executor.submit(lambda: len(held) + number).result() == len(held) + number
    array = np.full(3 << 16, number)
    assert executor.submit(lambda: int(array[-1])).result() == number
    return 2


def methods(executor: fp.ForgeExecutor, counter: Counter, number: int, _: bool) -> int:
    """Methods of an object that has changed since the last submission."""
    futures = []
    first = counter.count
    for i in range(50):
        futures.append(executor.submit(counter.step, number))
        counter.count += 1
        del i
    assert [future.result() for future in futures] == [first + i + number for i in range(50)]
    return 50


def failures(executor: fp.ForgeExecutor, number: int, _: bool) -> int:
    """Jobs that raise, results and arguments that cannot be pickled."""
    futures = [executor.submit(_fail, number, np.ones(1 << 14)) for _ in range(20)]
    futures += [executor.submit(threading.Lock) for _ in range(5)]
    futures += [executor.submit(abs, threading.Lock()) for _ in range(5)]
    assert all(future.exception() is not None for future in futures)
    return 30


def cancellations(executor: fp.ForgeExecutor, number: int, disturbs: bool) -> int:
    """Jobs that are cancelled, some before they begin, some after; and large arguments of theirs."""
    array = np.ones(1 << 16)
    futures = [executor.submit(lambda a, i=i: float(a[0]) + i + number, array) for i in range(50)]
    for future in futures[::2]:
        future.cancel()
    if disturbs:
        futures[1].kill()
    wait(futures)
    return 50


def mapped(executor: fp.ForgeExecutor, number: int, _: bool) -> int:
    """`map` of a closure, one by one and in chunks; and one that is left before its end."""
    assert sum(executor.map(lambda item: item + number, range(100))) == sum(range(100)) + 100 * number
    assert sum(executor.map(lambda item: item + number, range(100), chunksize=7)) == sum(range(100)) + 100 * number
    left = executor.map(lambda item: np.ones(item + 10_000) + number, range(20))
    assert next(left)[0] == number + 1
    return 200 + 20


def large_values(executor: fp.ForgeExecutor, number: int, _: bool) -> int:
    """Results and arguments of 1 to 4 MiB, and a value that several jobs take."""
    made = [executor.submit(np.full, n << 17, number) for n in range(1, 5)]
    assert [int(future.result()[-1]) for future in made] == [number] * 4
    table = executor.put(np.full(1 << 18, number))
    rows = [executor.submit(_item, table, i) for i in range(10)]
    with executor.sharing() as sharing:
        array = np.full(1 << 18, number)
        rows += [sharing.submit(_item, array, i) for i in range(10)]
        assert [row.result() for row in rows] == [number] * 20
    return 24


def chains(executor: fp.ForgeExecutor, number: int, _: bool) -> int:
    """Jobs that take the values of others, by place and by name."""
    future = executor.submit(np.full, 1 << 14, number)
    for step in range(20):
        future = executor.submit(lambda array, more, step=step: array + step + more, future, more=number % 3)
    total = executor.submit(lambda arrays: int(arrays[0][0]), [future, executor.submit(_fail_not, number)])
    assert total.result() == number + sum(range(20)) + 20 * (number % 3)
    return 23


def timeouts(executor: fp.ForgeExecutor, number: int, disturbs: bool) -> int:
    """A job over its time and retries; undisturbed, retries alone."""
    futures = [executor.submit(fp.task(_third_time).options(retries=2), number) for _ in range(5)]
    if disturbs:
        late = executor.submit(fp.task(_hang).options(timeout=0.05))
        assert isinstance(late.exception(), fp.TaskTimeout)
    assert [future.result() for future in futures] == [number] * 5
    return 5 + disturbs


def killed(executor: fp.ForgeExecutor, number: int, disturbs: bool) -> int:
    """A worker that dies with a large result half made."""
    if disturbs and number % 3 == 0:
        assert isinstance(executor.submit(_die, np.ones(1 << 17)).exception(), fp.WorkerDied)
    assert list(executor.map(abs, range(200))) == list(range(200))
    return 200 + disturbs


def dropped(executor: fp.ForgeExecutor, number: int, _: bool) -> int:
    """Jobs whose futures nobody keeps; the last shows that all before it are over."""
    for i in range(100):
        executor.submit(lambda i=i: bytes(1000 + i + number % 7))
    wait([executor.submit(abs, i) for i in range(20)])
    return 120


def _fail(number: int, value: Any) -> None:
    error = ValueError(f"no {number}")
    error.value = value + 1  # type: ignore[attr-defined]
    raise error


def _fail_not(number: int) -> int:
    return number


def _item(table: np.ndarray, i: int) -> int:
    return int(table[i])


def _third_time(number: int) -> int:
    if fp.context().attempt < 3:
        raise ConnectionError(number)
    return number


def _hang() -> None:
    threading.Event().wait()


def _die(array: np.ndarray) -> None:
    array = fp.empty(array.shape, array.dtype)
    array[:] = 1
    os.kill(os.getpid(), signal.SIGKILL)
