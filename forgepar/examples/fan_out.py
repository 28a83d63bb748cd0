"""Map over a list that another task returns, with one task per item: `Workflow.map` of a handle.

``forgepar run forgepar.examples.fan_out`` prints::

    360 = 2 x 2 x 2 x 3 x 3 x 5, squared 4 x 4 x 4 x 9 x 9 x 25
"""

from __future__ import annotations

import forgepar as fp


def prime_factors(number: int) -> list[int]:
    """Return the prime factors of a number, the smallest first."""
    factors = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def square(number: int) -> int:
    """Return the square of a number."""
    return number * number


def describe(number: int, factors: list[int], squares: list[int]) -> str:
    """Return the factors and their squares as text."""
    return f"{number} = {' x '.join(map(str, factors))}, squared {' x '.join(map(str, squares))}"


def workflow(number: int = 360) -> fp.Workflow:
    """Declare the squares of the prime factors of a number. Their count is known only during the run."""
    wf = fp.Workflow("fan out")
    factors = wf.add(prime_factors, number)
    wf.add(describe, number, factors, wf.map(square, factors))
    return wf
