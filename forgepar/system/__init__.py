"""Operating system and threads: what forgepar needs of them in any process.

Nothing here knows about tasks, and every other package may use it.

    escaping       text made safe to show on a terminal
    forking        locks and owners in forked children
    life_locks     locked files that show whether their owner is alive
    loading        lazy imports, by one thread at a time
    thread_scope   values for the task that runs in a thread, and for threads that it starts
    trust          whether another user can change a path
"""
