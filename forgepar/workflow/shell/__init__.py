"""External programs as tasks.

In: a command line with fields, and their values or handles. Out: a `Command`, which a worker runs, and a `ToolResult`.

    command    `shell`, `Command`, `ToolResult`
    template   command lines with fields
    process    runs a program, with its streams, its timeout and its end
    registry   `ToolRegistry`: programs by name
"""
