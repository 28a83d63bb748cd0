"""What long-lived executors keep: memory, descriptors, threads, files."""
