"""How values and code travel between processes.

In: Python objects. Out: bytes and segments of shared memory, and the same objects in another process. Nothing here
knows about tasks.

Pickling:
    codec              a value as bytes, or as a segment if it is large
    pickling           pickles of values and callables, including lambdas and functions of scripts
    by_value           how functions and classes that cannot be imported elsewhere are pickled
    exceptions         exceptions, with their type and the exceptions that they refer to
    exception_fields   args, attributes and fields of an exception
    culprit            which part of a value cannot be pickled, for error messages

Shared memory:
    arena              segments: written once, mapped by readers, freed, reused
    segments           names and sizes of segments
    segment_files      system calls on segment files
    arena_folders      the folders of an arena, removed with their owner
    usage_meter        how much of the memory budget is in use
    in_place           arrays that a task fills directly in shared memory

The caller's code in a worker:
    origins            where functions and classes come from, and the namespace of their module
    namespaces         makes functions and classes that were pickled by value
    caller_values      how a worker takes over values of the caller's globals
    context_variables  values of context variables of the user's modules
    module_state       state of the user's modules in the caller, for what tasks refer to
    worker_modules     how a worker takes over that state
    comparison         whether two values have the same content
    unchanged          whether a name still has the same value
    bytecode           what a code object does and refers to
    modules            which modules are the user's own
"""
