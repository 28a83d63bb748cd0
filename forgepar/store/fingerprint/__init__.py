"""Fingerprints: a digest of everything that a task's value depends on.

In: a task's function, options and constants, and the fingerprints of its dependencies. Out: 16 bytes.

    tasks         fingerprints of the tasks of a plan
    digester      the digest of any object
    code          handlers for functions and modules
    classes       handlers for classes
    data          handlers for containers, arrays and files
    third_party   handlers for objects of pandas, numba and pydantic
    source        which names of a module are fully described by its source
    names         identifies library objects by module, name and release
    merkle        digests of graphs of objects, with cycles
"""
