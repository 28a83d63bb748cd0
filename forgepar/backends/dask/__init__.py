"""Workers on a Dask cluster.

In: batches, as for any backend. Out: replies, from the threads of Dask's workers.

    backend       `DaskBackend`
    cluster       the connection to a cluster; starting a local one
    slots         one slot for each thread of a Dask worker
    slot_table    slots and workers, updated by the events of the cluster
    worker_site   runs batches on a Dask worker
    values        values that stay on the worker that made them
"""
