"""A program whose types test_typing.py asks type checkers for: each `reveal_type`, and each error that is marked."""

from __future__ import annotations

from typing import reveal_type

import forgepar as fp


def load(path: str) -> list[int]:
    return [len(path)]


def total(numbers: list[int], scale: float = 1.0) -> float:
    return sum(numbers) * scale


@fp.task(retries=2)
def describe(value: float) -> str:
    return f"{value}"


def grow(n: int) -> fp.Subflow:
    inner = fp.Workflow()
    return fp.Subflow(inner, inner.add(abs, n))


wf = fp.Workflow("typed")
loaded = wf.add(load, "a")
reveal_type(loaded)  # TaskHandle[list[int]]
summed = wf.add(total, loaded, scale=2.0)
reveal_type(summed)  # TaskHandle[float]
described = wf.map(describe, [1.0, 2.0])
reveal_type(described)  # TaskHandles[str]
reveal_type(described[0])  # TaskHandle[str]
doubled = wf.map(describe, loaded)
reveal_type(doubled)  # TaskHandle[list[str]]
reveal_type(wf.add(grow, 3))  # TaskHandle[Any]
reveal_type(wf.add(fp.shell("true")))  # TaskHandle[ToolResult]
reveal_type(describe(1.0))  # str
reveal_type(describe.options(name="told")(1.0))  # str

result = wf.run(workers=2, outputs="all", fail_fast=False)
reveal_type(result)  # RunResult
reveal_type(result[loaded])  # list[int]
reveal_type(result[summed])  # float
reveal_type(result[described])  # list[str]
reveal_type(result["load"])  # Any
reveal_type(wf.check(workers=2)[0])  # Finding

with fp.WorkflowExecutor(2) as executor:
    reveal_type(executor.run(wf, schedule="eager")[summed])  # float

with fp.ForgeExecutor(2) as pool:
    reveal_type(pool.submit(total, [1], scale=3.0).result())  # float
    reveal_type(pool.map(total, [[1], [2]]))  # Iterator[float]
    reveal_type([future.result() for future in [pool.submit(load, "a")]])  # list[list[int]]

wf.run(worker=2)  # error
wf.run(failfast=True)  # error
fp.WorkflowExecutor(n_jobs=2)  # error
executor.run(wf, schedule="later")  # error
number: int = result[loaded]  # error
pool.submit(total, [1]).result().upper()  # error
describe("text")  # error
