"""Small real programs, each importable and runnable from the command line."""
