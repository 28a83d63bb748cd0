"""Benchmarks: one folder a workload, each with a ``run.py``; ``python -m benchmarks`` runs them."""
