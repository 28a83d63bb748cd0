"""Time and memory a task, from a thousand tasks to a million."""
