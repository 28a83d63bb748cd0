"""No-op tasks on a Dask cluster, in batches and as tasks of Dask's own."""
