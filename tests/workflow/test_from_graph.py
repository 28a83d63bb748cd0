"""Graphs of other libraries as workflows, and matrices of scipy as graphs."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import forgepar as fp


def tell(node, *values, **attributes):
    return (node, *values, *([attributes] if attributes else []))


def add(*values):
    return sum(values)


def one():
    return 1


@pytest.fixture
def networkx():
    return pytest.importorskip("networkx", reason="networkx is not installed")


@pytest.fixture
def rustworkx():
    return pytest.importorskip("rustworkx", reason="rustworkx is not installed: it is in the extra 'peers'")


def run(graph, *arguments, **options):
    wf = fp.Workflow.from_graph(graph, *arguments, **options)
    return wf, wf.run(backend="inline", outputs="all")


def test_a_networkx_graph(networkx):
    graph = networkx.DiGraph()
    graph.add_edges_from([("b", "d"), ("a", "d"), ("a", "b"), ("c", "d")])  # d before what leads to it
    wf, result = run(graph, tell, name="letters")
    assert wf.name == "letters"
    assert result["d"] == ("d", ("b", ("a",)), ("a",), ("c",))  # in the order of the edges
    assert wf.execution_layers() == [["a", "c"], ["b"], ["d"]]


def test_nodes_of_any_kind_are_named_as_they_read(networkx):
    graph = networkx.DiGraph([((0, 1), 7), (2.5, 7)])
    _, result = run(graph, tell)
    assert result["7"] == (7, ((0, 1),), (2.5,))
    assert result["(0, 1)"] == ((0, 1),)
    graph.add_edge("7", 7)
    with pytest.raises(fp.DuplicateTaskName, match="Two nodes of the graph have the name '7'"):
        run(graph, tell)


def test_functions_in_node_attributes(networkx):
    graph = networkx.DiGraph()
    graph.add_node("one", fn=one)
    graph.add_node("two", fn=lambda: 2)
    graph.add_node("sum", fn=fp.task(add).options(retries=1))
    graph.add_edges_from([("one", "sum"), ("two", "sum")])
    wf, result = run(graph)
    assert result["sum"] == 3
    assert wf.plan().spec(2).options.retries == 1
    graph.add_node("none")
    with pytest.raises(
        fp.WorkflowError, match=r"Node 'none' must have a function in its attribute 'fn' \(fn='fn'\), got None"
    ):
        run(graph)
    with pytest.raises(fp.WorkflowError, match=r"must have a function in its attribute 'work' .*, got None"):
        run(graph, "work")


def test_attributes_by_keyword(networkx):
    graph = networkx.DiGraph()
    graph.add_node("a", size=3, colour="red")
    graph.add_edge("a", "b")
    _, result = run(graph, tell, attributes=["size"])
    assert result["a"] == ("a", {"size": 3})
    assert result["b"] == ("b", ("a", {"size": 3}))


def test_an_edge_that_is_there_twice_brings_its_value_twice(networkx):
    graph = networkx.MultiDiGraph([("a", "b"), ("a", "b")])
    assert run(graph, tell)[1]["b"] == ("b", ("a",), ("a",))


def test_what_cannot_be_a_workflow(networkx):
    with pytest.raises(fp.WorkflowError, match="graph must be a directed graph, got"):
        run(networkx.Graph([(0, 1)]), tell)
    with pytest.raises(fp.CyclicWorkflow) as caught:
        run(networkx.DiGraph([("a", "b"), ("b", "a")]), tell)
    assert sorted(caught.value.cycle) == ["a", "b"]
    with pytest.raises(fp.EmptyWorkflow):
        run(networkx.DiGraph(), tell)
    with pytest.raises(
        fp.WorkflowError, match=r"graph must be a networkx\.DiGraph, a rustworkx\.PyDiGraph or an Adjacency, got"
    ):
        fp.Workflow.from_graph({"a": ["b"]}, tell)


def test_a_rustworkx_graph(rustworkx):
    graph = rustworkx.PyDiGraph()
    last, first, gone, middle = graph.add_nodes_from(["last", "first", "gone", {"by": 2}])
    graph.add_edge(middle, last, None)
    graph.add_edge(first, last, None)
    graph.add_edge(first, middle, None)
    graph.remove_node(gone)
    _, result = run(graph, tell, attributes=["by"])
    assert result["last"] == ("last", ({"by": 2}, ("first",), {"by": 2}), ("first",))
    assert result["3"][0] == {"by": 2}
    with pytest.raises(fp.WorkflowError, match="graph must be a directed graph, got"):
        run(rustworkx.PyGraph(), tell)


def test_functions_as_rustworkx_nodes(rustworkx):
    graph = rustworkx.PyDiGraph()
    source, second, total = graph.add_nodes_from([one, {"fn": one}, add])
    graph.add_edges_from([(source, total, None), (second, total, None)])
    assert run(graph)[1]["2"] == 2


def test_an_adjacency():
    graph = fp.Adjacency.from_edges(4, [3, 0, 2], [1, 1, 3])
    wf, result = run(graph, tell)
    assert result["tell-1"] == (1, (0,), (3, (2,)))
    assert wf.execution_layers() == [["tell", "tell-2"], ["tell-3"], ["tell-1"]]
    with pytest.raises(fp.WorkflowError, match="Node 0 must have a function"):
        run(graph)


def test_a_wide_graph_goes_in_batches():
    n = 5000
    graph = fp.Adjacency.from_edges(2 * n, range(n), range(n, 2 * n))
    wf = fp.Workflow.from_graph(graph, lambda node, *values: node + sum(values))
    assert len(wf.templates) == 2
    with fp.WorkflowExecutor(backend="inline") as executor:
        assert executor.run(wf)[f"lambda-{2 * n - 1}"] == 3 * n - 2


def test_a_matrix_of_scipy_and_back():
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed: pip install 'forgepar[scipy]'")
    graph = fp.Adjacency.from_edges(4, [2, 0, 0], [1, 3, 1])
    matrix = graph.to_scipy()
    assert isinstance(matrix, sparse.csr_array)
    np.testing.assert_array_equal(matrix.toarray(), graph.to_dense())
    again = fp.Adjacency.from_scipy(matrix)
    np.testing.assert_array_equal(again.indices, graph.indices)
    np.testing.assert_array_equal(again.indptr, graph.indptr)
    entries = sparse.coo_array(([0.0, 2.5], ([0, 1], [1, 0])), shape=(2, 2))
    assert fp.Adjacency.from_scipy(entries).to_dense().tolist() == [[False, False], [True, False]]
    with pytest.raises(ValueError, match="matrix must be square"):
        fp.Adjacency.from_scipy(sparse.csr_array((2, 3)))
    with pytest.raises(ValueError, match=r"matrix must be a scipy.sparse matrix, got \[\[0\]\]"):
        fp.Adjacency.from_scipy([[0]])


def test_no_scipy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"forgepar\[scipy\]"):
        fp.Adjacency.from_edges(1, [], []).to_scipy()


def test_neither_library_is_loaded_for_it(monkeypatch):
    for library in ("networkx", "rustworkx"):
        monkeypatch.setitem(sys.modules, library, None)
    assert run(fp.Adjacency.from_edges(2, [0], [1]), tell)[1]["tell-1"] == (1, (0,))
