"""Declaring workflows.

In: functions and their arguments. Out: a frozen `Plan`, numpy columns of tasks and dependencies. Nothing runs here.

    workflow       `Workflow`: the public methods, such as add, map, run
    columns        `TaskColumns`: the tasks of a workflow as columns
    tasks          `Task`, `Options`: a function and how to run it
    handles        `TaskHandle`: a stand-in for a task's value
    arguments      replaces handles in arguments by holes, and holes by values
    binding        checks that a function accepts its arguments
    adapters       functions that are called with other arguments than the task's
    fallbacks      what to do after the last attempt of a task failed
    combinators    sequence, parallel, map_reduce, include
    branching      `when`: one of two branches
    subflow        tasks that add tasks to a run
    from_graph     workflows from graphs of networkx and rustworkx, and from `Adjacency`
    checks         `Workflow.check`: likely errors and slowdowns
    context        `TaskContext`: what a running task can ask for
    file           `File`: an argument that stands for the contents of a file
    fresh_values   copies of mutable arguments for each task
    plan           `Plan`: the frozen workflow, with its layers
    taskset        numpy functions on sets of task numbers
    catalog        `TaskCatalog`: what the engine needs to know of tasks
    shell/         external programs as tasks
"""
