"""Run several functions in parallel and collect their values: `forgepar.ParallelTasks`.

``forgepar run forgepar.examples.side_by_side`` prints::

    below 10000: 1229 primes, 100 squares, 4 perfect numbers
"""

from __future__ import annotations

from collections.abc import Sequence

import forgepar as fp


def n_primes(limit: int) -> int:
    """Count the primes below a limit (the sieve of Eratosthenes)."""
    is_prime = [False, False, *[True] * (limit - 2)]
    for number in range(2, int(limit**0.5) + 1):
        if is_prime[number]:
            is_prime[number * number :: number] = [False] * len(range(number * number, limit, number))
    return sum(is_prime)


def n_squares(limit: int) -> int:
    """Count the squares below a limit, including 0."""
    return sum(1 for root in range(limit) if root * root < limit)


def n_perfect(limit: int) -> int:
    """Count the numbers below a limit that equal the sum of their divisors."""
    sums = [0] * limit
    for divisor in range(1, limit):
        for number in range(2 * divisor, limit, divisor):
            sums[number] += divisor
    return sum(1 for number in range(2, limit) if sums[number] == number)


def describe(counts: Sequence[int], *, limit: int) -> str:
    """Return the counts as text."""
    primes, squares, perfect = counts
    return f"below {limit}: {primes} primes, {squares} squares, {perfect} perfect numbers"


def workflow(limit: int = 10_000) -> fp.Workflow:
    """Declare the counts below a limit."""
    wf = fp.Workflow("side by side")
    counts = fp.ParallelTasks([(n_primes, limit), (n_squares, limit), (n_perfect, limit)]).add_to(wf)
    wf.add(describe, counts, limit=limit)
    return wf
