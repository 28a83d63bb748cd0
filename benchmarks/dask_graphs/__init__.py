"""Graphs of Dask's on local workers."""
