"""What an engine adds to a task that does nothing."""
