"""The Dask backend: the contract on a real cluster, and what is peculiar to it."""

from __future__ import annotations

import pytest

distributed = pytest.importorskip("distributed", reason="distributed is in the extra dask")

from daskcluster import cluster  # noqa: E402
from test_backends import Contract, identity  # noqa: E402

import forgepar as fp  # noqa: E402


@pytest.fixture(scope="module")
def address():
    with cluster() as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with distributed.Client(address, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def executor(client):
    with fp.WorkflowExecutor(backend=fp.DaskBackend(client)) as executor:
        warm = fp.Workflow()
        warm.map(identity, [1, 2])
        executor.run(warm)
        yield executor


class TestDask(Contract):
    kind = "dask"
    begins = (*Contract.begins, "WorkflowWorkerJoined", "WorkflowWorkerJoined")
