"""Whether a run's wall time tracks the longest task of each layer."""
