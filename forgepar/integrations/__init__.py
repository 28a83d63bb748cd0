"""Graphs of other libraries on forgepar's workers.

In: a Dask graph and keys. Out: the values of the keys.

    dask_graphs   `dask_get`: a scheduler for Dask collections
    dask_step     one node of such a graph, in a worker
"""
