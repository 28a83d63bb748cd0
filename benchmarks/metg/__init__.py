"""The smallest task that keeps the cores busy for half of the time."""
