"""A task an item of a list that is known only when the workflow runs: `Workflow.map` of a handle.

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


def told(number: int, factors: list[int], squares: list[int]) -> str:
    """Put it in words."""
    return f"{number} = {' x '.join(map(str, factors))}, squared {' x '.join(map(str, squares))}"


def workflow(number: int = 360) -> fp.Workflow:
    """Declare the squares of the factors of a number: how many there will be, nobody knows before."""
    wf = fp.Workflow("fan out")
    factors = wf.add(prime_factors, number)
    wf.add(told, number, factors, wf.map(square, factors))
    return wf
