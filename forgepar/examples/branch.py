"""Run one of two branches, depending on a value: `forgepar.when`.

``forgepar run forgepar.examples.branch`` and ``forgepar run forgepar.examples.branch -p number=97`` print::

    91 = 7 x 13
    97 is prime
"""

from __future__ import annotations

import forgepar as fp


def smallest_divisor(number: int) -> int:
    """Return the smallest divisor above 1."""
    return next(divisor for divisor in range(2, number + 1) if number % divisor == 0)


def is_smaller(divisor: int, number: int) -> bool:
    """Return whether a divisor is smaller than the number."""
    return divisor < number


def product(number: int, divisor: int) -> str:
    """Return a number as a product, as text."""
    return f"{number} = {divisor} x {number // divisor}"


def prime(number: int) -> str:
    """Return the text for a prime number."""
    return f"{number} is prime"


def workflow(number: int = 91) -> fp.Workflow:
    """Declare the workflow for a number of at least 2."""
    wf = fp.Workflow("branch")
    divisor = wf.add(smallest_divisor, number)
    is_composite = wf.add(is_smaller, divisor, number)
    fp.when(wf, is_composite, lambda: wf.add(product, number, divisor), lambda: wf.add(prime, number))
    return wf
